"""Profit: FedAvg first, then prompts of one's own between the shared and the tuned one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evidence.rigs.edge import backbone_of
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.program import drive

HERE = {"space": "soft_prompt", "space_knobs": {"length": 3}}


def scores(run):
    return {c: s["loss"] for c, s in drive(run.method.evaluate(run.state, run.world.infos(), "global"),
                                           run.engine).items()}


def test_it_federates_and_then_the_shared_prompt_stays(begin, gap):
    run, plain = begin("profit", federated=2, **HERE), begin("fedavg", **HERE)
    before = backbone_of(run.world.model)
    run.go(2), plain.go(2)
    assert gap(run.state["theta"], plain.state["theta"]) == 0 and not any("v" in m for m in run.engine.memory.values())
    run.go(2)
    assert gap(run.state["theta"], plain.state["theta"]) == 0 and backbone_of(run.world.model) == before
    own = [m["v"] for m in run.engine.memory.values() if "v" in m]
    assert len(own) == 4 and all(gap(v, run.state["theta"]) > 1e-4 for v in own)


def test_the_ends_of_the_share_are_the_two_prompts(begin):
    run = begin("profit", federated=1, **HERE).go(2)
    u, v = run.state["theta"], run.engine.memory["c1"]["v"]
    used = lambda share: replace(run.method, share=share).used(u, v)["prompt_embeddings"]  # noqa: E731
    assert torch.equal(used(0.0), u["prompt_embeddings"]) and torch.equal(used(1.0), v["prompt_embeddings"])
    assert torch.allclose(used(0.5), (u["prompt_embeddings"] + v["prompt_embeddings"]) / 2, atol=1e-7)
    at = {share: scores(begin("profit", federated=1, share=share, **HERE).go(2)) for share in (0.0, 1.0)}
    assert at[0.0] == scores(begin("fedavg", **HERE).go(1)) != at[1.0]


def test_a_strong_spring_and_a_low_rate_stay_near(begin, gap):
    far, near, slow = (begin("profit", federated=1, **k, **HERE).go(2) for k in (
        {}, {"lam": 9.0}, {"rate": 0.01}))  # SGD at 0.1: lam below 2 / lr, or it swings
    moved = [gap(r.engine.memory["c3"]["v"], r.state["theta"]) for r in (far, near, slow)]
    assert moved[1] < moved[0] and 0 < moved[2] < 0.05 * moved[0]


def test_what_cannot_be_is_refused(begin):
    with pytest.raises(CompositionError, match="'profit' and space 'lora' do not fit together"):
        begin("profit")
    with pytest.raises(RecipeError, match=r"Profit.share = 1.5 is not allowed"):
        begin("profit", share=1.5, **HERE)
