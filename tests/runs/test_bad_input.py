"""What real data and real clients do: each a clear error or a recorded event, and never a lost run."""

import json

import pytest

import fedllm
from fedllm.core.errors import ClientError, DataError, ModelError, RecipeError
from fedllm.methods.baselines.fedavg import FedAvg
from fedllm.runs.folder import RunFolder


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def row(i, **more):
    return {"prompt": f"say the word {['red', 'green', 'blue'][i % 3]}", "response": "yes", **more}


def test_a_client_with_one_example_takes_part(recipe, tmp_path):
    rows = [row(i, who="big") for i in range(12)] + [row(0, who="one")]
    recipe["data"] = {"source": write(tmp_path / "r.jsonl", rows), "test": 0.0,
                      "partition": {"kind": "by_key", "key": "who"}}
    result = fedllm.run(recipe, root=tmp_path, clients={"per_round": 1.0})
    clients = json.loads((result.folder / "clients.json").read_text())
    assert {c["id"]: c["n"] for c in clients}["one"] == 1
    assert result.evaluation["global"] is None  # no test was given, and that is no error


def test_an_empty_client_is_left_out_and_recorded(recipe, tmp_path, monkeypatch):
    from fedllm.data.federation import Federation, Shard
    from fedllm.runs import build

    def load(spec, seed, embed=None):
        return Federation({"a": Shard([row(i) for i in range(6)]), "empty": Shard([])}, [row(1)], "generation")

    monkeypatch.setattr(build, "load_federation", load)
    result = fedllm.run(recipe, root=tmp_path, rounds=1)
    (event,) = [e for e in RunFolder(result.folder).events() if e["kind"] == "left_out"]
    assert event["client"] == "empty" and "no training rows" in event["why"]
    monkeypatch.setattr(build, "load_federation", lambda *a, **k: Federation({"e": Shard([])}, [], "generation"))
    with pytest.raises(DataError, match="no client has training rows"):
        fedllm.run(recipe, root=tmp_path)


def test_broken_rows_name_file_and_line(recipe, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + '{"prompt": "x", \n')
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2: broken JSON"):
        fedllm.run(recipe | {"data": {"source": str(path)}}, root=tmp_path)
    with pytest.raises(DataError, match=r"row 2 .*has no field 'response'"):
        rows = write(tmp_path / "r.jsonl", [row(0), {"prompt": "x"}])
        fedllm.run(recipe | {"data": {"source": rows}}, root=tmp_path)


def test_a_model_without_the_target_modules(recipe, tmp_path):
    with pytest.raises(ModelError, match="it has"):
        fedllm.run(recipe, root=tmp_path, space={"name": "lora", "targets": ["query_key_value"]})


@pytest.mark.parametrize(("clients", "says"), [
    ({"ranks": [2, 4]}, r"clients\.ranks = \[2, 4\]: method 'fedavg' trains the space's own rank at every client"),
    ({"profiles": {"client-1": {"rank": 2}}}, r"clients\.profiles\.client-1\.rank = 2: .* use one of .*flexlora")])
def test_ranks_that_the_method_would_not_look_at(recipe, tmp_path, clients, says):
    with pytest.raises(RecipeError, match=says):
        fedllm.run(recipe | {"clients": clients, "method": "fedavg"}, root=tmp_path)


@pytest.fixture
def spoiled(monkeypatch):
    """FedAvg whose client number `which` (the first) answers with `spoil(reply)`."""
    good = FedAvg.local

    def make(spoil, which="0"):
        def local(self, msg, client):
            reply = good(self, msg, client)
            return spoil(reply) if client.id.endswith(which) else reply

        local.__dict__.update(good.__dict__)
        local.__name__ = "local"
        monkeypatch.setattr(FedAvg, "local", local)

    return make


def test_nan_in_a_reply_is_named_left_out_and_recorded(recipe, tmp_path, spoiled):
    spoiled(lambda reply: {k: v * float("nan") if k.startswith("delta/") else v for k, v in reply.items()})
    result = fedllm.run(recipe, root=tmp_path, clients={"per_round": 1.0}, rounds=2)
    refused = [e for e in RunFolder(result.folder).events() if e["kind"] == "refused"]
    assert len(refused) == 2 and all("NaN" in e["why"] and e["client"].endswith("0") for e in refused)
    assert result.evaluation["global"]["loss"] < result.evaluation["before"]["global"]["loss"]
    assert "NaN" in (result.folder / "report.html").read_text()


def test_a_reply_of_another_shape_is_left_out(recipe, tmp_path, spoiled):
    spoiled(lambda reply: {k: v for k, v in reply.items() if "q_proj" not in k}, "3")
    result = fedllm.run(recipe, root=tmp_path, clients={"per_round": 1.0}, rounds=1)
    (event,) = [e for e in RunFolder(result.folder).events() if e["kind"] == "refused"]
    assert event["client"].endswith("3") and not result.skipped
    assert "and not those that were sent" in event["why"]


def test_an_odd_answer_that_comes_first_does_not_speak_for_all(recipe, tmp_path, spoiled):
    spoiled(lambda reply: {k: v for k, v in reply.items() if "q_proj" not in k})
    result = fedllm.run(recipe, root=tmp_path, clients={"per_round": 1.0}, rounds=2)
    refused = {e["client"] for e in RunFolder(result.folder).events() if e["kind"] == "refused"}
    assert not result.skipped and len(refused) == 1 and refused.pop().endswith("0")


def test_a_client_that_fails_is_named_and_the_run_can_go_on(recipe, tmp_path, spoiled, monkeypatch):
    def fail(reply):
        raise ZeroDivisionError("a bug in the client")

    spoiled(fail)
    with pytest.raises(ClientError, match=r"client '.*0' failed in FedAvg\.local of round 0: ZeroDivisionError"):
        fedllm.run(recipe, root=tmp_path, clients={"per_round": 1.0})
    monkeypatch.undo()
    assert fedllm.resume(tmp_path / "small").rounds == 4


def test_a_learning_rate_that_is_far_too_high_stops_with_a_reason(recipe, tmp_path):
    with pytest.raises(fedllm.RunError, match=r"NaN or infinity|long, allowed is"):
        fedllm.run(recipe, root=tmp_path, local={"lr": 1e15, "optimizer": "sgd", "steps": 5})
