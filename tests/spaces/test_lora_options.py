"""DoRA, PiSSA and the rest of LoRA's options: PEFT's own numbers, stacked, saved, merged and started from."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.rng import torch_stream
from fedllm.methods.registry import make_method
from fedllm.models.batch import Batch
from fedllm.models.load import load_model
from fedllm.models.peft_io import knobs_of, load_adapter, save_adapter
from fedllm.models.plain import unpatched
from fedllm.models.proof import examine
from fedllm.models.reread import reread
from fedllm.spaces import make_space
from tests.conftest import PLACE

IDS = torch.tensor([[5, 9, 13, 7, 21, 8], [4, 6, 8, 10, 12, 14]])
OPTIONS = [{"dora": True}, {"dora": True, "scaling": "rslora"}, {"init": "pissa"},
           {"init": "pissa", "scaling": "rslora"}, {"scaling": "rslora"}]


def made(folder, dtype="float64", quick=False, **knobs):
    """`quick`: with norms of our own, which in fp64 are not rounded to fp32 as the network's are."""
    return load_model(folder, "generation", make_space("lora", rank=4, modules_to_save=(), **knobs), dtype=dtype,
                      device=PLACE.type, fast_kernels=quick)


def moved(model, seed=0):
    rng = torch_stream(seed, "moved")
    return {n: t + 0.2 * torch.randn(t.shape, generator=rng).to(t) for n, t in model.initial().items()}


def logits(model, *trees):
    ids = IDS.to(model.device)
    batch = Batch(len(trees), ids.repeat(len(trees), 1), torch.ones_like(ids.repeat(len(trees), 1), dtype=torch.bool),
                  ids.repeat(len(trees), 1))
    with torch.no_grad(), model.using(trees):
        return model.logits_of(model.hidden(batch)).cpu()


def plain(folder, adapter, dtype=torch.float64):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(net, adapter, autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize("knobs", OPTIONS, ids=str)
def test_a_saved_adapter_is_the_same_in_plain_peft(tiny_llama_folder, tmp_path, knobs):
    model = made(tiny_llama_folder, **knobs)
    theta = moved(model)
    save_adapter(tmp_path, model, theta, tiny_llama_folder)
    reread(tmp_path, model, theta)
    ours = logits(model, theta)
    with torch.no_grad():
        theirs = plain(tiny_llama_folder, tmp_path)(input_ids=IDS).logits
    assert float((ours - theirs).abs().max()) < 1e-9
    assert float((ours - logits(model, model.initial())).abs().max()) > 1e-3
    again = load_adapter(tmp_path, model)
    assert all(again[n].allclose(t, atol=1e-6) for n, t in theta.items())
    merged = unpatched(model.net)
    model.space.merge(merged, theta)
    with torch.no_grad():
        assert merged.cpu()(input_ids=IDS).logits.allclose(ours, atol=1e-9)


@pytest.mark.parametrize("knobs", OPTIONS, ids=str)
def test_lanes_are_what_each_is_alone_and_start_as_the_base(tiny_llama_folder, knobs):
    model = made(tiny_llama_folder, quick=True, **knobs)
    trees = [moved(model, seed) for seed in range(3)]
    assert model.stackable and logits(model, *trees).allclose(torch.cat([logits(model, t) for t in trees]), atol=1e-10)
    assert logits(model, model.initial()).allclose(logits(model, {}), atol=1e-5)
    assert model.space.idle(model.net, model.initial()) and not model.space.idle(model.net, trees[0])
    before = model.ways
    examine(model)
    assert model.ways == before  # nothing falls back: losses and gradients are the plain network's


def test_dora_learns_as_pefts(tiny_llama_folder):
    """Three steps of SGD on the same rows give PEFT's factors and magnitudes."""
    model = made(tiny_llama_folder, dora=True, targets=("q_proj", "down_proj"))
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64), LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_dora=True), autocast_adapter_dtype=False)
    start, params = model.initial(), dict(net.named_parameters())
    theirs = {n: params[n.replace(".weight", ".default.weight") if n.endswith(".weight") else n + ".default.weight"]
              for n in start}
    assert len(theirs) == sum(p.requires_grad for p in net.parameters())
    for n, p in theirs.items():
        assert p.shape == start[n].shape
        p.data = start[n].double().clone()
    ours = {n: t.double().to(PLACE)[None].clone().requires_grad_() for n, t in start.items()}
    ids = IDS.to(PLACE)
    for _ in range(3):
        with model.using([start], None, ours):
            z = model.logits_of(model.hidden(Batch(1, ids, torch.ones_like(ids, dtype=torch.bool), ids)))
            loss = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        z = net(input_ids=IDS).logits
        torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        for p in (*ours.values(), *theirs.values()):
            p.data -= 0.5 * p.grad
            p.grad = None
    assert max(float((ours[n].cpu()[0] - p).detach().abs().max()) for n, p in theirs.items()) < 1e-10
    assert all(not ours[n].cpu()[0].equal(t.double()) for n, t in start.items())


def test_pissa_starts_as_pefts(tiny_llama_folder):
    model = made(tiny_llama_folder, "float32", init="pissa", targets=("q_proj",))
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj"], init_lora_weights="pissa"))
    theirs = dict(net.named_parameters())
    for i in range(2):
        path = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        b, a = (model.initial()[f"{path}.lora_{f}.weight"] for f in "BA")
        want = theirs[f"{path}.lora_B.default.weight"] @ theirs[f"{path}.lora_A.default.weight"]
        assert (b @ a).allclose(want, atol=1e-6)  # each pair of vectors has a sign of its own
        assert a.abs().allclose(theirs[f"{path}.lora_A.default.weight"].abs(), atol=1e-4)


def test_a_dora_adapter_of_peft_is_a_start(tiny_llama_folder, tmp_path):
    torch.manual_seed(3)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_dora=True,
        lora_dropout=0.1)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
        want = net(input_ids=IDS).logits
    net.save_pretrained(tmp_path)
    knobs = knobs_of(tmp_path, "lora")
    assert knobs["dora"] and knobs["dropout"] == 0.1
    model = load_model(tiny_llama_folder, "generation", make_space("lora", **knobs), device=PLACE.type)
    assert logits(model, load_adapter(tmp_path, model)).allclose(want, atol=1e-4)
    other = made(tiny_llama_folder, targets=("q_proj", "up_proj"))
    with pytest.raises(ModelError, match="lora_magnitude_vector"):
        load_adapter(tmp_path, other)


def test_what_does_not_go_together_is_refused(tiny_llama_folder, tmp_path):
    with pytest.raises(RecipeError, match=r"init = 'pissa' is not allowed with dora"):
        make_space("lora", dora=True, init="pissa")
    for name, knobs in (("flexlora", {"init": "pissa"}), ("fedex_lora", {"dora": True})):
        with pytest.raises(CompositionError, match="counts on a change of s B A and no more"):
            make_method(name).init(made(tiny_llama_folder, **knobs))
    make_method("fedit").init(made(tiny_llama_folder, dora=True))
    model = made(tiny_llama_folder, "float32")
    save_adapter(tmp_path, model, moved(model), tiny_llama_folder)
    with pytest.raises(ModelError, match=r"did not begin as space.init = 'pissa'"):
        load_adapter(tmp_path, made(tiny_llama_folder, "float32", init="pissa"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0 and not config["use_dora"]
