"""A run whose query budget is spent ends with what it has, says so everywhere, and is the same when taken up again."""

import json

import pytest

import fedllm
from fedllm.runs.folder import RunFolder
from fedllm.runs.run import Run
from fedllm.runs.seal import verify

BOX = {"name": "fedbpt", "intrinsic_dim": 6, "popsize": 4, "local_iter": 1, "perturb": False}


@pytest.fixture
def spec(recipe):
    return recipe | {"method": BOX, "space": {"name": "soft_prompt", "length": 2}, "rounds": 6,
                     "clients": {}, "evaluate": {"exact_match": False, "samples": 0}, "record": {"replies": True}}


def round_calls(spec, root):
    """What one round of all clients asks."""
    result = fedllm.run(spec, root=root, rounds=1)
    return result.reports["FedBPT"]["queries"]["calls"]


def test_the_run_ends_before_the_round_that_it_cannot_pay(spec, tmp_path):
    each = round_calls(spec, tmp_path / "one")
    spec["method"] = {**BOX, "budget": 3 * each - 1}
    spec["record"] = {"replies": True, "checkpoint_every": 4}
    result = fedllm.run(spec, root=tmp_path / "cut")
    short = fedllm.run({**spec, "method": BOX}, root=tmp_path / "short", rounds=2)
    assert result.rounds == 2 and result.state_digest == short.state_digest
    assert result.reports["FedBPT"]["queries"]["calls"] == 2 * each
    why = f"one more round may take {each} calls of the model; {2 * each} of the budget of {3 * each - 1} are spent"
    assert result.ended == why and not short.ended
    folder = RunFolder(result.folder)
    (event,) = [e for e in folder.events() if e["kind"] == "budget_spent"]
    assert event["round"] == 2 and event["why"] == why
    for file in ("report.html", "model_card.md"):
        assert f"nded before round 3 of 6: {why}" in (result.folder / file).read_text(), file
    assert "nded before" not in (short.folder / "report.html").read_text()
    assert result.adapter_path and folder.rounds()[-1] == 2
    assert fedllm.replay(result.folder).same
    assert verify(result.folder).intact


def test_it_is_the_same_when_it_was_killed_at_its_end(spec, tmp_path, monkeypatch):
    each = round_calls(spec, tmp_path / "one")
    spec["method"] = {**BOX, "budget": 2 * each}
    whole = fedllm.run(spec, root=tmp_path / "whole")

    def killed(self, *args):
        raise KeyboardInterrupt

    for where in ("_finish", "_publish"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, where, killed)
            fedllm.run(spec, root=tmp_path / where)
        again = fedllm.resume(tmp_path / where / "small")
        assert (again.rounds, again.ended, again.state_digest) == (2, whole.ended, whole.state_digest)
        assert again.bytes == whole.bytes and again.reports == whole.reports
        kinds = [e["kind"] for e in RunFolder(again.folder).events()]
        assert kinds.count("budget_spent") == 1 and kinds.count("round") == 2
    done = fedllm.resume(whole.folder)  # a finished run is left as it is
    assert done.ended == whole.ended and json.loads((whole.folder / "result.json").read_text())["ended"]


def test_a_budget_below_one_round_leaves_the_start(spec, tmp_path):
    result = fedllm.run({**spec, "method": {**BOX, "budget": 1}}, root=tmp_path)
    assert result.rounds == 0 and "0 of the budget of 1 are spent" in result.ended
    assert result.evaluation["global"] == result.evaluation["before"]["global"]
