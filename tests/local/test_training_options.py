"""How people train: accumulation, checkpointing, packing, LoRA+, NEFTune, dropout, in both engines and by formula."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
)

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.program import drive
from fedllm.data.encode import IGNORE, Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.noise import Noise, noisy, words_of
from fedllm.local.objective import lane_losses
from fedllm.local.objectives.task import Task
from fedllm.local.packing import check_packing, packed
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.model import Model
from fedllm.runs.training import cautions, check_training
from fedllm.spaces import make_space
from tests.conftest import PLACE, RECORDS, word_tokenizer


def sentence(k, i):
    return " ".join(RECORDS[(7 * i + 3 * k + j * (i + 1)) % len(RECORDS)] for j in range(2 + (5 * i + k) % 12))


def world(folder, spec, space=None, sizes=(9, 4, 1, 13)):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).to(PLACE)
    model = Model(net, AutoTokenizer.from_pretrained(folder), "generation", space or make_space("lora", rank=3))
    shards = {f"c{k}": Shard([{"prompt": sentence(k, i), "response": sentence(k + 1, i)[:20]} for i in range(n)], [])
              for k, n in enumerate(sizes)}
    return World(model, Federation(shards, [], "generation"), spec, seed=3)


def trained(folder, engine, spec, space=None, rounds=2, method="fedavg", knobs=None):
    """The trainables after some rounds in fp64."""
    w, method = world(folder, spec, space), make_method(method, **(knobs or {}))
    run, state = engine((method,), w), method.init(w.model)
    state = {**state, "theta": {n: t.double() for n, t in state["theta"].items()}}
    for r in range(rounds):
        run.begin(r)
        state = drive(method.round(state, w.infos()), run)
        run.commit()
    return state["theta"]


def apart(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


BASE = {"optimizer": "sgd", "lr": 0.3, "epochs": 2}


@pytest.mark.parametrize("knobs", [{"clip_norm": 0.3}, {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1}, {}])
def test_parts_of_a_step_are_the_whole_step(tiny_llama_folder, knobs):
    whole = trained(tiny_llama_folder, InProcess, LocalSpec(**{**BASE, **knobs}, batch_size=6))
    for engine in (InProcess, Vectorized):
        parts = trained(tiny_llama_folder, engine, LocalSpec(**{**BASE, **knobs}, batch_size=2, accumulate=3))
        assert apart(parts, whole) < 1e-10
    assert LocalSpec(batch_size=2, accumulate=3).count(13) == LocalSpec(batch_size=6).count(13) == 3


def test_parts_of_a_step_with_a_penalty(tiny_llama_folder):
    mu = {"method": "fedprox", "knobs": {"mu": 0.5}}
    whole, parts = (trained(tiny_llama_folder, Vectorized, LocalSpec(**BASE, **how), **mu)
                    for how in ({"batch_size": 6}, {"batch_size": 2, "accumulate": 3}))
    assert apart(parts, whole) < 1e-10


@pytest.mark.parametrize("space", ["lora", "full", "soft_prompt"])
def test_layers_that_run_again_give_the_same_gradients(tiny_llama_folder, space):
    plain, again = (trained(tiny_llama_folder, Vectorized, LocalSpec(**BASE, batch_size=3, checkpointing=on),
                            make_space(space)) for on in (False, True))
    assert apart(plain, again) < 1e-12
    assert apart(again, trained(tiny_llama_folder, InProcess, LocalSpec(**BASE, batch_size=3, checkpointing=True),
                                make_space(space))) < 1e-10


def test_layers_that_run_again_hold_less(tiny_llama_folder):
    held = {}
    for on in (False, True):
        w = world(tiny_llama_folder, LocalSpec(checkpointing=on))
        theta = {n: t.double().to(PLACE)[None].requires_grad_() for n, t in w.model.initial().items()}
        rows, seen = w.encoded("c3", "train")[:4], []

        def note(t, seen=seen):
            seen.append(t.numel())
            return t

        from fedllm.models.checkpointing import checkpointed
        with w.model.using([w.model.initial()], None, theta), checkpointed(w.model, on), (
                torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)):
            lane_losses(Task(), w.model, [rows], [{}])
            held[on] = sum(seen)
    assert held[True] < 0.5 * held[False]


def test_packed_rows_are_trained_as_they_were(tiny_llama_folder):
    plain = trained(tiny_llama_folder, InProcess, LocalSpec(**BASE, batch_size=5))
    for engine in (InProcess, Vectorized):
        for more in ({}, {"checkpointing": True}):
            spec = LocalSpec(**BASE, batch_size=5, packing=True, **more)
            assert apart(trained(tiny_llama_folder, engine, spec), plain) < 1e-10
    rows = world(tiny_llama_folder, LocalSpec()).encoded("c3", "train")
    bins = packed(rows)
    assert len(bins) < len(rows) and max(len(b.ids) for b in bins) == max(len(r.ids) for r in rows)
    assert sum(b.n_target for b in bins) == sum(r.n_target for r in rows)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(("config", "apart"), [
    (LlamaConfig(**SMALL, **HEADS), True),
    (Gemma3TextConfig(**SMALL, **HEADS, head_dim=8, sliding_window=8, pad_token_id=0), True),
    (GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=40, bos_token_id=1, eos_token_id=2), True),
    (OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
               word_embed_proj_dim=32, vocab_size=40), False),
    (BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40), False),
    (MambaConfig(**SMALL, state_size=4), False),
], ids=lambda c: getattr(c, "model_type", ""))
def test_whether_rows_stay_apart_is_tried(config, apart):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config).to(PLACE)
    model = Model(net, word_tokenizer(), "generation", make_space("lora", rank=2))
    if apart:
        return check_packing(model)
    with pytest.raises(CompositionError, match="a row sees those that lie before it"):
        check_packing(model)


def test_lora_plus_is_pefts(tiny_llama_folder):
    spec = LocalSpec(optimizer="adamw", lr=1e-2, steps=4, batch_size=9, lora_plus=16)
    w = world(tiny_llama_folder, spec, make_space("lora", rank=3, targets=("q_proj", "v_proj")), sizes=(9,))
    ours = trained(tiny_llama_folder, Vectorized, spec, w.model.space, rounds=1)
    assert apart(ours, trained(tiny_llama_folder, InProcess, spec, w.model.space, rounds=1)) < 1e-10
    only = world(tiny_llama_folder, spec, w.model.space, sizes=(9,))
    method = make_method("fedavg")
    run, state = Vectorized((method,), only), method.init(only.model)
    run.begin(0)
    got = drive(method.round({**state, "theta": {n: t.double() for n, t in state["theta"].items()}}, only.infos()),
                run)["theta"]
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64), LoraConfig(
        r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"])).to(PLACE).double()
    params = dict(net.named_parameters())
    for n, t in state["theta"].items():
        params[n.replace(".weight", ".default.weight")].data = t.double().to(PLACE)
    optimizer = create_loraplus_optimizer(net, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, weight_decay=0.0)
    batch = collate([only.encoded("c0", "train")], 0, PLACE)
    for _ in range(4):
        loss = net(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = {n: params[n.replace(".weight", ".default.weight")].detach().cpu() for n in got}
    assert apart(got, theirs) < 5e-6  # its loss is in fp32


def test_what_is_drawn_is_the_clients_own(tiny_llama_folder):
    """The same in both engines, in parts, under checkpointing; another seed or no draw gives something else."""
    space = make_space("lora", rank=3, dropout=0.3, modules_to_save=())
    spec = {**BASE, "batch_size": 2, "accumulate": 2, "neftune": 5.0}
    one = trained(tiny_llama_folder, InProcess, LocalSpec(**spec), space)
    assert apart(one, trained(tiny_llama_folder, Vectorized, LocalSpec(**spec), space)) < 1e-10
    assert apart(one, trained(tiny_llama_folder, Vectorized, LocalSpec(**spec, checkpointing=True), space)) < 1e-10
    assert apart(one, trained(tiny_llama_folder, Vectorized, LocalSpec(**{**spec, "neftune": None}), space)) > 1e-5
    assert apart(one, trained(tiny_llama_folder, Vectorized, LocalSpec(**spec), make_space(
        "lora", rank=3, modules_to_save=()))) > 1e-5


def test_neftune_is_the_papers_noise(tiny_llama_folder):
    """x + U(-1, 1) alpha / sqrt(L d) on a row's own tokens, and nothing on padding, in tests or in generation."""
    model = world(tiny_llama_folder, LocalSpec()).model
    rows = [Encoded(np.arange(4, 4 + n, dtype=np.int32), np.r_[IGNORE, np.arange(5, 4 + n)], n - 1) for n in (20, 5)]
    batch, words = collate([rows], 0, PLACE), words_of(model)
    plain = words(batch.ids)
    model.stack.mask, model.stack.k = batch.mask, 1
    with noisy(model, [7], (0, 0), [2], 5.0):
        off = (words(batch.ids) - plain).detach().cpu()
        with torch.no_grad():
            assert words(batch.ids).equal(plain)
    for i, n in enumerate((20, 5)):
        bound = 5.0 / (n * 32) ** 0.5
        assert 0.9 * bound < float(off[i, :n].abs().max()) <= bound and not off[i, n:].any()
        assert abs(float(off[i, :n].pow(2).mean().sqrt()) / bound - 3**-0.5) < 0.05
    assert words(batch.ids).equal(plain)


