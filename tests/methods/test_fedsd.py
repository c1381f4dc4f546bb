"""Rewritten answers: FedSD, FedSDR."""

from __future__ import annotations

import pytest

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.payload import part

LORA = {"name": "lora", "rank": 4}
TWO = {"space": "streams", "space_knobs": {"of": {"rect": LORA, "smooth": LORA}, "personal": ("smooth",)}}


def test_without_a_rewriter_fedsd_is_fedit(begin, gap):
    assert gap(begin("fedsd", rewriter="identity").go(2).state["theta"], begin("fedit").go(2).state["theta"]) == 0


def test_without_smoothing_fedsdr_is_fedit(begin, gap):
    ours = begin("fedsdr", smooth_share=0.0, **TWO).go(2)
    assert not any("smooth" in m for m in ours.engine.memory.values())
    assert gap(ours.state["theta"], begin("fedit").go(2).state["theta"]) < 1e-12


def test_each_stream_rests_while_the_other_learns(begin, gap):
    run = begin("fedsdr", rewriter="identity", local={"steps": 4}, **TWO).go(1)
    smooth = {c: m["smooth"] for c, m in run.engine.memory.items()}
    assert all(any(bool(x.any()) for n, x in s.items() if "lora_B" in n) for s in smooth.values())
    assert all("smooth" not in n for n in run.state["theta"])
    told = run.method.down(run.state, run.world.infos()[0])
    assert part(told, "theta").keys() == run.state["theta"].keys()
    kept = begin("fedsdr", rewriter="identity", smooth_share=0.5, local={"steps": 4}, reset=True, **TWO).go(1)
    assert gap(kept.state["theta"], run.state["theta"]) == 0  # the first round is the same, with reset or without


def test_rewrites_are_made_once_and_too_long_ones_are_not_taken(begin):
    run = begin("fedsd", max_new_tokens=4, longest=0.01).go(1)
    rows = run.world.federation.clients["c0"].train
    assert run.engine.memory["c0"]["rewritten"] == [r["response"] for r in rows]
    free = begin("fedsd", max_new_tokens=4, longest=100.0).go(1)
    first = free.engine.memory["c0"]["rewritten"]
    assert len(first) == len(rows) and free.go(1).engine.memory["c0"]["rewritten"] == first


def test_what_they_need(begin):
    with pytest.raises(CompositionError, match=r"use data.task = 'generation'"):
        begin("fedsd", task="classification")
    with pytest.raises(CompositionError, match="two streams of which smooth is personal"):
        begin("fedsdr")
    with pytest.raises(DataError, match="row 1 has no text in 'rewritten'"):
        begin("fedsd", rewriter="field").go(1)
