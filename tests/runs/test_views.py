"""Views of clients' own tests: what all share, the client's own part, the nearest client's."""

import json
import os
import random

import pytest

import fedllm
from fedllm.report.facts import views
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe
from fedllm.runs.views import nearest


@pytest.fixture
def camps(tmp_path, recipe):
    """Four clients: two that only say red, two that only say blue, and each camp learns another answer."""
    draw, rows = random.Random(0), []
    for who, color, answer in (("a", "red", "cat"), ("b", "red", "cat"), ("c", "blue", "dog"), ("d", "blue", "dog")):
        for _ in range(20):
            said = f"say {color} {draw.choice(['one', 'two', 'three'])}"
            rows.append({"prompt": said, "response": answer, "who": who})
    (tmp_path / "camps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"name": "camps", "model": {"name": recipe["model"], "fast_kernels": False}, "rounds": 3,
            "local": {"lr": 0.02, "steps": 6, "batch_size": 8, "max_length": 16}, "space": {"name": "lora", "rank": 4},
            "data": {"source": str(tmp_path / "camps.jsonl"), "partition": {"kind": "by_key", "key": "who"},
                     "client_test": 0.3, "test": 0.1},
            "evaluate": {"exact_match": False, "samples": 0, "baselines": ["local_only"]}}


def loss(figures):
    return sum(m["loss"] for m in figures.values()) / len(figures)


def test_a_part_of_ones_own_is_told_beside_what_all_share_and_the_nearest(camps, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0})  # the baseline runs in this process
    run = fedllm.run(camps, root=tmp_path, method="fedsa_lora")
    own = run.evaluation["views"]
    assert own["whose"] == {"a": "b", "b": "a", "c": "d", "d": "c"}
    personal = run.evaluation["clients"]
    assert own["global"].keys() == own["nearest"].keys() == personal.keys()
    # B = 0 without a part of one's own: the base model; the camp's other half has learned the same answer
    assert own["global"] == run.evaluation["before"]["clients"]
    assert max(loss(personal), loss(own["nearest"])) < loss(own["global"]) - 0.5
    assert own["nearest"] != personal
    assert list(views(run)) == ["before", "local only", "global", "nearest", "personal"]
    page = run.report_path.read_text()
    assert all(f"<th>{name}</th>" in page for name in ("global", "nearest", "personal", "local only"))
    assert "keeps no part of the model at clients" not in page
    told = json.loads((run.folder / "result.json").read_text())
    assert told["evaluation"]["views"]["whose"]["a"] == "b"
    assert fedllm.Result.load(run.folder).evaluation == told["evaluation"]


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_methods_whose_clients_use_the_one_model_have_no_other_view(method, camps, tmp_path):
    local = camps["local"] | {"optimizer": "sgd"}
    run = fedllm.run(camps | {"local": local, "rounds": 1, "evaluate": {"exact_match": False, "samples": 0}},
                     root=tmp_path, method=method)
    assert "views" not in run.evaluation and list(views(run)) == ["before", "global"]
    assert "keeps no part of the model at clients" in run.report_path.read_text()


def test_the_nearest_has_a_part_and_a_model_of_the_same_kind(camps):
    space = {"name": "lora", "rank": 4, "scaling": "shared"}
    world = build(load_recipe(camps | {"clients": {"ranks": [2, 4, 4, 4]}, "method": "hetlora", "space": space})).world
    found = nearest(world, ["a", "b", "c", "d"])
    assert found.keys() == {"b", "c", "d"} and found["b"] in "cd" and found["c"] == "d"  # a's rank is nobody's
    assert nearest(world, ["d"]) == {"b": "d", "c": "d"}
    assert nearest(world, []) == {}
