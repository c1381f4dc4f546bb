"""Black-box methods: the search against pycma, a model that answers and nothing else, the ledger and its budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedllm.core.errors import BudgetSpent, CompositionError, ModelError, RecipeError
from fedllm.core.payload import tensor_bytes
from fedllm.local.evolve import Search, constants, rank_weights
from fedllm.methods.registry import make_method
from fedllm.models.sealed import sealed

BPT = {"space": "soft_prompt", "intrinsic_dim": 6, "popsize": 4, "local_iter": 2}


def test_updates_equal_pycmas(monkeypatch):
    """Three `tell`s of pycma with the same weights, constants, step size and injected samples, to 1e-8."""
    cma = pytest.importorskip("cma")
    exact = lambda d: 2**0.5 * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))  # noqa: E731
    monkeypatch.setattr(cma.utilities.math.Mh, "chiN", staticmethod(exact))  # pycma approximates it to 5e-5
    q, n, rng = 12, 10, np.random.default_rng(0)
    w = rank_weights(n, n)
    assert w[:3] == pytest.approx([0.28, 0.197, 0.149], abs=2e-3) and 1 / (w**2).sum() == pytest.approx(5.94, abs=0.01)
    es = cma.CMAEvolutionStrategy(np.zeros(q), 0.7, {
        "popsize": n, "CMA_mu": n, "CMA_active": False, "verbose": -9, "CMA_diagonal": 0,
        "CSA_dampfac": 1, "updatecovwait": 0})
    assert es.sp.weights.positive_weights == pytest.approx(w, abs=1e-12)
    cs, cc, c1, cmu, damps = constants(q, 1 / float((w**2).sum()))
    s = Search.start(np.zeros(q), 0.7, es.sm.C.copy())  # which pycma begins 1e-4 off the identity
    for _ in range(3):
        es.ask()
        es.adapt_sigma.initialize(es)
        es.adapt_sigma.cs, es.adapt_sigma.damps, es.sp.cc = cs, damps, cc
        es.sm.parameters = lambda *a, **k: {"c1": c1, "cmu": cmu}
        points = es.mean + 0.5 * rng.normal(size=(n, q))
        fit = (points**2).sum(1)
        s = s.tell(s.clipped(points), fit.tolist(), w)
        es.tell(list(points), fit.tolist())
        assert np.allclose(s.mean, es.mean, atol=1e-8)
        assert s.sigma == pytest.approx(es.sigma, abs=1e-8)
        assert np.allclose(s.C, es.sm.C, atol=1e-8)


def test_the_search_finds_a_minimum():
    rng, s, w = np.random.default_rng(1), Search.start(np.full(8, 3.0), 1.0), rank_weights(10, 5)
    scales = np.logspace(0, 2, 8)
    for _ in range(300):
        z = s.ask(rng, 10)
        s = s.tell(z, (scales * z**2).sum(1).tolist(), w)
    assert float((scales * s.mean**2).sum()) < 1e-8


def test_a_sealed_model_answers_and_shows_nothing(begin):
    run = begin("fedbpt", **BPT)
    box = sealed(run.world.model)
    for name in ("net", "parameters", "losses", "hidden", "stack"):
        with pytest.raises(ModelError, match=f"'{name}' cannot be reached"):
            getattr(box, name)
    assert sealed(run.world.model) is box
    with pytest.raises(ModelError, match="nothing can be added"), box.using([{}], {"w": torch.ones(1)}):
        pass


def test_fedbpt_needs_no_weights_and_counts_every_call(begin, monkeypatch):
    run, rows = begin("fedbpt", **BPT), []
    original = run.world.model.row_losses

    def counted(batch):
        assert torch.is_inference_mode_enabled()
        got = original(batch)
        rows.append(int((got[1] > 0).sum()))  # rows that only fill the rectangle count nothing
        return got

    monkeypatch.setattr(run.world.model, "row_losses", counted)
    run.go(2)
    assert run.state["queries"]["calls"] == sum(rows) == 2 * 33 * (2 * 4 + 1) * 2
    assert run.method.report(run.state)["queries"]["read"] > 0


def test_fedbpt_sends_q_plus_2_numbers_up(begin):
    from fedllm.core.ask import Ask
    from fedllm.core.program import drive

    run = begin("fedbpt", **BPT)
    ask = Ask(run.method.local, {c.id: run.method.down(run.state, c) for c in run.world.infos()})
    out = drive((lambda: (yield ask))(), run.engine)
    assert {tensor_bytes(out[c]) for c in out} == {4 * (6 + 2)}


def test_a_round_beyond_the_budget_does_not_begin(begin):
    run = begin("fedbpt", **BPT, budget=700).go()
    with pytest.raises(BudgetSpent, match="594 of the budget of 700 are spent"):
        run.go()
    assert run.state["queries"]["calls"] == 594


@pytest.mark.parametrize("knobs", [{"popsize": 3}, {"intrinsic_dim": 1}, {"perturb_rate": 0.0}, {"budget": 0},
                                   {"local_iter": 0}, {"sigma0": 0.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match="is not allowed; it must be"):
        make_method("fedbpt", **knobs)


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(CompositionError, match="soft_prompt"):
        begin("fedbpt")
    with pytest.raises(CompositionError, match="must be <= 256"):
        begin("fedbpt", **{**BPT, "intrinsic_dim": 257})
