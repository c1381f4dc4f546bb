"""A client leaves, and what a client was worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import digest
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.methods._games import exact
from fedllm.methods.registry import make_method


def settled(game, v):
    """What a game returns whose worths are a table's."""
    asked = 0
    try:
        s = next(game)
        while True:
            asked += 1
            s = game.send(v(s))
    except StopIteration as end:
        return end.value, asked


def additive(s):
    return sum({"a": 1.0, "b": 2.0, "c": -0.5, "d": 0.0}[k] for k in s)


def gloves(s):
    return float(min(len(s & {"a", "b"}), len(s & {"c"})))


def twins(s):
    return float(bool(s & {"a", "b"}))


def test_exact_values_of_games_that_are_known():
    phi, asked = settled(exact(["a", "b", "c", "d"]), additive)
    assert phi == pytest.approx({"a": 1.0, "b": 2.0, "c": -0.5, "d": 0.0}) and asked == 16  # d is a null player
    assert settled(exact(["a", "b", "c"]), gloves)[0] == pytest.approx({"a": 1 / 6, "b": 1 / 6, "c": 2 / 3})
    assert settled(exact(["a", "b"]), twins)[0] == pytest.approx({"a": 0.5, "b": 0.5})


def test_leaving_one_out_sees_no_twins_and_shapley_does():
    alone = make_method("shapley", game="leave_one_out", round_eps=0.0)
    assert settled(alone.play(["a", "b"], np.random.default_rng(0)), twins)[0] == {"a": 0.0, "b": 0.0}


def test_walks_come_to_the_exact_values_with_fewer_models():
    players = list("abcdef")
    weight = dict(zip(players, (1.0, 2.0, 0.5, -1.0, 0.2, 3.0), strict=True))

    def v(s):
        return math.tanh(sum(weight[k] for k in s) / 3)

    want, all_ = settled(exact(players), v)
    method, seen = make_method("shapley", walk_eps=0.02, tolerance=0.02, walks=120), set()

    def counted(s):
        seen.add(s)
        return v(s)

    got, _ = settled(method.play(players, np.random.default_rng(0)), counted)
    assert sorted(got, key=got.get) == sorted(want, key=want.get) and len(seen) < all_
    assert sum(want.values()) == pytest.approx(v(frozenset(players)), abs=1e-9)
    assert max(abs(got[k] - want[k]) for k in players) < 0.1
    still = make_method("shapley", round_eps=0.1)
    assert set(settled(still.play(["a", "b"], np.random.default_rng(0)), lambda s: 1.0)[0].values()) == {0.0}


def test_values_of_a_round_add_up_and_the_model_is_fedavgs(begin, gap):
    run, plain = begin("shapley", game="exact", round_eps=0.0).go(1), begin("fedavg").go(1)
    assert gap(run.state["theta"], plain.state["theta"]) < 1e-12
    model, rows = run.world.model, run.world.encoded("c0", "public")
    before, after = (run_losses([Losses("x", model, t, None, rows)], Limits())[0].mean
                     for t in (model.initial(), run.state["theta"]))
    assert sum(run.state["worth"].values()) == pytest.approx(before - after, abs=1e-9)
    assert run.up() == plain.up() and run.state["evaluations"] == 16
    assert set(run.method.report(run.state)["rounds_taken_part"].values()) == {1}


def test_shapley_refuses_one_client_and_too_many_coalitions():
    with pytest.raises(RecipeError, match="one client a round"):
        make_method("shapley").check_clients(["a"], 1)
    with pytest.raises(RecipeError, match="with 9 clients a round"):
        make_method("shapley", game="exact").check_clients(list("abcdefghi"), 9)


def test_retraining_is_the_federation_that_never_had_it(begin):
    """Bit for bit what the same rounds come to without the client, and nothing of it is left in the state."""
    run = begin("fed_unlearn", forget="c1", at=2).go(4)
    never = begin("fedavg")
    never.t = 1  # the same rounds: 2 and 3
    never.go(2, ["c0", "c2", "c3"])
    assert digest(run.state["theta"]) == digest(never.state["theta"])


