"""Zeroth-order methods: replays, probabilities, rates, and what they must refuse."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.payload import tensor_bytes
from fedllm.local.perturb import Directions, flat
from fedllm.methods.efficiency.fedkseed_pro import Histories, checked, probabilities
from fedllm.methods.efficiency.fedmezo import personal
from fedllm.methods.registry import make_method

PRO = {"space": "full", "K": 16, "steps": 5, "lr": 1e-2, "eps": 1e-3}
MEZO = {"steps": 4, "lr": 1e-2, "delta": 5e-3}


def test_probabilities_follow_the_closed_form_and_begin_uniform(begin):
    """Psi_j is the mean over the history with its first 0; p = softmax((Psi - min) / (max - min))."""
    history = {0: [3.0, -1.0], 1: [], 2: [-5000.0], 3: [0.5, 0.5, 0.5]}
    size = torch.tensor([sum(min(abs(g), 1000) for g in history[j]) for j in range(4)])
    count = torch.tensor([1.0 + len(history[j]) for j in range(4)])
    psi = [4 / 3, 0.0, 500.0, 1.5 / 4]
    scaled = [x / (500 + 1e-10) for x in psi]
    want = [math.exp(x) / sum(math.exp(y) for y in scaled) for x in scaled]
    assert probabilities(size / count).tolist() == pytest.approx(want, abs=1e-7)  # fp32 histories
    exact = probabilities(torch.tensor(psi, dtype=torch.float64))
    assert exact.tolist() == pytest.approx(want, abs=1e-12)
    run = begin("fedkseed_pro", **PRO)
    assert run.method.down(run.state, None)["p"].tolist() == [1 / 16] * 16
    run.go()
    p = run.method.down(run.state, None)["p"]
    assert len(p.unique()) > 5 and 1 < float(p.max() / p.min()) <= math.e + 1e-5


def test_histories_count_sizes_not_sums():
    reply = {"K": 4, "at": torch.tensor([1, 1, 3]).int(), "g": torch.tensor([2.0, -2.0, 5000.0]), "n": 3, "loss": 1.0}
    fold = Histories(1000.0)
    told = fold.done(fold.add(fold.add({}, reply), {**reply, "n": 1}))
    assert told["G"].tolist() == [0, 0, 0, 5000] and told["size"].tolist() == [0, 8, 0, 2000]
    assert told["count"].tolist() == [0, 4, 0, 2] and told["clipped"] == 2


def test_pro_sends_four_bytes_a_seed_more_than_fedkseed(begin):
    one, other = (begin(name, **PRO) for name in ("fedkseed", "fedkseed_pro"))
    down = [tensor_bytes(run.method.down(run.state, None)) for run in (one, other)]
    assert down[1] - down[0] == 4 * 16


@pytest.mark.parametrize("p", [[0.5, 0.6], [-0.1, 1.1], [1.0], [math.nan, 1.0]])
def test_probabilities_that_are_none_are_refused(p):
    with pytest.raises(PayloadError, match="'p' must be 2 numbers"):
        checked(torch.tensor(p), 2)


def test_scalars_tell_what_weights_tell(begin, gap):
    """sum_k p_k w_k = w - sum_k p_k eta_k sum_t g_kt z_kt, to 1e-5 in fp32."""
    runs = [begin("fedmezo", **MEZO, up=up, dtype=torch.float32).go(2) for up in ("weights", "scalars")]
    assert gap(*(run.state["theta"] for run in runs)) < 1e-5
    start = runs[0].world.model.initial()
    assert gap(runs[0].state["theta"], start) > 1e-3
    assert runs[1].up() < 0.2 * runs[0].up()


def test_the_estimate_points_along_the_gradient():
    """The mean over 2,000 directions of g z has a cosine of at least 0.9 with the gradient, for 400 weights."""
    torch.manual_seed(0)
    a, w = torch.randn(400, 400, dtype=torch.float64), torch.randn(400, dtype=torch.float64)
    loss = lambda v: 0.5 * (a @ v).pow(2).mean() + v.cos().sum()  # noqa: E731
    gradient = a.T @ (a @ w) / 400 - w.sin()
    for law in ("gaussian", "rademacher"):
        z, mean = Directions(1, 400, law), torch.zeros(400, dtype=torch.float64)
        for j in range(2000):
            along = z.direction(j).double()
            mean += (loss(w + 1e-3 * along) - loss(w - 1e-3 * along)) / 2e-3 * along / 2000
        assert float(torch.cosine_similarity(mean, gradient, 0)) >= 0.9


def test_rates_follow_the_rule():
    """eta_k = eta + delta (s_k - mean) / max |s_j - mean|."""
    rates = personal(1e-2, 5e-3, {"a": 1.0, "b": 2.0, "c": 6.0})  # mean 3, farthest 3
    assert rates == pytest.approx({"a": 1e-2 - 5e-3 * 2 / 3, "b": 1e-2 - 5e-3 / 3, "c": 1.5e-2})
    assert abs(sum(rates.values()) / 3 - 1e-2) <= 5e-3 and min(rates.values()) > 0
    assert personal(1e-2, 5e-3, {"a": 2.0, "b": 2.0}) == {"a": 1e-2, "b": 1e-2}
    assert personal(1e-2, 5e-3, {}) == {}


@pytest.mark.parametrize("rates", ["round", "five", "diff", "random", "frozen"])
def test_every_rule_for_rates_runs(begin, rates):
    run = begin("fedmezo", **MEZO, rates=rates).go(3)
    kept = {len(seen) for seen in run.state["seen"].values()}
    assert kept == {"five": {3}, "random": set(), "frozen": set()}.get(rates, {1})
    assert all(torch.isfinite(x).all() for x in run.state["theta"].values())


def test_weight_decay_moves_matrices_alone(begin):
    run = begin("fedmezo", **{**MEZO, "lr": 1e-9, "delta": 0.0}, space="full", local={"weight_decay": 1e7}).go()
    start, end = run.world.model.initial(), run.state["theta"]
    norm, matrix = (next(n for n in start if (start[n].dim() > 1) == wide) for wide in (False, True))
    assert torch.allclose(end[norm], start[norm], atol=1e-6)
    assert torch.allclose(end[matrix], start[matrix] * 0.99**4, atol=1e-6)
    with pytest.raises(CompositionError, match="weight_decay = 0"):
        begin("fedmezo", **MEZO, up="scalars", local={"weight_decay": 0.1}).go()


@pytest.mark.parametrize("name, knobs", [
    ("fedkseed", {"K": 0}), ("fedkseed_pro", {"K": 0}), ("fedkseed_pro", {"clip": 0.0}),
    ("fedkseed", {"law": "cauchy"}),
    ("fedmezo", {"lr": 1e-5, "delta": 1e-5}), ("fedmezo", {"steps": 0}), ("fedmezo", {"rates": "three"})])
def test_bad_knobs_are_refused(name, knobs):
    with pytest.raises(RecipeError, match="is not allowed; it must be"):
        make_method(name, **knobs)


def test_a_step_is_one_forward_for_all_clients(begin, monkeypatch):
    """Four clients, two points each: eight lanes of one forward."""
    run = begin("fedmezo", **MEZO)
    seen, losses = [], run.world.model.row_losses
    monkeypatch.setattr(run.world.model, "row_losses", lambda batch: seen.append(batch.k) or losses(batch))
    run.go()
    assert max(seen) == 8 and len(seen) <= 4 * 4  # a step's rows of unequal count end in smaller rectangles
    assert len(flat(run.state["theta"])) > 100
