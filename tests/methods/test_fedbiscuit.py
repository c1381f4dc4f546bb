"""Judges of preferences: balanced groups, and what a pair looks like to one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.methods._judges import grouped, shown
from fedllm.methods.registry import make_method
from fedllm.tasks.registry import task_of
from fedllm.tasks.task import Shape

TASK = {"task": "preference", "choices": ("w1", "w2")}


def test_groups_are_balanced_and_everybody_has_one():
    """On 20 random tables: the j-th judge to choose has at most ceil(left / judges left) clients."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, u = int(rng.integers(3, 12)), int(rng.integers(1, 4))
        losses = {f"c{k}": list(rng.random(u)) for k in range(n)}
        of = grouped(losses, u)
        assert of.keys() == losses.keys() and set(of.values()) <= set(range(u))
        assert max(sum(g == k for g in of.values()) for k in range(u)) <= math.ceil(n / u) + u
        if u == 1:
            assert set(of.values()) == {0}
    assert grouped({"a": [0.1, 0.9], "b": [0.2, 0.8], "c": [0.3, 0.4], "d": [0.9, 0.1]}, 2) == {
        "a": 0, "b": 0, "c": 1, "d": 1}  # c likes judge 0 too, and two are enough there


def test_a_pair_is_shown_both_ways_round(begin):
    run = begin("fedbiscuit", **TASK)
    seen = {}

    class Reader:
        def encode(self, rows):
            seen["rows"] = rows
            return run.world.encoded("c0", "train")[:1] * len(rows)

    row = run.world.federation.clients["c0"].train[0]
    _, right = shown(Reader(), [row], ("w1", "w2"))
    first, second = seen["rows"]
    assert right == [0, 1] and first["chosen"] == "w1" and second["chosen"] == "w2"
    assert first["prompt"].index(row["chosen"]) and first["prompt"] != second["prompt"]


def test_each_group_trains_its_own_judge(begin, gap):
    run = begin("fedbiscuit", groups=2, warmup=2, regroup=1, **TASK)
    first = run.state["judges"]["1"]
    run.go(1)
    assert gap(run.state["judges"]["1"], first) == 0 and gap(run.state["judges"]["0"], first) > 0  # turns
    run.go(2)
    assert sorted(run.state["of"].values()) == [0, 0, 1, 1] and not run.method.serves
    assert set(run.method.modules(run.state)) == {"judge-0", "judge-1"}
    one = begin("fedbiscuit", **TASK)
    assert one.method.serves and set(one.go(1).state["of"]) == set()


def test_personal_dpo_without_an_own_stream_is_dpo(begin, gap):
    lora = {"name": "lora", "rank": 4}
    two = {"space": "streams", "space_knobs": {"of": {"shared": lora, "own": lora}, "personal": ("own",)}}
    ours = begin("fed_dpo_personal", task="preference", train="shared", **two).go(2)
    plain = begin("fed_dpo", task="preference").go(2)
    assert gap(ours.state["theta"], plain.state["theta"]) < 1e-9
    both = begin("fed_dpo_personal", task="preference", **two).go(1)
    assert any(bool(x.any()) for n, x in both.engine.memory["c0"]["own"].items() if "lora_B" in n)
    assert all(not n.startswith("own") for n in both.state["theta"])
    with pytest.raises(CompositionError, match=r"personal: \[own\]"):
        begin("fed_dpo_personal", task="preference")


def test_what_it_refuses(begin):
    with pytest.raises(CompositionError, match=r"use data.task = 'preference'"):
        begin("fedbiscuit")
    with pytest.raises(RecipeError, match="it must be two words"):
        begin("fedbiscuit", task="preference", choices=("w1", "w1"))
    with pytest.raises(RecipeError, match="groups = 3 is not allowed with 2 clients"):
        make_method("fedbiscuit", groups=3).check_clients(["a", "b"], 2)
    row = {"prompt": "p", "chosen": "same", "rejected": "same"}
    with pytest.raises(DataError, match="nothing is preferred"):  # a preference row whose answers are equal
        task_of("preference").shape(row, "row 1", Shape(lambda r, w: r))
