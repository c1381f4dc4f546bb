"""FedPEAT: which blocks a size has, what crosses when it changes, who refuses, and what a controller learns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm.core.ask import Ask
from fedllm.core.client import SERVER, Fleet, Profile
from fedllm.core.errors import CompositionError, DataError, ModelError, RecipeError, RunError
from fedllm.core.payload import digest, part
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods._control import OUT, SABPPO, Chance, Greedy, Scene, joint, policy
from fedllm.methods._sizes import BLOCKS, Sizes, needed
from fedllm.methods.registry import make_method
from fedllm.models.emulator import emulator, grown
from fedllm.models.model import Model
from fedllm.models.ways import Ways
from fedllm.runs.store import Blobs, freeze, thaw
from fedllm.spaces import make_space
from fedllm.spaces.layers import block_of
from tests.methods.test_offsite import deep, rows

KNOBS = {"ratios": (0.25, 0.5, 1.0), "bottom_layers": 1, "adapter_layers": 1, "prealign_steps": 2}


def start(kind=Vectorized, name="fedpeat", memory=(0, 1, 2), space="lora", public=12, loopback=False, fleet=None,
          **knobs):
    """Three clients, whose memory is just enough for an emulator of this number (None: not declared)."""
    rnd = np.random.default_rng(0)
    fed = Federation({f"c{i}": Shard(rows(rnd, n), rows(rnd, 2)) for i, n in enumerate((5, 7, 9))}, rows(rnd, 4),
                     "generation", (), rows(rnd, public))
    model = Model(deep(), None, "generation", make_space(space, **({"rank": 2} if space == "lora" else {})),
                  fast_kernels=False)
    method = make_method(name, **(KNOBS if name == "fedpeat" else {}) | knobs)
    state = method.init(model)
    limit = {} if name != "fedpeat" else {
        f"c{i}": Profile(memory_bytes=None if m is None else enough(state, m)) for i, m in enumerate(memory)}
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=0.1, batch_size=4, max_length=32), exact_match=False,
                  profiles=limit, fleet=fleet)
    return kind((method,), world, loopback=loopback), method, state, world


def enough(state, size):
    return needed(state["weights"], state["kept"][size]) if size >= 0 else needed(state["weights"], []) - 1


def go(engine, method, state, world, rounds=2, first=0):
    for t in range(first, first + rounds):
        engine.begin(t)
        state = drive(method.round(state, world.infos()), engine)
        engine.commit()
    return state


def watched(engine):
    sent, cross = [], engine.cross

    def crossing(way, job, payload):
        sent.extend([(way, job.client, payload)] if job.client != SERVER else [])
        return cross(way, job, payload)

    engine.cross = crossing
    return sent


@pytest.mark.parametrize("depth, low, top", [(6, 1, 1), (12, 2, 2), (32, 0, 2), (4, 1, 2)])
def test_sizes_are_nested_and_have_both_ends(depth, low, top):
    sizes = Sizes(low, top, (0.75, 0.2, 0.5))
    kept, ends = sizes.kept(depth), sizes.ends(depth)
    middle = depth - low - top
    assert [len(k) - low - top for k in kept] == [max(1, round(middle * r)) for r in (0.2, 0.5, 0.75)]
    for small, large in itertools.pairwise(kept):
        assert {*ends} <= {*small} <= {*large} and large == sorted({*large})


@pytest.mark.parametrize("ratio, drop", [(0.5, 0.5), (1.0, 0.0)])
def test_with_one_size_it_is_offsite_tuning(gap, ratio, drop):
    ours = go(*start(ratios=(ratio,), memory=(None,) * 3))
    engine, method, state, world = start(name="offsite_tuning", bottom_layers=1, adapter_layers=1, drop_ratio=drop,
                                         prealign_steps=2)
    theirs = go(engine, method, state, world)
    assert gap(ours["A"], method.plugged(theirs)) < 1e-12 and ours["kept"][0] == method.kept(6)
    assert max(float(t.abs().max()) for n, t in ours["A"].items() if "lora_B" in n) > 0


def test_each_is_sent_what_its_memory_holds_and_only_what_is_new():
    engine, method, state, world = start()
    sent = watched(engine)
    one = go(engine, method, state, world, 1)
    first = {c: {block_of(n) for n in part(p, "blocks")} for way, c, p in sent if way == "down" and "kept" in p}
    ends = {*state["ends"]}
    assert first == {f"c{i}": {*state["kept"][i]} - ends for i in range(3)}
    held = {n: t for n, t in world.model.net.state_dict().items()}
    assert all(torch.equal(t, held[n]) for _, _, p in sent for n, t in part(p, "blocks").items())
    up = [p for way, _, p in sent if way == "up"]
    assert len(up) == 3 and all({block_of(n) for n in part(p, "delta")} == ends for p in up)
    engine.infos["c0"] = replace(engine.infos["c0"], profile=Profile(memory_bytes=enough(state, 1)))
    sent.clear()
    infos = [engine.infos[c.id] for c in world.infos()]
    engine.begin(1)
    two = drive(method.round(one, infos), engine)
    engine.commit()
    second = {c: {block_of(n) for n in part(p, "blocks")} for way, c, p in sent if way == "down" and "kept" in p}
    assert second == {"c0": {*state["kept"][1]} - {*state["kept"][0]}, "c1": set(), "c2": set()}
    assert two["held"]["c0"]["sizes"] == [0, 1] and [r["sizes"]["c0"] for r in two["rounds"]] == [0, 1]
    assert {block_of(n) for n in engine.memory["c0"][BLOCKS]} == {*state["kept"][1]} - ends


@pytest.mark.parametrize("knobs", [{}, {"server_trains": True, "lambda_c": 0.1}, {"controller": "sabppo",
                                                                                   "ppo_every": 2}])
def test_engines_agree_on_devices_of_three_sizes(gap, knobs):
    ends, scores = [], []
    for kind, loopback in ((InProcess, True), (Vectorized, False)):
        engine, method, state, world = start(kind, loopback=loopback, **knobs)
        state = go(engine, method, state, world, 4)
        engine.begin(9)
        scores.append({c: s["loss"] for c, s in drive(method.evaluate(state, world.infos(), "global"), engine).items()})
        ends.append(state)
    assert gap(ends[0]["A"], ends[1]["A"]) < 1e-10 and len(scores[0]) == 3
    assert scores[0] == pytest.approx(scores[1], abs=1e-10)
    assert [r["sizes"] for r in ends[0]["rounds"]] == [r["sizes"] for r in ends[1]["rounds"]]


def test_the_server_counts_as_one_client_more(gap):
    """The mean of what devices and server made, by rows."""
    alone, both = (go(*start(server_trains=x, prealign_steps=0), 1) for x in (False, True))
    engine, method, state, _ = start(prealign_steps=0, server_trains=True)
    engine.begin(0)
    own = drive(iter_one(Ask(method.own, {SERVER: {f"A/{n}": t for n, t in state["A"].items()}})), engine)[SERVER]
    want = {n: t + (21 * (alone["A"][n] - t) + 12 * own[f"delta/{n}"]) / 33 for n, t in state["A"].items()}
    assert own["n"] == 12 and gap(both["A"], want) < 1e-12


def iter_one(ask):
    return (yield ask)


def test_a_device_without_the_memory_refuses_and_one_that_fits_nothing_is_left_out(caplog):
    engine, method, state, world = start(controller="fixed")
    state = go(engine, method, state, world, 1)
    missing = {e["client"]: e["why"] for e in engine.record.events if e["kind"] == "missing"}
    assert set(missing) == {"c0", "c1"} and "declares memory_bytes = " in missing["c0"] and set(state["held"]) == {"c2"}
    engine, method, state, world = start(memory=(-1, 1, 2))
    state = go(engine, method, state, world, 2)
    assert not [e for e in engine.record.events if e["kind"] == "missing"]
    assert "is too little for any emulator: c0" in caplog.text
    assert set(state["held"]) == {"c1", "c2"} and state["rounds"][-1]["rest"] == pytest.approx(1 / 3)
    with pytest.raises(RunError, match="none of 3 clients declares memory_bytes enough for the smallest emulator"):
        go(*start(memory=(-1, -1, -1)), 1)


def test_who_lost_its_blocks_takes_no_part_and_is_sent_them_again(gap):
    engine, method, state, world = start()
    state = go(engine, method, state, world, 1)
    engine.memory["c1"] = {}
    state = go(engine, method, state, world, 1, first=1)
    [why] = [e["why"] for e in engine.record.events if e["kind"] == "missing"]
    assert "has lost blocks that it was sent; it gets them again" in why and "c1" not in state["held"]
    state = go(engine, method, state, world, 1, first=2)
    assert state["rounds"][-1]["rest"] == 0 and state["held"]["c1"]["last"] == 1


def test_the_state_outlives_a_checkpoint(tmp_path):
    engine, method, state, world = start(controller="sabppo", ppo_every=2)
    state = go(engine, method, state, world, 3)
    again = thaw(freeze(state, Blobs(tmp_path)), Blobs(tmp_path))
    memory = thaw(freeze(engine.memory, Blobs(tmp_path)), Blobs(tmp_path))
    other, _, _, _ = start(controller="sabppo", ppo_every=2)
    other.memory = memory
    assert digest(go(other, method, again, world, 2, 3)) == digest(go(engine, method, state, world, 2, 3))


def test_a_step_in_an_emulator_takes_its_share_of_time():
    engine, method, state, world = start(fleet=Fleet(), prealign_steps=0)
    go(engine, method, state, world, 1)
    took = {e["client"]: e["seconds"] for e in engine.record.events
            if e["kind"] == "answered" and "local" in e["phase"]}
    steps = {"c0": 2, "c1": 2, "c2": 3}  # of 5, 7 and 9 rows in batches of 4
    assert took == pytest.approx({c: n * len(state["kept"][i]) / 6 for i, (c, n) in enumerate(steps.items())})


def test_an_emulator_begins_and_runs_as_its_owner_does():
    """The ways that were found right for the whole model, an adapter to start from, and the config's lists by block."""
    model = Model(deep(), None, "generation", make_space("lora", rank=2))
    model.start = {n: t + float(block_of(n)) for n, t in model.initial().items()}
    model.go(Ways(quick=False, cut=False, together=False))
    model.net.config.no_rope_layers = [1, 1, 1, 0, 1, 0]
    thin = emulator(model, (0, 3, 5))
    assert thin.ways == model.ways and thin.share == 0.5 and thin.net.config.no_rope_layers == [1, 0, 0]
    assert all(torch.equal(t, model.start[n.replace("layers.1.", "layers.3.")]) for n, t in thin.initial().items()
               if block_of(n) == 1)
    ends = emulator(model, (0, 5))
    blocks = {n: t for n, t in model.net.state_dict().items() if block_of(n) == 3}
    more = grown(ends, (0, 3, 5), blocks, {"no_rope_layers": [1, 0, 0]}, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(more.net.parameters(), thin.net.parameters(), strict=True))
    assert grown(ends, (0, 3, 5), {n: t.clone() for n, t in blocks.items()}, {}) is more
    for odd in ({"_attn_implementation": [1, 2, 3]}, {"layer_types": ["full_attention"]}):
        with pytest.raises(ModelError, match="is no list of a config with an entry for each of 3 blocks"):
            grown(ends, (0, 3, 5), blocks, odd)
    assert grown(ends, (0, 3, 5), {n: t + 1 for n, t in blocks.items()}, {}) is not more


