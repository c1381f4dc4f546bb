"""The model that clients hold and the model that its owner keeps: blocks, names, what travels, what alignment does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.core.ask import Ask
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError, PayloadError
from fedllm.core.program import drive, serve
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.align import View, align
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.emulator import KEPT, emulator, renamed
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.spaces.layers import block_of

QUICK = {"prealign_steps": 4, "align_steps": 2}


def rows(rng: np.random.Generator, count: int) -> list[Encoded]:
    """Token arrays of 4 to 11 tokens, the last two to be learned."""
    out = []
    for n in rng.integers(4, 12, count):
        ids = rng.integers(3, 64, n).astype(np.int32)
        out.append(Encoded(ids, np.where(np.arange(n) < n - 2, -100, ids).astype(np.int64), 2))
    return out


def deep(layers: int = 6) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)).double()


def start(name="fedbiot", kind=Vectorized, space="lora", layers=(), public=12, depth=6, loopback=False, **knobs):
    rnd = np.random.default_rng(0)
    fed = Federation({f"c{i}": Shard(rows(rnd, n), rows(rnd, 2)) for i, n in enumerate((5, 7, 9))}, rows(rnd, 4),
                     "generation", (), rows(rnd, public))
    model = Model(deep(depth), None, "generation", make_space(space, **({"rank": 2} if space == "lora" else {})),
                  fast_kernels=False)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=0.1, batch_size=4, max_length=32), exact_match=False)
    method = make_method(name, **{**QUICK, **knobs})
    return kind((method, *layers), world, loopback=loopback), method, method.init(model), world


def go(engine, method, state, world, rounds=2, layers=(), states=None):
    for t in range(rounds):
        engine.begin(t)
        state = drive(method.round(state, world.infos()), engine, layers, states)
        engine.commit()
    return state


def test_an_emulator_of_all_blocks_is_the_model_and_shares_its_weights():
    model = Model(deep(), None, "generation", make_space("lora", rank=2))
    whole, thin = emulator(model, range(6)), emulator(model, (0, 3, 5))
    batch = collate([rows(np.random.default_rng(0), 3)], 0, "cpu")
    theta = {n: t + 0.1 for n, t in model.initial().items()}
    losses = []
    for m in (model, whole):
        with m.using([theta]):
            losses.append(float(m.losses(batch)))
    assert losses[0] == losses[1]
    mine, theirs = dict(model.net.named_parameters()), dict(thin.net.named_parameters())
    name = "model.layers.{}.mlp.up_proj.weight"
    assert theirs[name.format(1)].data_ptr() == mine[name.format(3)].data_ptr()
    kept = {p.data_ptr() for p in theirs.values()}
    dropped = [n for n, p in mine.items() if block_of(n) in (1, 2, 4) and p.data_ptr() in kept]
    assert not dropped and emulator(model, (0, 3, 5)) is thin and list(vars(thin.net.config)[KEPT]) == [0, 3, 5]


def test_an_emulator_is_a_folder_for_clients_to_load(tmp_path, tiny_llama_folder):
    from transformers import AutoTokenizer

    from fedllm.models.load import load_model

    model = Model(deep(), None, "generation", make_space("lora", rank=2))
    thin = emulator(model, (0, 3, 5))
    thin.net.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path)
    at_site = load_model(str(tmp_path), "generation", make_space("lora", rank=2), dtype="float64")
    assert make_method("fedbiot").at_client(at_site) is at_site  # it holds no more than this
    assert all(torch.equal(a.cpu(), b) for a, b in zip(at_site.net.parameters(), thin.net.parameters(), strict=True))
    assert at_site.initial().keys() == thin.initial().keys()


@pytest.mark.parametrize("depth, adapter, drop, want", [
    (8, 2, 0.5, [0, 2, 5, 6, 7]), (8, 2, 0.0, [0, 1, 2, 3, 4, 5, 6, 7]), (6, 2, 0.75, [2, 4, 5]),
    (32, 2, 0.5, [*(i * 29 // 14 for i in range(15)), 30, 31])])
def test_which_blocks_clients_get(depth, adapter, drop, want):
    assert make_method("fedbiot", adapter_layers=adapter, drop_ratio=drop).kept(depth) == want


def test_nothing_left_for_the_emulator_is_refused():
    with pytest.raises(CompositionError, match="leaves no block of a model of 3"):
        make_method("fedbiot", drop_ratio=0.9).kept(3)


@pytest.mark.parametrize("space", ["lora", "full"])
def test_a_is_plugged_in_by_block_number(space):
    _, method, state, world = start(space=space)
    n = next(n for n in state["A"] if block_of(n) == 3)  # the emulator's 3rd block from 0 is the model's 5th
    state["A"][n] = state["A"][n] + 1
    served = method.served(state)[0]
    there = n.replace("layers.3.", "layers.5.")
    assert torch.equal(served[there], state["A"][n]) and set(served) == set(world.model.initial())
    changed = [k for k, t in world.model.initial().items() if space == "full" and not torch.equal(t, served[k])]
    assert space == "lora" or changed == [there]
    assert renamed({"h.1.x": torch.ones(1), "wte": torch.ones(1), "h.2.x": torch.ones(1)}, {1: 4}).keys() == {
        "h.4.x", "wte"}


def test_without_dropped_blocks_the_plug_in_is_what_clients_hold():
    engine, method, state, world = start(drop_ratio=0.0, prealign_steps=0, align_steps=0)
    state = go(engine, method, state, world)
    theirs = drive(method.evaluate(state, world.infos(), "global"), engine)
    engine.begin(9)
    whole = drive(iter_one(Ask(method.score, {SERVER: {**{f"theta/{n}": t for n, t in method.served(state)[0].items()},
                                                       "on": "global"}})), engine)
    assert theirs["c0"]["loss"] == pytest.approx(whole[SERVER]["loss"], abs=1e-12)


def iter_one(ask):
    return (yield ask)


@pytest.mark.parametrize("knobs", [{}, {"freeze_a": True}, {"space": "full"}])
@pytest.mark.parametrize("name", ["fedbiot", "dp_offsite_peft"])
def test_engines_agree(gap, name, knobs):
    ends = []
    for kind, loopback in ((InProcess, True), (Vectorized, False)):
        engine, method, state, world = start(name, kind, loopback=loopback, **knobs)
        ends.append(go(engine, method, state, world))
    assert gap(ends[0]["A"], ends[1]["A"]) < 1e-10 and gap(ends[0]["E"], ends[1]["E"]) < 1e-10


def test_no_message_holds_what_the_owner_keeps():
    engine, method, state, world = start()
    sent = []
    cross = engine.cross
    engine.cross = lambda way, job, payload: sent.append((way, job.client, payload)) or cross(way, job, payload)
    state = go(engine, method, state, world)
    out = [(way, p) for way, client, p in sent if client != SERVER]
    assert {way for way, _ in out} == {"up", "down"}
    for way, payload in out:
        at = {block_of(k) for k in payload if "/" in k}
        assert at == ({2, 3} if way == "up" else {0, 1, 2, 3})  # the emulator's own numbers
        assert all(t.numel() < 200 for t in payload.values() if isinstance(t, torch.Tensor))  # factors, no weights
    assert not any(e["client"] == SERVER for e in engine.record.events if e["kind"] == "wire")


def test_alignment_brings_the_emulator_closer():
    model = Model(deep(), None, "generation", make_space("lora", rank=2), fast_kernels=False)
    thin, rng = emulator(model, (0, 3, 4, 5)), np.random.default_rng(0)
    public = rows(rng, 16)
    e = {n: t for n, t in thin.initial().items() if block_of(n) < 2}
    plan = [rng.choice(16, 8, replace=False) for _ in range(60)]
    spec = LocalSpec(lr=1e-2)
    teacher, student = View(model, {}, 4), View(thin, e, 2)
    _, before = align(teacher, student, e, public, plan[:1], spec, 0.9)
    new, _ = align(teacher, student, e, public, plan, spec, 0.9)
    _, after = align(teacher, View(thin, new, 2), new, public, plan[:1], spec, 0.9)
    assert after < 0.8 * before


def test_alignment_divides_by_one_rms_of_the_whole_batch():
    model = Model(deep(), None, "generation", make_space("lora", rank=2), fast_kernels=False)
    thin, public = emulator(model, (0, 3, 4, 5)), rows(np.random.default_rng(0), 4)
    e = {n: t for n, t in thin.initial().items() if block_of(n) < 2}
    teacher, student = View(model, {}, 4), View(thin, e, 2)
    batch = collate([list(public)], model.pad, model.device)
    h_t, h_s = teacher.look(batch)[0].detach(), student.look(batch)[0].detach()
    want = float((h_t - h_s).pow(2).mean() / h_t.pow(2).mean())
    _, got = align(teacher, student, e, public, [np.arange(4)], LocalSpec(lr=1e-2), 0.0)
    assert got == pytest.approx(want, rel=1e-5)


def test_merged_is_the_distance_of_products():
    from fedllm.methods._offsite import Merged

    g = torch.Generator().manual_seed(0)
    make = lambda: {"base_model.model.w.lora_B.weight": torch.randn(2, 5, 3, generator=g, dtype=torch.float64),  # noqa: E731
                    "base_model.model.w.lora_A.weight": torch.randn(2, 3, 4, generator=g, dtype=torch.float64)}
    one, other = make(), make()
    got = Merged(0.5, other).loss(one, other)
    b, a = sorted(one, reverse=True)
    want = 0.5 * (one[b] @ one[a] - other[b] @ other[a]).pow(2).sum((1, 2))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(Merged(0.5, other).loss({b: one[b]}, other),
                               0.5 * (one[b] @ other[a] - other[b] @ other[a]).pow(2).sum((1, 2)))


def test_public_rows_are_needed_and_the_servers_own_work_is_not_for_clients():
    engine, method, state, world = start(public=0)
    with pytest.raises(DataError, match="aligns its emulator on public rows"):
        go(engine, method, state, world)
    call = type("Far", (), {"id": "c0"})()
    with pytest.raises(PayloadError, match="is the server's own and was asked of 'c0'"):
        serve((method,), "FedBiOT.alignment", {}, call)
    with pytest.raises(CompositionError, match="trains nothing within blocks"):
        start(space="soft_prompt")


def test_layers_do_not_touch_the_alignment():
    from fedllm.core.layer import Layer

    class Nosy(Layer):
        def server(self, ask, state):
            state["saw"] = [*state.get("saw", []), ask.phase]
            return (yield ask)

    layer, states = Nosy(), [{}]
    engine, method, state, world = start(layers=(layer,))
    go(engine, method, state, world, 1, (layer,), states)
    assert states[0]["saw"] == ["FedBiOT.local"]


def test_dp_offsite_peft_is_refused_without_its_privacy():
    from fedllm.privacy.dp_fedavg import DPFedAvg
    from fedllm.privacy.dp_sgd import DPSGD
    from fedllm.privacy.secagg import SecAgg
    from fedllm.runs.fits import compose

    method, user = make_method("dp_offsite_peft"), make_method("dp_offsite_peft", dp_level="user")
    with pytest.raises(CompositionError, match=r"dp_level = example and .*secagg.* do not fit.*list dp_sgd"):
        compose(method, [SecAgg()])
    with pytest.raises(CompositionError, match=r"dp_level = user .* list dp_fedavg"):
        compose(user, [DPSGD(noise_multiplier=1.0)])
    compose(method, [DPSGD(noise_multiplier=1.0), SecAgg()])
    compose(user, [DPFedAvg(noise_multiplier=1.0), SecAgg()])
    compose(make_method("dp_offsite_peft", dp_level="none"), [])


@pytest.mark.parametrize("freeze_a", [False, True])
def test_dp_offsite_peft_books_the_clients_and_not_the_alignment(freeze_a):
    from fedllm.privacy.dp_sgd import DPSGD

    layer, states = DPSGD(noise_multiplier=1.0, seed=0), [{"clients": {}, "open": {}}]
    engine, method, state, world = start("dp_offsite_peft", layers=(layer,), freeze_a=freeze_a)
    go(engine, method, state, world, 2, (layer,), states)
    assert {c: sum(row[-1] for row in rows) for c, rows in states[0]["clients"].items()} == {
        "c0": 2 * 2, "c1": 2 * 2, "c2": 2 * 3}  # steps of 5, 7 and 9 rows in batches of 4, over two rounds
