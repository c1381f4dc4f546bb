"""A run in which nothing counted is a failed run: it says so, keeps its record, and no command calls it done."""

import json

import pytest

import fedllm
from fedllm.cli.main import main
from fedllm.core.errors import DidNothing, RunError, Withheld
from fedllm.methods.baselines.fedavg import FedAvg
from fedllm.methods.inference.fed_sp_sc import FedSPSC
from fedllm.models.questions import Voted
from fedllm.runs.result import Result
from fedllm.runs.seal import verify


@pytest.fixture
def withheld(monkeypatch):
    """FedAvg whose clients keep their answers in these rounds."""
    good, rounds = FedAvg.local, set()

    def local(self, msg, client):
        if client.round in rounds:
            raise Withheld("not today")
        return good(self, msg, client)

    local.__dict__.update(good.__dict__)
    local.__name__ = "local"
    monkeypatch.setattr(FedAvg, "local", local)
    return rounds.update


@pytest.mark.parametrize("engine", ["vectorized", "in_process"])
def test_a_run_all_of_whose_rounds_were_skipped_is_failed(recipe, tmp_path, withheld, engine):
    withheld({0, 1})
    with pytest.raises(DidNothing, match=r"all of its 2 rounds were skipped, the last because .*not today.*small"):
        fedllm.run(recipe, root=tmp_path, rounds=2, engine=engine)
    kept = Result.load(tmp_path / "small")
    assert kept.skipped == [0, 1] and "not today" in kept.failed and kept.report_path.is_file()
    assert "Failed:" in kept.report_path.read_text() and "The run failed" in (kept.folder / "model_card.md").read_text()
    assert verify(kept.folder).intact
    with pytest.raises(RunError, match="there is nothing to resume: mend the cause"):
        fedllm.resume(kept.folder)


def test_one_round_that_counts_is_enough(recipe, tmp_path, withheld):
    withheld({0})
    result = fedllm.run(recipe, root=tmp_path, rounds=2)
    assert result.skipped == [0] and not result.failed


def test_a_run_that_was_asked_for_no_round_is_none_that_failed(recipe, tmp_path):
    assert not fedllm.run(recipe, root=tmp_path, rounds=0).failed


def test_the_command_line_ends_with_an_error(recipe, tmp_path, withheld, capsys):
    withheld({0})
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe))
    for words in (["run", str(path), "rounds=1", "--root", str(tmp_path)], ["resume", str(tmp_path / "small")]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        assert "did nothing" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_answered_nothing_is_failed(recipe, tmp_path, monkeypatch):
    def answer(self, query, clients, asker=None, state=None):
        yield from ()
        return Voted(query, None)

    monkeypatch.setattr(FedSPSC, "answer", answer)
    with pytest.raises(DidNothing, match="none of the 16 questions of the test got an answer"):
        fedllm.run(recipe, root=tmp_path, method={"name": "fed_sp_sc", "embed": "tfidf", "n_synonyms": 0}, rounds=1)


@pytest.mark.parametrize("method", ["fedavgm", "fedadam"])
def test_a_rate_of_the_servers_that_wrecks_the_model_commits_nothing(recipe, tmp_path, method):
    with pytest.raises(DidNothing, match=r"what the server makes of the answers is .* long, allowed is .*server_lr"):
        fedllm.run(recipe, root=tmp_path, rounds=1, method={"name": method, "server_lr": 1e15})


def test_what_is_no_number_is_not_committed(recipe, tmp_path, monkeypatch):
    good = FedAvg.round

    def round(self, state, clients):
        new = yield from good(self, state, clients)
        return {**new, "theta": {n: t * float("inf") for n, t in new["theta"].items()}}

    monkeypatch.setattr(FedAvg, "round", round)
    with pytest.raises(DidNothing, match="what the server makes of the answers holds NaN or infinity in 'theta/"):
        fedllm.run(recipe, root=tmp_path, rounds=1)
