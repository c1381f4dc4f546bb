"""A client is taken out of a finished run: the others' model, bit for bit, and no more is asked than must be."""

import json
import random

import pytest
from typer.testing import CliRunner

import fedllm
from fedllm.audits.left import left
from fedllm.cli.main import app
from fedllm.core.errors import CompositionError, RecipeError, RunError
from fedllm.runs.without import remove
from tests.conftest import WORDS


@pytest.fixture
def sources(tmp_path):
    """The same rows with a client each, all of them, and all but those of c1."""
    rng = random.Random(0)
    rows = [{"prompt": " ".join(rng.sample(WORDS, 4)) + " ", "response": rng.choice(WORDS), "who": f"c{i % 4}"}
            for i in range(96)]
    paths = {"all": tmp_path / "all.jsonl", "less": tmp_path / "less.jsonl", "test": tmp_path / "test.jsonl"}
    for name, path in paths.items():
        some = {"all": rows[:64], "less": [r for r in rows[:64] if r["who"] != "c1"], "test": rows[64:]}[name]
        path.write_text("".join(json.dumps(r) + "\n" for r in some))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def begin(tiny_llama_folder, tmp_path, sources):
    """Run three rounds of all clients, or of all but c1."""

    def go(which="all", **more):
        return fedllm.run({
            "name": "r", "model": tiny_llama_folder, "rounds": 3, "local": {"lr": 0.02, "steps": 1, "optimizer": "sgd"},
            "engine": "in_process", "record": {"replies": True, "keep_rounds": True},
            "data": {"source": sources[which], "test": sources["test"], "client_test": 0.0,
                     "partition": {"kind": "by_key", "key": "who"}},
            "evaluate": {"exact_match": False, "samples": 0, "clients": False}, **more}, root=tmp_path / "runs")

    return go


@pytest.mark.parametrize("more, keep, taken", [
    ({}, False, 3), ({"method": "scaffold"}, True, 3), ({"method": "scaffold"}, False, 0),
    ({"layers": ["codec_topk_ef"]}, True, 3), ({"method": "local_only"}, True, 9)])
def test_it_is_the_run_that_never_had_the_client(begin, more, keep, taken):
    """What clients remember is known where every checkpoint was kept; else who remembers is asked from the start."""
    record = {"record": {"replies": True, "keep_rounds": keep}}
    never, run = begin("less", **more), begin(**more, **record)
    done = fedllm.remove(run.folder, "c1")
    assert done.state_digest == never.state_digest and _memories(done) == _memories(never)
    assert (done.taken, done.asked) == (taken, 9 - taken)
    if run.method != "local_only":
        assert done.state_digest != run.state_digest


def cohorts_of(run):
    events = map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
    return [e["cohort"] for e in events if e["kind"] == "round"]


def _memories(run):
    return {p.parent.name: p.read_bytes() for p in run.folder.glob("clients/*/memory.safetensors")}


def test_rounds_before_it_came_are_not_asked_again(begin):
    run = begin(clients={"per_round": 2}, rounds=4)
    cohorts = cohorts_of(run)
    late = next(c for c in ("c0", "c1", "c2", "c3") if c not in cohorts[0] and any(c in k for k in cohorts))
    first = next(i for i, k in enumerate(cohorts) if late in k)
    done = remove(run.folder, late)
    assert done.first == first >= 1 and done.taken == 2 * first + 1
    assert done.asked == sum(len(set(k) - {late}) for k in cohorts[first + 1:])
    assert done.bytes["up"] == done.asked * run.bytes["up"] / sum(map(len, cohorts))


def test_what_is_left_of_it_is_tested_and_listed(begin, sources):
    data = {"source": sources["all"], "test": sources["test"], "partition": {"kind": "by_key", "key": "who"},
            "client_test": 0.2, "canaries": 8, "canary_copies": 2}
    run = begin(data=data, rounds=3, local={"lr": 0.01, "steps": 40, "batch_size": 8}, engine="vectorized")
    said = CliRunner().invoke(app, ["replay", str(run.folder), "--without", "c1"])
    assert said.exit_code == 0, said.output
    assert "replies from the record" in said.output and "cannot be recalled" in said.output
    kept = json.loads((run.folder / "without-c1" / "removed.json").read_text())
    tests = kept["tests"]
    assert tests["with"]["loss"] < tests["without"]["loss"] and tests["with"]["auc"] > tests["without"]["auc"]
    assert tests["with"]["exposure"] > tests["without"]["exposure"] + 0.3
    assert {"replies", "checkpoints", "adapter"} <= set(kept["still_held_in_the_run"])
    assert (run.folder / "without-c1" / "adapter" / "adapter_model.safetensors").exists()


def test_who_cannot_leave_is_refused(begin, tmp_path):
    run = begin(rounds=1)
    with pytest.raises(RecipeError, match="client = 'c9' is not allowed; it must be a client of the run: c0, c1"):
        remove(run.folder, "c9")
    away = begin(rounds=1, clients={"per_round": 1})
    idle = next(c for c in ("c0", "c1") if c not in cohorts_of(away)[0])
    with pytest.raises(RunError, match=f"client = '{idle}' never answered in rounds 0 to 0: there is nothing of it"):
        remove(away.folder, idle)
    alone = begin(rounds=1, data={"source": away_rows(tmp_path), "partition": {"kind": "iid", "clients": 1},
                                  "test": 0.0})
    with pytest.raises(RecipeError, match="is the only client; nobody would be left"):
        remove(alone.folder, json.loads((alone.folder / "clients.json").read_text())[0]["id"])


def away_rows(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say ", "response": w}) + "\n" for w in ("red", "blue", "green")))
    return str(path)


@pytest.mark.parametrize("more, why", [
    ({"record": {"replies": False}}, "kept no replies"),
    ({"layers": [{"name": "dp_fedavg", "noise_multiplier": 1.0, "clip_norm": 1.0}]}, "cannot be folded without one"),
    ({"select": "power_of_choice", "clients": {"per_round": 2}}, "select.name = 'power_of_choice'"),
    ({"evaluate": {"every": 1, "keep_best": True}}, "keep_best: which round was the best hung"),
    ({"clients": {"step_seconds": 1.0}}, "step_seconds = 1"),
    ({"method": "gossip"}, "seal letters")])
def test_runs_that_cannot_be_gone_through_again(begin, more, why):
    run = begin(rounds=1, **more)
    with pytest.raises((RunError, CompositionError), match=why):
        remove(run.folder, "c1")


def test_rows_that_changed_since_are_noticed(begin, sources):
    run = begin(rounds=1)
    with open(sources["all"], "a") as file:
        file.write(json.dumps({"prompt": "say ", "response": "red", "who": "c0"}) + "\n")
    with pytest.raises(RunError, match=r"began with other rows of client .c0."):
        remove(run.folder, "c1")


def test_a_method_without_a_served_model_says_so(begin):
    done = remove(begin(rounds=1, method="local_only").folder, "c1")
    assert "serves no model" in left(done)["left_out"]