def scene_of(fits, seconds=None):
    fits = np.array(fits, bool)
    return Scene(fits, np.array(seconds if seconds is not None else np.ones(fits.shape), float),
                 np.linspace(-1, 1, 2 * len(fits)).reshape(len(fits), 2))


def test_greedy_takes_the_largest_that_fits_in_time():
    scene = scene_of([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], [[1, 2, 3], [1, 2, 3], [7, 6, 8], [1, 1, 1]])
    assert Greedy(2.5).choose({}, scene, np.random.default_rng(0))[0].tolist() == [1, 1, 1, OUT]
    assert Greedy(1e9).choose({}, scene, np.random.default_rng(0))[0].tolist() == [2, 1, 2, OUT]


def test_branches_add_up_to_the_joint_distribution():
    """Over all that three devices may choose together the probabilities are those of the branches, and sum to 1."""
    scene, control = scene_of([[1, 1], [1, 0], [0, 0]]), SABPPO(3e-3, 0.2, 0.99, 4)
    w = control.begin(2, 2, 0)["w"]
    x = torch.from_numpy(np.concatenate([scene.seen, np.broadcast_to(scene.seen.mean(0), (3, 2))], 1))
    open_ = torch.from_numpy(np.concatenate([np.ones((3, 1), bool), scene.fits], 1))
    log_p, _ = policy(w, x, open_)
    every = [torch.tensor(c) for c in itertools.product(range(3), repeat=3)]
    got = torch.stack([joint(log_p, c).exp() for c in every])
    want = torch.stack([log_p[0, c[0]].exp() * log_p[1, c[1]].exp() * log_p[2, c[2]].exp() for c in every])
    assert torch.allclose(got, want, atol=1e-12) and float(got.sum()) == pytest.approx(1.0, abs=1e-12)
    for draw in range(50):
        for who in (control, Chance()):
            choice, _ = who.choose(control.begin(2, 2, 0), scene, np.random.default_rng(draw))
            assert choice[1] in (OUT, 0) and choice[2] == OUT and (choice != OUT).any()


