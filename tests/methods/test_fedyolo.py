"""A module a task: with one task it is FedAvg, with several no task touches another's, and the backbone never moves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from evidence.rigs.edge import backbone_of
from fedllm import run
from fedllm.core.client import Profile
from fedllm.core.errors import CompositionError, DataError, QuorumError
from fedllm.core.payload import tensor_bytes
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard


def tasked(begin, owners, **options):
    """The tiny federation with every client's rows marked by the tasks that it holds, in turn."""
    made = begin("fedyolo", **options)
    mark = lambda rows, held: [{**r, "category": held[i % len(held)]} for i, r in enumerate(rows)]  # noqa: E731
    shards = {c: Shard(mark(s.train, owners[c]), mark(s.test, owners[c]))
              for c, s in made.world.federation.clients.items()}
    test = mark(made.world.federation.test, ["x", "y"])
    made.world.federation = Federation(shards, test, "generation")
    return made


OWNERS = {"c0": "x", "c1": "xy", "c2": "y", "c3": "y"}


def test_one_task_is_fedavg(begin, gap):
    yolo, plain = begin("fedyolo").go(2), begin("fedavg").go(2)
    assert list(yolo.state["modules"]) == [""] and gap(yolo.state["modules"][""], plain.state["theta"]) == 0


def test_a_tasks_module_is_that_of_a_federation_of_its_own_clients(begin, gap):
    both = tasked(begin, {"c0": "x", "c1": "x", "c2": "y", "c3": "y"}).go(2)
    alone = tasked(begin, {"c0": "x", "c1": "x", "c2": "y", "c3": "y"}).go(2, ["c0", "c1"])
    assert gap(both.state["modules"]["x"], alone.state["modules"]["x"]) < 1e-12
    assert list(alone.state["modules"]) == ["x"] and set(both.state["modules"]) == {"x", "y"}


def test_other_tasks_and_the_backbone_stay_to_the_last_bit(begin, gap):
    made = tasked(begin, OWNERS)
    before = backbone_of(made.world.model)
    kept = made.go(2).state["modules"]["x"]
    made.go(2, ["c2", "c3"])
    assert gap(made.state["modules"]["x"], kept) == 0 and backbone_of(made.world.model) == before


def test_engines_agree_with_a_client_that_holds_two_tasks(begin, gap):
    one, other = (tasked(begin, OWNERS, engine=e).go(2) for e in ("in_process", "vectorized"))
    for task in "xy":
        assert gap(one.state["modules"][task], other.state["modules"][task]) < 1e-10
    scores = [drive(r.method.evaluate(r.state, r.world.infos(), "local"), r.engine) for r in (one, other)]
    assert all(scores[0][c]["loss"] == pytest.approx(scores[1][c]["loss"], abs=1e-10) for c in OWNERS)


def test_a_client_is_sent_the_modules_of_its_own_tasks_and_nothing_else(begin):
    made = tasked(begin, OWNERS).go(2)
    size = tensor_bytes(made.state["first"])
    sent = [e for e in made.engine.record.events if e["kind"] == "wire" and e["round"] == 1]
    for c, held in OWNERS.items():
        for way in ("down", "up"):
            mine = [e["bytes"] for e in sent if e["client"] == c and e["direction"] == way]
            assert len(mine) == len(held) and all(size < b < 1.6 * size for b in mine)
    assert made.state["holds"] == {c: list(held) for c, held in OWNERS.items()}
    asked = [e for e in made.engine.record.events if e["kind"] == "wire" and "enroll" in e["phase"]]
    assert {e["round"] for e in asked} == {0} and len(asked) == 4


def test_every_client_is_tested_on_its_own_tasks(begin):
    made = tasked(begin, OWNERS).go(1)
    got = drive(made.method.evaluate(made.state, made.world.infos(), "global"), made.engine)
    assert [got[c]["n"] for c in OWNERS] == [2, 4, 2, 2]
    assert got["c2"]["loss"] == got["c3"]["loss"] != got["c0"]["loss"]
    assert got["c1"]["loss"] == pytest.approx((got["c0"]["loss"] + got["c2"]["loss"]) / 2, abs=0.5)
    fresh = tasked(begin, OWNERS)
    assert drive(fresh.method.evaluate(fresh.state, fresh.world.infos(), "local"), fresh.engine)["c1"]["n"] == 2


def test_a_task_of_which_nobody_answers_waits_and_a_round_without_any_answer_does_not_count(begin, gap):
    made = tasked(begin, OWNERS).go(1)
    kept = made.state["modules"]["x"]
    never = Profile(availability=0.0)
    for c in ("c0", "c1"):
        made.engine.infos[c] = replace(made.engine.infos[c], profile=never)
    made.go(1)
    assert gap(made.state["modules"]["x"], kept) == 0
    for c in ("c2", "c3"):
        made.engine.infos[c] = replace(made.engine.infos[c], profile=never)
    with pytest.raises(QuorumError, match="none of 4 clients answered for any of their tasks"):
        made.go(1)


def test_bad_input_is_named(begin):
    made = tasked(begin, OWNERS)
    rows = made.world.federation.clients["c1"].train
    del rows[3]["category"]
    with pytest.raises(DataError, match=r"client 'c1' holds 1 rows without a 'category' beside rows of the tasks "):
        made.go(1)
    made = begin("fedavg", space="full")
    with pytest.raises(CompositionError, match="the space 'full' trains it, so they do not fit together"):
        begin("fedyolo").method.check(made.world.model)


def test_a_run_leaves_a_module_for_each_task(tmp_path, tiny_llama_folder):
    rows = [{"prompt": f"say {w}", "response": w, "category": t} for w, t in
            [("red", "color"), ("green", "color"), ("cat", "animal"), ("dog", "animal")] * 6]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run({"name": "yolo", "model": tiny_llama_folder, "rounds": 2, "method": "fedyolo", "local": {"lr": 0.02},
                "data": {"source": str(source), "partition": {"kind": "iid", "clients": 3}, "client_test": 0.2},
                "evaluate": {"max_new_tokens": 3}}, root=tmp_path)
    assert {p.name for p in (done.folder / "modules").iterdir()} == {"animal", "color"}
    assert (done.folder / "modules" / "color" / "adapter_config.json").is_file()
    assert done.evaluation["global"]["n"] and "module for each task" in (done.folder / "model_card.md").read_text()