def test_what_was_before_it_first_answered_is_not_come_to_again(begin):
    """It first answers in round 2: retraining takes up there, with the state of the rounds that never had it."""
    run = begin("fed_unlearn", forget="c1", at=3).go(2, ["c0", "c2", "c3"]).go(1)
    never = begin("fedavg").go(2, ["c0", "c2", "c3"])
    never.t = 2
    assert run.state["clean"] == 2 and digest(run.state["start"]) == digest(never.state["theta"])
    assert digest(run.go(1).state["theta"]) == digest(never.go(1, ["c0", "c2", "c3"]).state["theta"])
    assert run.method.report(run.state)["rounds_before_it_answered"] == 2
    eraser = begin("fed_unlearn", forget="c1", at=3, grade="eraser", ratio=0.5, local={"epochs": 2})
    eraser.go(1, ["c0"]).go(2, ["c0", "c1"])
    start, norms = eraser.state["start"], eraser.engine.memory["c0"]["norms"]["1"]  # round 0 needs no calibration
    eraser.go(1, ["c0"])
    moved = {n: float((eraser.state["theta"][n] - x).norm()) for n, x in start.items()}
    assert moved == pytest.approx(norms, abs=1e-9)


def test_calibration_by_the_length_of_the_whole(begin):
    run = begin("fed_unlearn", forget="c1", at=1, grade="eraser", lengths="whole", local={"epochs": 2}).go(1)
    norms = run.engine.memory["c0"]["norms"]["0"]
    start = run.state["start"]
    run.go(1, ["c0"])
    moved = [float((run.state["theta"][n] - x).norm()) for n, x in start.items()]
    assert math.hypot(*moved) == pytest.approx(math.hypot(*norms.values()), abs=1e-9)
    assert moved != pytest.approx(list(norms.values()), abs=1e-6)


def test_calibration_has_the_lengths_of_old_updates(begin):
    run = begin("fed_unlearn", forget="c1", at=2, grade="eraser", ratio=0.5, local={"epochs": 2}).go(2)
    norms = {c: m["norms"]["0"] for c, m in run.engine.memory.items()}
    start = run.state["start"]
    run.go(1, ["c0", "c1"])  # the one that leaves is not asked: the mean is c0's own update
    moved = {n: float((run.state["theta"][n] - x).norm()) for n, x in start.items()}
    assert moved == pytest.approx(norms["c0"], abs=1e-9) and any(v > 0 for v in moved.values())


def test_ascent_stops_at_its_bound(begin):
    """A client whose rows are all past the bound changes nothing."""
    low = begin("fed_unlearn", forget="c1", at=1, grade="ascent", bound=1e-3, sizes=(5, 7)).go(1)
    here = low.state["theta"]
    low.go(1, ["c1"])  # nobody else was drawn: only the ascent happened
    assert all(torch.equal(x, low.state["theta"][n]) for n, x in here.items())
    high = begin("fed_unlearn", forget="c1", at=1, grade="ascent", bound=50.0, sizes=(5, 7)).go(2, ["c1"])
    assert any(not torch.equal(x, high.state["theta"][n]) for n, x in here.items())
    assert not high.engine.memory.get("c1")


def test_nobody_leaves_who_is_not_there_or_never_answered(begin):
    method = make_method("fed_unlearn", forget="c9")
    with pytest.raises(RecipeError, match="forget = 'c9' is not allowed; it must be a client of the federation"):
        method.check_clients(["c0", "c1"], 2)
    with pytest.raises(RecipeError, match="is the only client"):
        make_method("fed_unlearn", forget="c0").check_clients(["c0"], 1)
    run = begin("fed_unlearn", forget="c1", at=1).go(1, ["c0", "c2"])
    with pytest.raises(CompositionError, match="'c1' never answered in rounds 0 to 0: there is nothing"):
        run.go(1)