def test_what_is_rewarded_is_chosen_more_often():
    control, scene = SABPPO(1e-2, 0.2, 0.9, 8), scene_of([[1, 1], [1, 1]])
    memory, rng, said = control.begin(2, 2, 0), np.random.default_rng(0), []
    for _ in range(240):
        choice, memory = control.choose(memory, scene, rng)
        said.append(float((choice == 1).mean()))
        memory = control.learn(memory, said[-1])
    assert np.mean(said[:40]) < 0.55 and np.mean(said[-40:]) > 0.8


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match=r"ratios = \(0\.5, 1\.5\) is not allowed; .* above 0 and up to 1"):
        make_method("fedpeat", ratios=(0.5, 1.5))
    with pytest.raises(RecipeError, match=r"ratios = \(0.5, 0.5\) is not allowed; it must be different"):
        make_method("fedpeat", ratios=(0.5, 0.5))
    with pytest.raises(CompositionError, match="use the space 'lora'"):
        start(space="full")
    with pytest.raises(CompositionError, match="leaves nothing of a model of 6 blocks between"):
        start(bottom_layers=3, adapter_layers=3)
    with pytest.raises(DataError, match=r"give data\.public, or set prealign_steps to 0"):
        go(*start(public=0), 1)


def test_who_learns_from_losses_does_not_go_with_noise():
    from fedllm.privacy.dp_sgd import DPSGD
    from fedllm.runs.fits import compose

    compose(make_method("fedpeat"), [DPSGD(noise_multiplier=1.0)])
    with pytest.raises(CompositionError, match=r"controller = 'sabppo' and layer 'dp_sgd' do not fit.*use 'greedy'"):
        compose(make_method("fedpeat", controller="sabppo"), [DPSGD(noise_multiplier=1.0)])
    with pytest.raises(CompositionError, match=r"server_trains = true and layer 'dp_sgd' do not fit together"):
        compose(make_method("fedpeat", server_trains=True), [DPSGD(noise_multiplier=1.0)])


def test_packed_weights_are_not_sent(monkeypatch):
    monkeypatch.setattr("fedllm.models.emulator.kind_of", lambda net: "nf4")
    with pytest.raises(ModelError, match=r"model\.quantize = 'nf4' and blocks that are sent to clients do not fit"):
        start()
