"""Virtual time: late answers, deadlines, partial work, drop-outs; and who is chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evidence.rigs.time import Race, quadratic_world
from fedllm.core.ask import Ask
from fedllm.core.client import ClientInfo, Fleet, Profile
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import digest
from fedllm.core.program import drive
from fedllm.core.select import Turn
from fedllm.engines import InProcess, Vectorized
from fedllm.federation.coordinator import check_recipe
from fedllm.methods.registry import make_method
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.runs.recipe import load_recipe
from fedllm.runs.store import Blobs, freeze, thaw
from fedllm.selectors.registry import make_selector
from fedllm.wire.codec_quant import CodecQuant
from fedllm.wire.codec_topk_ef import CodecTopKEF

SPEEDS = np.array([0.2, 0.5, 1.0, 1.5, 2.0, 4.0])


def race(name, speeds=SPEEDS, asked=6, seed=0, kind=Vectorized, profiles=None, **knobs):
    world, _, _ = quadratic_world(seed, len(speeds), 0.5, np.asarray(speeds, float), steps=4)
    if profiles:
        world.profiles = {c: replace(p, **profiles) for c, p in world.profiles.items()}
    return Race(name, world, asked, knobs, kind=kind)


def rounds(run, count):
    for _ in range(count):
        run.round()
    return run


def w(run):
    return run.theta["w.weight"][0]


def test_an_answer_takes_its_way_down_its_work_and_its_way_up():
    run = race("fedavg", profiles={"latency": 0.25, "bandwidth": 100.0})
    rounds(run, 1)
    slowest = [e for e in run.engine.record.events if e.get("client") == "c000"]
    down, up = (next(e["bytes"] for e in slowest if e.get("direction") == way) for way in ("down", "up"))
    assert run.engine.clock.now == pytest.approx(0.25 + down / 100 + 4 / 0.2 + up / 100 + 0.25)
    assert next(e["seconds"] for e in slowest if e["kind"] == "answered") == pytest.approx(run.engine.clock.now)


def test_fedbuff_without_variance_is_fedavg():
    sync = rounds(race("fedavg", np.ones(6), weighting="uniform"), 4)
    buff = rounds(race("fedbuff", np.ones(6), buffer_size=6, concurrency=6), 4)
    assert torch.allclose(w(buff), w(sync), atol=1e-6) and buff.engine.clock.now == sync.engine.clock.now == 16.0
    assert buff.state["ages"] == {"0000": 24}


@pytest.mark.parametrize("name, knobs", [("fedbuff", {"buffer_size": 2, "concurrency": 4}),
                                         ("fedasync", {"concurrency": 4}), ("stragglers", {"over": 1.5})])
def test_the_same_seed_gives_the_same_course_on_both_engines(name, knobs):
    a, b, c = (rounds(race(name, kind=kind, **knobs), 5) for kind in (Vectorized, Vectorized, InProcess))
    assert digest(a.state) == digest(b.state) and a.engine.clock.now == b.engine.clock.now == c.engine.clock.now
    assert torch.allclose(w(a), w(c), atol=1e-10)
    order = [[e["client"] for e in run.engine.record.events if e["kind"] == "answered"] for run in (a, c)]
    assert order[0] == order[1]


def test_what_is_in_flight_outlives_the_process(tmp_path):
    whole = rounds(race("fedbuff", buffer_size=2, concurrency=4), 6)
    first, second = (race("fedbuff", buffer_size=2, concurrency=4) for _ in range(2))
    rounds(first, 3)
    blobs = Blobs(tmp_path)
    second.state, second.engine.memory = thaw(freeze((first.state, first.engine.memory), blobs), blobs)
    second.t = 3
    rounds(second, 3)
    assert digest(second.state) == digest(whole.state) and second.engine.clock.now == whole.engine.clock.now
    assert len(whole.engine.clock.flying) == 3


def test_staleness_is_told_and_can_be_bounded():
    run = rounds(race("fedbuff", buffer_size=2, concurrency=5), 10)
    told = run.method.report(run.state)
    ages = {int(s): n for s, n in told["staleness"]["histogram"].items()}
    assert min(ages) >= 0 and max(ages) > 0 and sum(ages.values()) == 20 == sum(told["answers"].values())
    assert told["answers"]["c005"] > told["answers"].get("c000", 0)  # quick clients give more
    strict = rounds(race("fedbuff", buffer_size=2, concurrency=5, max_staleness=1), 10)
    assert max(map(int, strict.method.report(strict.state)["staleness"]["histogram"])) <= 1


def test_fedasync_moves_by_the_share_of_its_answer():
    run = race("fedasync", np.ones(1), alpha=0.25, concurrency=1, rho=0.0)
    before = w(run).clone()
    alone = w(rounds(race("fedavg", np.ones(1), asked=1), 1))
    assert torch.allclose(w(rounds(run, 1)), 0.75 * before + 0.25 * alone)


def test_over_selection_closes_with_the_quick_and_counts_what_was_wasted():
    run = rounds(race("stragglers", over=1.5), 1)
    missing = {e["client"]: e["why"] for e in run.engine.record.events if e["kind"] == "missing"}
    assert set(missing) == {"c000", "c001"} and "4 answers were enough" in missing["c001"]
    assert run.engine.clock.now == 4 / 1.0 and run.engine.clock.wasted > 0


def test_a_third_of_the_clients_is_lost_and_the_run_goes_on():
    run = rounds(race("stragglers", profiles={"dropout": 0.3}, over=1.0), 8)
    lost = [e for e in run.engine.record.events if e["kind"] == "missing" and "lost after" in e["why"]]
    assert 4 <= len(lost) <= 26 and run.t == 8 and torch.isfinite(w(run)).all()


def test_when_all_fail_the_model_stays_and_time_passes():
    run = race("stragglers", over=1.0, deadline=0.5)  # no client makes a step in that time but the quick ones
    rounds(run, 1)
    assert not torch.equal(w(run), torch.zeros(10, dtype=torch.float64))
    late = race("fedavg")
    ask = late.method.round
    object.__setattr__(late.method, "round", lambda s, c: _hurried(ask(s, c)))
    rounds(late, 2)
    assert late.t == 2 and torch.equal(w(late), torch.zeros(10, dtype=torch.float64))
    assert late.engine.clock.now == pytest.approx(1.0)  # two deadlines of half a second
    assert "passed before it answered" in late.engine.record.events[-2]["why"]


def _hurried(program):
    out = yield replace(next(program), deadline=0.5)
    try:
        program.send(out)
    except StopIteration as end:
        return end.value


def test_partial_work_and_fednova():
    run = rounds(race("stragglers", over=1.0, deadline=2.0, normalize="fednova"), 1)
    took = {e["client"]: e["seconds"] for e in run.engine.record.events if e["kind"] == "answered"}
    assert took == {"c001": 2.0, "c002": 2.0, "c003": 2.0, "c004": 2.0, "c005": 1.0}  # c000 makes no step in 2 s
    deltas = {}
    for c, steps in {"c001": 1, "c002": 2, "c003": 3, "c004": 4, "c005": 4}.items():
        one = race("fedavg")
        one.world.local = replace(one.world.local, steps=steps)
        one.clients = [i for i in one.clients if i.id == c]
        deltas[c] = (w(rounds(one, 1)) / steps, steps)
    tau = np.mean([s for _, s in deltas.values()])
    want = tau * torch.stack([d for d, _ in deltas.values()]).mean(0)  # equal n
    assert torch.allclose(w(run), want)


def test_memory_of_a_late_client_does_not_count():
    run = race("scaffold")
    ask = run.method.round
    object.__setattr__(run.method, "round", lambda s, c: _deadline(ask(s, c), 8.0))
    rounds(run, 1)
    assert "c000" not in run.engine.memory or not run.engine.memory["c000"]
    assert run.engine.memory["c005"]


def _deadline(program, seconds):
    answer = None
    while True:
        try:
            asked = program.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield replace(asked, deadline=seconds) if isinstance(asked, Ask) else asked


def test_a_client_sleeps_through_its_night():
    run = race("fedavg")
    run.engine.clock.fleet = run.world.fleet = Fleet(day_seconds=100.0, day_share=0.4)
    rounds(run, 12)
    asleep = [e for e in run.engine.record.events if e["kind"] == "missing" and "day" in e["why"]]
    assert 0.3 < len(asleep) / 72 < 0.9


def test_layers_that_need_a_whole_round_are_refused():
    for name in ("fedbuff", "fedasync"):
        method = make_method(name)
        method.check_layers([CodecQuant()])
        for layer, words in ((DPFedAvg(noise_multiplier=1.0), "use fedavg"), (CodecTopKEF(), "use codec_quant")):
            with pytest.raises(CompositionError, match=words):
                method.check_layers([layer])


@pytest.mark.parametrize("name, knobs, words", [
    ("fedbuff", {"max_staleness": -1}, r"max_staleness = -1 is not allowed; it must be >= 0"),
    ("fedasync", {"max_staleness": -2}, r"max_staleness = -2 is not allowed"),
    ("fedbuff", {"buffer_size": 0}, r"buffer_size = 0 is not allowed; it must be >= 1"),
    ("fedbuff", {"a": 1.5}, r"a = 1\.5 is not allowed"), ("stragglers", {"over": 0.9}, r"over = 0\.9 is not allowed"),
    ("stragglers", {"deadline": 0.0}, r"deadline = 0\.0 is not allowed; it must be > 0")])
def test_bad_knobs(name, knobs, words):
    with pytest.raises(RecipeError, match=words):
        make_method(name, **knobs)


def turn(state, clients=6, want=3, round=4, seed=0):
    infos = [ClientInfo(f"c{k}", 10 * (k + 1), Profile(speed=1.0 + k)) for k in range(clients)]
    return Turn(infos, want, round, np.random.default_rng(seed), state, None, {})


def test_oorts_score_on_a_table_by_hand():
    oort = make_selector("oort", {"clip_bound": 1.0, "round_threshold": 50.0})
    arms = {"a": {"rms": 2.0, "rows": 10.0, "seconds": 1.0, "last": 3, "times": 1},
            "b": {"rms": 1.0, "rows": 40.0, "seconds": 2.0, "last": 0, "times": 1},
            "c": {"rms": 1.0, "rows": 10.0, "seconds": 4.0, "last": 3, "times": 1}}
    got = oort.scores(arms, {"percentile": 50.0}, 5)
    stale = [np.sqrt(0.1 * np.log(5) / last) for last in (4, 1, 4)]
    want = [10 / 30 + 1e-4 + stale[0], 1 + 1e-4 + stale[1], (0 + 1e-4 + stale[2]) * (2 / 4) ** 2]
    assert list(got.values()) == pytest.approx(want)


def test_oort_normalizes_before_it_clips():
    oort = make_selector("oort", {"clip_bound": 0.5, "round_threshold": 100.0})
    arms = {c: {"rms": u, "rows": 1.0, "seconds": 1.0, "last": 0, "times": 1} for c, u in zip("abc", (0, 2, 10.0),
                                                                                             strict=True)}
    got = oort.scores(arms, {"percentile": 100.0}, 1)  # log 1 = 0: no staleness
    assert list(got.values()) == pytest.approx([1e-4, 0.2 + 1e-4, 0.2 + 1e-4])  # (min(u, 2) - 0) / (10 - 0)


def test_oorts_window_is_for_exploring_alone():
    oort = make_selector("oort", {"sample_window": 1.0, "cut_off_util": 0.0})
    seen = {c for seed in range(50) for c in oort.exploit({f"c{k}": 1.0 for k in range(6)}, 2, turn({}, seed=seed))}
    assert len(seen) == 6  # of equals all are drawn, not only the first two
    fresh = turn({}).clients
    assert {*oort.explore(fresh, 2, turn({}))} == {"c4", "c5"}  # the fastest two


def test_fedasyncs_local_term_holds_a_client_back():
    """min_x F(x) + rho/2 ||x - x_t||^2: by SGD with rate lr each step shrinks the way from x_t by lr rho."""
    def moved(rho):
        world, _, _ = quadratic_world(0, 3, 0.5, np.ones(3), steps=2)
        race = Race("fedasync", world, 3, {"alpha": 1.0, "a": 0.0, "concurrency": 1, "rho": rho})
        race.round()
        return race.theta["w.weight"][0]

    free, lr, rho = moved(0.0), 0.01, 5.0
    # the first step is free of the term (x = x_t = 0), so x_2 = x_2(free) - lr rho x_1
    one = quadratic_world(0, 3, 0.5, np.ones(3), steps=1)[0]
    race = Race("fedasync", one, 3, {"alpha": 1.0, "a": 0.0, "concurrency": 1, "rho": 0.0})
    race.round()
    torch.testing.assert_close(moved(rho), free - lr * rho * race.theta["w.weight"][0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["oort", "by_loss", "by_size", "uniform"])
def test_everybody_chosen_is_there_and_is_chosen_once(name):
    chooser = make_selector(name, {})
    state = chooser.init()
    for r in range(30):
        picks = list(chooser.pick(turn(state, round=r, seed=r)))
        assert len(picks) == len(set(picks)) == 3 and set(picks) <= {f"c{k}" for k in range(6)}
        for c in picks:
            state.get("arms", {})[c] = {"rms": 1.0 + int(c[1]), "mean": 1.0, "rows": 4.0, "seconds": 1.0, "last": r,
                                        "times": 1}


def test_selectors_hear_of_losses_and_the_method_does_not():
    run = race("fedavg", asked=3)
    heard = Race("fedavg", run.world, 3, {}, "oort", {"exploration": 1.0, "exploration_min": 1.0})
    rounds(heard, 2)
    assert len(heard.mine["arms"]) == 6  # all are explored in two rounds of three
    arm = heard.mine["arms"]["c000"]
    assert arm["rows"] == 1 and arm["rms"] == arm["mean"] > 0 and arm["seconds"] > 20.0
    chosen = Race("fedavg", run.world, 2, {}, "power_of_choice", {"d": 6})
    rounds(chosen, 1)
    probes = [e for e in chosen.engine.record.events if e.get("phase") == "PowerOfChoice.probe"]
    assert len({e["client"] for e in probes}) == 6 and chosen.theta.keys() == run.theta.keys()


def test_ipw_weighs_by_the_inverse_probability():
    run = Race("fedavg", race("fedavg").world, 3, {}, "oort", {"debias": "ipw", "exploration": 0.0,
                                                              "exploration_min": 0.0})
    rounds(run, 6)
    assert run.mine["weights"] and all(0 < v <= 10 for v in run.mine["weights"].values())
    sent = drive(_once(run), run.engine, run.layers, [run.mine])
    assert sent == pytest.approx(sum(run.mine["weights"].get(c, 1.0) for c in ("c000", "c001")))


def _once(run):
    out = yield Ask(run.method.local, {c: run.method.down(run.state, None) for c in ("c000", "c001")})
    return out.value["n"]


@pytest.mark.parametrize(("method", "by_arrival"), [
    ("fedbuff", True), ("fedasync", True), ("stragglers", True), ({"name": "stragglers", "over": 1.0}, False),
    ("fedavg", False)])
def test_a_real_federation_takes_them_and_says_that_order_counts(method, by_arrival):
    recipe = load_recipe({"model": "embedded", "method": method, "data": {"source": "x.jsonl"}})
    check_recipe(recipe)
    assert make_method(recipe.method.name, **recipe.method.knobs).by_arrival is by_arrival


@pytest.mark.parametrize(("name", "knobs", "words"), [
    ("fedbuff", {"buffer_size": 5, "concurrency": 3}, ["buffer_size = 5 is more than method.concurrency = 3"]),
    ("fedbuff", {"buffer_size": 8, "concurrency": 9}, ["buffer_size = 8 is more than the 6 clients",
                                                       "concurrency = 9 is more than the 6 clients"]),
    ("fedbuff", {"buffer_size": 3, "concurrency": 6}, []), ("fedasync", {"concurrency": 7}, ["concurrency = 7"]),
    ("fedasync", {"concurrency": 6}, []), ("fedavg", {}, [])])
def test_more_answers_or_clients_than_there_are_is_said(name, knobs, words):
    said = make_method(name, **knobs).cautions(6)
    assert len(said) == len(words) and all(w in s for w, s in zip(words, said, strict=True))


def test_a_buffer_larger_than_the_fleet_fills_all_the_same():
    run = rounds(race("fedbuff", np.ones(2), buffer_size=5, concurrency=2), 3)
    assert run.t == run.state["version"] == 3 and sum(run.state["given"].values()) == 15


def test_who_is_under_way_at_the_end_is_named():
    run = rounds(race("fedbuff", buffer_size=2, concurrency=4), 3)
    flying = {f.client for f in run.engine.clock.flying}
    run.engine.finish(3)
    assert {e["client"] for e in run.engine.record.events if e["kind"] == "unfinished"} == flying and len(flying) == 3
    run.engine.finish(3)
    assert run.engine.clock.flying == []
    assert len([e for e in run.engine.record.events if e["kind"] == "unfinished"]) == 3  # it is said once
