"""A model is right or refused: the same cells that `make models` judges, and what the examination finds by itself."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evidence.models import FAST, named
from evidence.zoo.cell import judge
from evidence.zoo.configs import tiny
from fedllm.core.errors import ModelError
from fedllm.data.encode import Encoded
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.models import proof, verdicts
from fedllm.models.heads import Head
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.plain import put_in, swapped, unpatched
from fedllm.models.proof import examine
from fedllm.models.ways import Ways
from fedllm.spaces import make_space
from fedllm.spaces.space import patch


def model(name, space="lora", dtype=torch.float64, **knobs):
    return Model(tiny(name, dtype=dtype), None, "generation", make_space(space, **knobs), name=name)


@pytest.mark.parametrize("name, space", [(n, s) for n, spaces in FAST for s in spaces])
def test_no_cell_is_wrong(name, space):
    task, own = named(name)
    found = judge(own, space, task)
    assert found.outcome in ("right", "falls back", "refused"), found
    if name in ("llama", "gpt2", "cohere", "granite", "bert", "opt"):
        assert found.outcome == "right"
    else:
        assert found.outcome != "refused", found


def test_the_judge_finds_what_is_wrong(monkeypatch):
    """The model as it was before it was examined: the cap of gemma2's logits is lost, deberta's clients mix."""
    monkeypatch.setattr("evidence.zoo.cell.examine", lambda *_, **__: None)
    assert judge("deberta-v2", "lora", "classification").outcome in ("WRONG", "broken")
    monkeypatch.setattr(Head, "_is_plain", lambda self, out: True)
    assert judge("gemma2", "lora").outcome == "WRONG" and judge("llama", "lora").outcome == "right"


def test_caps_and_scales_are_found_at_any_strength():
    """Random weights give logits that a cap of 30 changes by a millionth."""
    for name, plain in (("llama", True), ("qwen2", True), ("gemma2", False), ("granite", False), ("cohere", False)):
        net = tiny(name, dtype=torch.float32)
        for p in net.parameters():
            p.data.mul_(0.1)
        head = Head(net)
        assert head.plain is plain, name
        ids = torch.arange(2, 9)[None]
        with torch.no_grad():
            whole = net(input_ids=ids).logits
            assert torch.allclose(head(head.body(input_ids=ids).last_hidden_state), whole, atol=1e-6)


def test_a_clip_that_weak_inputs_do_not_reach_keeps_the_networks_own_attention():
    quick = [m for m in model("olmo").net.modules() if "forward" in m.__dict__ and "q_proj" in m._modules]
    clipped = [m for m in model("olmo_clip").net.modules() if "forward" in m.__dict__ and "q_proj" in m._modules]
    assert quick and not clipped


def test_what_is_wrong_falls_back_and_says_so_once(monkeypatch, caplog):
    real = Model.hidden

    def mixing(self, batch, padded=True):
        h = real(self, batch, padded)
        return h + 1e-2 * h.mean(0, keepdim=True) if batch.k > 1 else h

    monkeypatch.setattr(Model, "hidden", mixing)
    m = model("llama")
    examine(m, cache=False)
    assert m.ways == Ways(together=False) and not m.stackable
    assert len(m.said) == 1 and "one client at a time" in m.said[0] and caplog.text.count("one client at a time") == 1
    with pytest.raises(ModelError, match=r"one client at a time"), m.using([m.initial()] * 2):
        pass


def test_what_is_wrong_in_every_way_is_refused_with_the_module(monkeypatch):
    m = model("llama", targets=["q_proj", "v_proj"])
    install = type(m.space).install

    def broken(self, net, stack):
        out = install(self, net, stack)
        patch(net.get_submodule("model.layers.1.self_attn.v_proj"), lambda f: lambda x: f(x.detach()))
        return out

    monkeypatch.setattr(type(m.space), "install", broken)
    m.go(Ways())
    with pytest.raises(ModelError, match=r"space 'lora': model\.layers\.\d\.self_attn\.[qv]_proj does not"):
        examine(m, cache=False)


def test_an_exception_names_the_module_and_is_no_traceback():
    m = model("llama", "adapter", size=4)
    m.space.__dict__["_sites"] = lambda net: ["model.layers.1.self_attn.q_proj", "model.rotary_emb"]
    m.go(Ways())
    with pytest.raises(ModelError, match=r"space 'adapter'.*model\.rotary_emb: \w+Error"):
        examine(m, cache=False)


@pytest.mark.parametrize("name, why", [("mixtral_aux", r"learns by another loss .* output_router_logits"),
                                       ("bert_lm", "words see those that come after")])
def test_a_network_that_is_not_what_its_task_takes_it_for_is_refused(name, why):
    net = tiny(name, dtype=torch.float32)
    with pytest.raises(ModelError, match=why):
        examine(Model(net, None, "generation", make_space("lora", rank=2), name=name), cache=False)


def test_the_verdict_is_kept_by_config_space_and_versions(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    real = proof.Exam.of.__func__
    monkeypatch.setattr(proof.Exam, "of", classmethod(lambda cls, m: asked.append(m) or real(cls, m)))
    for space, count in (("lora", 1), ("lora", 1), ("ia3", 2)):
        load_model(tiny_llama_folder, "generation", make_space(space))
        assert len(asked) == count
    [one, _] = sorted((tmp_path / "fedllm" / "examined").glob("*.json"), key=lambda p: p.stat().st_mtime)
    kept = json.loads(one.read_text())
    one.write_text(json.dumps({**kept, "ways": {**kept["ways"], "together": False}, "said": ["slower"]}))
    m = load_model(tiny_llama_folder, "generation", make_space("lora"))
    assert not m.stackable and m.said == ["slower"] and len(asked) == 2
    one.write_text("{")
    assert load_model(tiny_llama_folder, "generation", make_space("lora")).stackable and len(asked) == 3
    monkeypatch.setattr(verdicts, "_versions", lambda: ["another"])
    load_model(tiny_llama_folder, "generation", make_space("lora"))
    assert len(asked) == 4


@pytest.mark.parametrize("name", ["lora", "full", "ia3", "head", "layers", "mask"])
def test_trainables_put_into_the_network_are_what_the_patched_modules_make_of_them(name):
    for arch in ("llama_tied", "gpt2"):
        m = model(arch, name)
        theta = {n: t + 0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t)
                 for n, t in m.initial().items()}
        ids = torch.arange(2, 12)[None]
        bare = unpatched(m.net)
        with torch.no_grad(), m.using([theta]):
            ours = m.logits_of(m.hidden(_batch(ids)))
        before = copy.deepcopy(bare.state_dict())
        with torch.no_grad(), swapped(bare, put_in(m.space, bare, theta)):
            assert torch.allclose(bare(input_ids=ids).logits, ours, atol=1e-6)
        assert all(torch.equal(t, before[n]) for n, t in bare.state_dict().items())


def _batch(ids):
    from fedllm.models.batch import Batch

    return Batch(1, ids, torch.ones_like(ids, dtype=torch.bool), ids)


@pytest.mark.parametrize("name, space", [("mistral_window", "soft_prompt"), ("mistral_window", "prefix"),
                                         ("mpt", "soft_prompt"), ("mpt", "prefix"), ("lfm2", "soft_prompt")])
def test_batched_texts_behind_a_prompt_go_on_as_each_does_alone(name, space):
    m = model(name, space, length=5)
    examine(m, cache=False)
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=rng).numpy().astype("int32") for n in (12, 3, 7)]
    trees = [{n: t + 0.3 * torch.randn(t.shape, generator=rng) for n, t in m.initial().items()} for _ in range(2)]
    together = run_generates([Generate(str(k), m, t, None, prompts, 6) for k, t in enumerate(trees)], Limits())
    for k, tree in enumerate(trees):
        alone = [run_generates([Generate("x", m, tree, None, [p], 6)], Limits())[0][0] for p in prompts]
        assert together[k] == alone


def test_where_padding_matters_texts_of_one_length_go_together():
    found = judge("fnet", "lora", "classification")
    assert found.outcome == "falls back" and "uneven" in found.ways


def test_a_model_that_cannot_continue_texts_says_so(monkeypatch):
    m = model("llama")
    m.silent = "it cannot"
    with pytest.raises(ModelError, match=r"it cannot"):
        row = Encoded(torch.arange(3).numpy(), 0, 0)
        run_generates([Generate("a", m, m.initial(), None, [row.ids], 2)], Limits())


def test_a_tied_head_is_known_by_what_it_is_and_not_by_its_name():
    """mamba's embedding is `backbone.embeddings`."""
    m = model("mamba", "full")
    examine(m, cache=False)
    assert m.head.trained(m.initial()) and "backbone.embeddings.weight" in m.head.names
    assert not model("llama", "lora").head.trained(["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_padding_that_is_learned_is_left_alone_as_in_transformers(tiny_llama_folder):
    """transformers gives the padding token's embedding no gradient."""
    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64)
    m = Model(net, AutoTokenizer.from_pretrained(tiny_llama_folder), "generation", make_space("full"))
    theta = m.initial()
    stacked = {n: torch.stack([t, t]).requires_grad_() for n, t in theta.items()}
    ids = torch.tensor([[5, 0, 7, 8], [6, 7, 8, 9]])
    batch = _batch(ids)
    batch = type(batch)(2, ids, batch.mask, ids)
    with m.using([theta, theta], None, stacked):
        m.losses(batch).sum().backward()
    grad = stacked["model.embed_tokens.weight"].grad
    assert not grad[0, 0].any() and grad[1, 6].any()