def test_dropout_drops_the_adapters_input_alone(tiny_llama_folder):
    space = make_space("lora", rank=3, dropout=0.4, targets=("q_proj",))
    model = world(tiny_llama_folder, LocalSpec(), space).model
    module, path = model.net.model.layers[0].self_attn.q_proj, "model.layers.0.self_attn.q_proj"
    theta = {n: torch.randn(t.shape, dtype=torch.float64, device=PLACE) for n, t in model.initial().items()}
    x = torch.randn(2, 5, 32, dtype=torch.float64, device=PLACE)
    a, b = (theta[f"base_model.model.{path}.lora_{f}.weight"] for f in "AB")
    with model.using([theta]):
        model.stack.mask = torch.ones(2, 5, dtype=torch.bool, device=PLACE)
        model.stack.noise = Noise(model.stack, [3], [2])
        got = module.forward(x)
        keep = (Noise(model.stack, [3], [2]).uniform(path, x) >= 0.4).double() / 0.6
        model.stack.noise = None
        assert module.forward(x).allclose(x @ (module.weight + 16 / 3 * b @ a).T)
    assert 0.5 < float((keep > 0).double().mean()) < 0.7
    assert got.allclose(x @ module.weight.T + 16 / 3 * (x * keep) @ a.T @ b.T)


