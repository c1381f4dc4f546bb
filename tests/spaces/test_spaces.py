"""Each space starts at the unchanged model, trains only what it says, and takes any Hugging Face model it claims to."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fedllm.core.errors import ModelError, RecipeError
from fedllm.data.encode import encode_rows
from fedllm.models.batch import collate
from fedllm.models.model import Model
from fedllm.spaces import SPACES, make_space
from fedllm.spaces.lora import factors
from fedllm.spaces.space import Space

ROWS = [{"prompt": "red cat", "response": "say the word"}, {"prompt": "blue dog bird two", "response": "no"}]


def llama(folder, name, dtype=torch.float32, **knobs):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return Model(
        net, AutoTokenizer.from_pretrained(folder), "generation", make_space(name, **knobs), fast_kernels=False
    )


def losses(model, trees):
    rows = encode_rows(ROWS, model.tokenizer, "generation", 64)
    batch = collate([rows] * len(trees), model.pad, model.device)
    with torch.no_grad(), model.using(trees):
        return model.losses(batch)


UNCHANGED = ["lora", "full", "ia3", "adapter", "experts", "st_adapter", "layers", "mask", "head"]


@pytest.mark.parametrize("name", UNCHANGED)
def test_the_start_is_the_unchanged_model(tiny_llama_folder, name):
    model = llama(tiny_llama_folder, name)
    plain = losses(model, [{}])
    assert torch.allclose(losses(model, [model.initial()] * 2), plain.expand(2), atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_every_trainable_matters_and_lanes_do_not_touch_each_other(tiny_llama_folder, name):
    if name == "bias":
        with pytest.raises(ModelError, match="no such parameters; try the space 'lora' or 'ia3'"):
            llama(tiny_llama_folder, name).initial()
        return
    if name in ("feature_attention", "mlp_head", "split_adapter") or SPACES[name].classes is not Space.classes:
        with pytest.raises(ModelError, match=r"with this (one|model) .*'lora' works"):
            llama(tiny_llama_folder, name).initial()
        return
    knobs = {"streams": {"of": {"sigma": "full", "tau": {"name": "lora", "rank": 4}}},
             "p_tuning": {"hidden": 16}}.get(name, {})
    model = llama(tiny_llama_folder, name, dtype=torch.float64, **knobs)
    g = torch.Generator().manual_seed(1)
    theta = {n: (t + 0.05 * torch.randn(t.shape, generator=g)).double() for n, t in model.initial().items()}
    params = {n: t.clone().requires_grad_() for n, t in theta.items()}
    rows = encode_rows(ROWS, model.tokenizer, "generation", 64)
    batch = collate([rows], model.pad, model.device)
    with model.using([theta], None, {n: p[None] for n, p in params.items()}):
        model.losses(batch).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in params.values())
    other = {n: t + torch.randn(t.shape, generator=g).double() for n, t in theta.items()}
    alone, beside = losses(model, [theta]), losses(model, [other, theta, other])
    assert torch.allclose(alone[0], beside[1], atol=1e-12) and not torch.allclose(alone[0], beside[0], atol=1e-3)


@pytest.mark.parametrize("name", SPACES)
def test_no_knob_hides_what_every_space_does(name):
    assert not [k for k in SPACES[name].knobs() if callable(getattr(Space, k, None))]


def test_start_is_the_same_for_the_same_seed_and_follows_the_rank(tiny_llama_folder):
    model = llama(tiny_llama_folder, "lora", rank=4)
    a, b = model.initial(), model.initial()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(A.shape[0] == 2 and B.shape[1] == 2 for B, A in factors(model.initial(2)).values())
    with pytest.raises(RecipeError, match=r"space.rank = 64 .* must be <= "):
        model.initial(64)


@pytest.mark.parametrize(
    "name", ["lora", "full", "ia3", "adapter", "st_adapter", "prefix", "soft_prompt", "bias", "layers", "mask", "head"]
)
def test_gpt2_with_its_transposed_linears(name):
    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=64, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).double()
    knobs = {"targets": ["c_attn", "c_fc"]} if name == "lora" else {}
    model = Model(net, None, "generation", make_space(name, **knobs), fast_kernels=False)
    g = torch.Generator().manual_seed(1)
    trees = [
        {n: (t + 0.05 * torch.randn(t.shape, generator=g)).double() for n, t in model.initial().items()}
        for _ in range(3)
    ]
    ids = torch.randint(60, (2, 9), generator=g).numpy().astype("int32")
    from fedllm.data.encode import Encoded

    rows = [Encoded(r, r.astype("int64"), 9) for r in ids]

    def run(lanes):
        with torch.no_grad(), model.using(lanes):
            return model.losses(collate([rows] * len(lanes), 0, model.device))

    together = run(trees)
    assert torch.allclose(together, torch.cat([run([t]) for t in trees]), atol=1e-10)
    assert len(set(together.tolist())) == 3


def test_missing_targets_are_named(tiny_llama_folder):
    with pytest.raises(ModelError, match=r"no linear modules named \('query',\); it has .*'q_proj'"):
        llama(tiny_llama_folder, "lora", targets=["query"])


@pytest.mark.parametrize("name, knobs, why", [
    ("lora", {"targets": ("q_proj", "v_porj")}, r"no linear modules named 'v_porj'; it has .*'v_proj'"),
    ("mask", {"targets": ("q_proj", "v_porj")}, r"no linear modules named 'v_porj'"),
    ("ia3", {"targets": ("k_proj", "v_porj")}, r"no linear modules named 'v_porj'"),
    ("lora", {"modules_to_save": ("lm_haed",)}, r"space.modules_to_save: the model has no module named 'lm_haed'"),
    ("adapter", {"modules_to_save": ("lm_haed",)}, r"the model has no module named 'lm_haed'"),
    ("lora", {"targets": ("q_proj", "o_proj"), "modules_to_save": ("o_proj",)},
     r"'model.layers.0.self_attn.o_proj' is among space.targets = .* and in space.modules_to_save = \['o_proj'\]"),
])
def test_what_would_not_be_trained_is_refused_by_name(tiny_llama_folder, name, knobs, why):
    with pytest.raises(ModelError, match=why):
        llama(tiny_llama_folder, name, **knobs).initial()


@pytest.mark.parametrize("knobs", [{"modules_to_save": ("lm_head",)}, {"targets": ("q_proj", "lm_head")}])
def test_a_head_that_shares_the_embeddings_weights_is_trained_by_head_alone(knobs):
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=24, n_layer=1, n_head=2, bos_token_id=0,
                                      eos_token_id=0))
    knobs = {"targets": ("c_attn",)} | {k: tuple(v.replace("q_proj", "c_attn") for v in vs) for k, vs in knobs.items()}
    with pytest.raises(ModelError, match=r"'lm_head' shares its weights with 'transformer.wte.weight'.*'head'"):
        Model(tied, None, "generation", make_space("lora", **knobs), fast_kernels=False).initial()
    space = make_space("head")
    theta = Model(tied, None, "generation", space, fast_kernels=False).initial()
    fresh = GPT2LMHeadModel(tied.config)
    wte = fresh.transformer.wte.weight.clone()
    space.merge(fresh, {n: t + 1 for n, t in theta.items()})
    assert not fresh.config.tie_word_embeddings and torch.equal(fresh.transformer.wte.weight, wte)
    assert torch.equal(fresh.lm_head.weight, theta["lm_head.weight"] + 1)


def test_a_named_head_of_its_own_gets_factors(tiny_llama_folder):
    model = llama(tiny_llama_folder, "lora", targets=("q_proj", "lm_head"))
    assert "lm_head" in factors(model.initial())


@pytest.mark.parametrize("name, near", [("lorra", "lora"), ("softprompt", "soft_prompt")])
def test_misspelt_spaces_get_the_nearest_name(name, near):
    with pytest.raises(RecipeError, match=f"did you mean '{near}'"):
        make_space(name)


def test_a_bf16_base_keeps_its_trainables_in_fp32(tiny_llama_folder):
    model = llama(tiny_llama_folder, "lora", dtype=torch.bfloat16)
    exact = llama(tiny_llama_folder, "lora")
    theta = {n: t + 0.05 for n, t in exact.initial().items()}
    assert all(t.dtype == torch.float32 for t in model.initial().values())
    assert torch.allclose(losses(model, [theta]), losses(exact, [theta]), rtol=0.02)
