"""Bases in 4 and 8 bits: LoRA over them is what it is in plain PEFT, and what cannot be is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fedllm
from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.rng import torch_stream
from fedllm.models.exam import Exam, _answer
from fedllm.models.known_by import base_digest
from fedllm.models.load import EMBEDDED, load_model
from fedllm.models.peft_io import load_adapter
from fedllm.models.quantized import dequantized, packed, unpacked
from fedllm.runs.export import export
from fedllm.spaces import make_space

CONFIGS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
           "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0}}
NEAR = {"nf4": 2e-5, "int8": 0.05}
"""Of the largest logit: bitsandbytes' own int8 rounds what goes in, and ours does not."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["nf4", "int8"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return load_model("embedded", "generation", make_space("lora", rank=4), quantize=kind)


def moved(model, seed):
    rng = torch_stream(seed, "moved")
    return {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in model.initial().items()}


def recipe(kind, **more):
    return {"name": "small", "model": {"name": "embedded", "quantize": kind}, "rounds": 1,
            "data": {"source": "office", "office": {"clients": 3, "rows": 12, "test_rows": 6, "client_test_rows": 3}},
            "space": {"name": "lora", "rank": 2}, "evaluate": {"exact_match": False, "samples": 0},
            "local": {"optimizer": "sgd", "lr": 0.05, "steps": 2, "batch_size": 3, "max_length": 64}, **more}


def test_lanes_are_what_the_unpacked_network_is(model, kind):
    exam = Exam.of(model)  # by the weights as they are unpacked, one row at a time
    assert not exam.differs(model) and model.said == [] and model.stackable
    losses, grads = _answer(model, exam.trees, exam.lanes)
    assert float((losses - exam.losses).abs().max() / exam.losses.max()) < 1e-5
    for ours, plain in zip(grads, exam.grads, strict=True):
        for n, g in plain.items():
            assert float((ours[n] - g).norm()) <= 1e-4 * float(g.norm()), n
    whole = dequantized(model.net)  # the plain network unpacks map by map, and is the one that is unpacked at once
    ids = torch.arange(5, 17)[None]
    with torch.no_grad(), model.using([model.initial()]):
        assert torch.allclose(model.net(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-4)


def test_nothing_that_is_read_without_gradients_changes_the_weights(model):
    before = base_digest(model)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad(), model.using([model.initial()]):
        model.net(input_ids=ids)
    assert base_digest(model) == before  # bitsandbytes would have packed them anew on some processors
    exam = Exam.of(model)
    assert not exam.differs(model)


def test_another_scale_is_another_base(kind):
    model = load_model("embedded", "generation", make_space("lora", rank=4), quantize=kind)
    before = base_digest(model)
    assert base_digest(load_model("embedded", "generation", make_space("lora", rank=4), quantize=kind)) == before
    _, module = next(packed(model.net))
    scale = module.weight.quant_state.absmax if kind == "nf4" else (
        module.weight.SCB if module.state.CB is None else module.state.SCB)
    scale.mul_(2)
    assert base_digest(model) != before


def test_a_run_and_its_adapter_in_plain_peft(tmp_path, kind):
    result = fedllm.run(recipe(kind, space={"name": "lora", "rank": 2, "alpha": 64}), root=tmp_path / "runs")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]),
                                                device_map={"": "cpu"}, dtype=torch.float32)
    for _, module in packed(base):
        module.support_avx512bf16_for_cpu = False
    model = load_model("embedded", "generation", make_space("lora", rank=2, alpha=64.0), quantize=kind)
    ids = AutoTokenizer.from_pretrained(EMBEDDED)("A note about a late delivery", return_tensors="pt").input_ids
    with torch.no_grad():
        alone = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, str(result.folder / "adapter")).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(export(result.folder, merge=True))(input_ids=ids).logits
        with model.using([load_adapter(result.folder / "adapter", model)]):
            ours = model.net(input_ids=ids).logits
    top = float(theirs.abs().max())
    assert float((ours - merged).abs().max()) < 1e-4 * top
    assert float((ours - theirs).abs().max()) < NEAR[kind] * top
    assert float((alone - theirs).abs().max()) > (4e-5 if kind == "nf4" else 0.02) * top  # it had learned something
    config = json.loads((result.folder / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_engines_agree(tmp_path, kind):
    ends = []
    for engine in ("vectorized", "in_process"):
        result = fedllm.run(recipe(kind, engine={"kind": engine}), root=tmp_path / engine)
        ends.append(load_file(result.folder / "adapter" / "adapter_model.safetensors"))
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


@pytest.mark.slow
def test_bf16_trains(tmp_path):
    result = fedllm.run(recipe("nf4", model={"name": "embedded", "quantize": "nf4", "dtype": "bfloat16"},
                               local={"lr": 0.01, "steps": 4, "batch_size": 4, "max_length": 64}), root=tmp_path)
    assert result.evaluation["global"]["loss"] < result.evaluation["before"]["global"]["loss"]


def test_it_weighs_less(kind, model):
    packed_bytes = sum(m.weight.numel() * m.weight.element_size() for _, m in packed(model.net))
    whole = sum(4 * m.in_features * m.out_features for _, m in packed(model.net))
    assert packed_bytes == whole // (8 if kind == "nf4" else 4)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mapped files")
def test_the_unpacked_checkpoint_does_not_stay_mapped(tmp_path):
    AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "wide")
    model = load_model(str(tmp_path / "wide"), "generation", make_space("lora", rank=4), quantize="nf4")
    assert next(packed(model.net)) and str(tmp_path / "wide") not in Path("/proc/self/maps").read_text()


def test_unpacked_is_what_it_multiplies_by(model, kind):
    path, module = next(packed(model.net))
    x = torch.eye(module.in_features)
    with torch.no_grad():
        got = type(module).forward(module, x).T
    assert torch.allclose(got, unpacked(module), atol=1e-5)
    net = dequantized(model.net)
    assert type(net.get_submodule(path)) is torch.nn.Linear and not hasattr(net.config, "quantization_config")
    assert net.lm_head.weight is net.model.embed_tokens.weight


@pytest.mark.parametrize("space", ["full", "bias", "layers", "mask", "head", "ia3"])
def test_spaces_that_train_the_base_are_refused(space):
    with pytest.raises(CompositionError, match=f"space '{space}' trains the base's own weights, which model.quantize = "
                                               "'nf4' packs; allowed are adapter, .*lora"):
        load_model("embedded", "generation", make_space(space), quantize="nf4")


def test_other_refusals(tmp_path, monkeypatch):
    lora = make_space("lora", modules_to_save=("up_proj",), targets=("q_proj",))
    with pytest.raises(CompositionError, match=r"modules_to_save names 'model\.layers\.0\.mlp\.up_proj'"):
        load_model("embedded", "generation", lora, quantize="nf4")
    for more, says in (({"dtype": "float64"}, "model.dtype = 'float64' do not fit"), ({"quantize": "int3"}, "int3"),
                       ({"weights": "random"}, "model.weights = 'random' do not fit")):
        with pytest.raises(ModelError, match=says):
            load_model("embedded", "generation", make_space("lora"), **{"quantize": "nf4", **more})
    with pytest.raises(RecipeError, match=r"model\.quantize"):
        fedllm.run(recipe("fp2"), root=tmp_path)
    with pytest.raises(CompositionError, match="streams"):
        load_model("embedded", "generation", make_space("streams", of={"a": "full", "b": {"name": "lora", "rank": 2}}),
                   quantize="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs an optional extra: pip install 'fedlm\[quantized\]'"):
        load_model("embedded", "generation", make_space("lora"), quantize="nf4")