def test_what_cannot_be_done_is_refused(tiny_llama_folder):
    def check(spec, space="lora", method="fedavg", layers=(), **knobs):
        model = world(tiny_llama_folder, spec, make_space(space, **knobs)).model
        check_training(model, spec, make_method(method), layers)

    with pytest.raises(RecipeError, match=r"local.lora_plus = 16 .* space 'ia3' has none"):
        check(LocalSpec(lora_plus=16), "ia3")
    with pytest.raises(CompositionError, match=r"scaffold.* divides by the one rate"):
        check(LocalSpec(lora_plus=16, optimizer="sgd"), method="scaffold")
    with pytest.raises(CompositionError, match=r"local.checkpointing.*space 'prefix'"):
        check(LocalSpec(checkpointing=True), "prefix")
    with pytest.raises(CompositionError, match=r"local.packing.*without virtual tokens"):
        check(LocalSpec(packing=True), "soft_prompt")
    with pytest.raises(RecipeError, match=r"local.neftune = 5 goes by the length of each row"):
        LocalSpec.make({"packing": True, "neftune": 5}, "local")
    from fedllm.privacy.dp_sgd import DPSGD
    with pytest.raises(CompositionError, match=r"space.dropout and layer 'dp_sgd'"):
        check(LocalSpec(), layers=[DPSGD(noise_multiplier=1.0)], dropout=0.1)
    with pytest.raises(RecipeError, match="accumulate = 0"):
        LocalSpec.make({"accumulate": 0}, "local")
    assert "usual are 1e-5 to 1e-2" in cautions(LocalSpec(lr=1e6))[0] and not cautions(LocalSpec())
