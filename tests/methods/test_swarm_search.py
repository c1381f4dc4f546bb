"""Particle swarm over adapters: the best never gets worse, vectors travel only where they must."""

from __future__ import annotations

import pytest

from fedllm.core.errors import PayloadError, RecipeError
from fedllm.methods.registry import make_method
from fedllm.methods.topology.swarm_search import SwarmSearch

LOCAL = {"local": {"steps": 2}}


def test_the_best_never_gets_worse_and_vectors_travel_only_then(begin):
    run, f = begin("swarm_search", **LOCAL), []
    for t in range(6):
        before = run.state["at"]
        run.go(1)
        f.append(run.state["f"]["best"])
        wire = [e for e in run.engine.record.events if e["kind"] == "wire" and e["round"] == t]
        shown = [e for e in wire if "show" in e["phase"] and e["direction"] == "up"]
        assert len(shown) == sum(run.state["at"][e] != before[e] for e in before)
        large = [e for e in wire if "move" in e["phase"] and e["direction"] == "up" and e["bytes"] > 400]
        assert not large
    assert f == sorted(f, reverse=True) and f[-1] < f[0]


def test_one_move_is_the_papers_formula(begin):
    """Only the pull towards the swarm's best: x + step (g - x) is g itself at step 1."""
    run = begin("swarm_search", inertia=0.0, cognitive=0.0, repel=0.0, start="zero", step_factor=1.0, **LOCAL).go(1)
    best = dict(run.state["best"])
    run.go(1)
    for memory in run.engine.memory.values():
        assert all(abs(float((memory["x"][n] - t).abs().max())) < 1e-12 for n, t in best.items())


def test_the_search_rests_after_its_patience(begin):
    run = begin("swarm_search", inertia=1.0, cognitive=0.0, social=0.0, repel=0.0, start="zero", patience=2, **LOCAL)
    run.go(5)  # nobody moves
    assert run.state["round"] == 3 and run.state["waited"] == 2


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(RecipeError, match="are all 0, so that no particle would move"):
        make_method("swarm_search", inertia=0.0, cognitive=0.0, social=0.0, repel=0.0)
    with pytest.raises(PayloadError, match="other names or shapes"):
        SwarmSearch.show.__dict__["fits"](SwarmSearch(), {"like/w": [2, 2]}, {})
