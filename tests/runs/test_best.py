"""The best round is kept, a run stops when nothing gets better, every round can be had, and rounds can be added."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedllm
from fedllm.core.errors import RecipeError, RunError
from fedllm.models.peft_io import _tensors
from fedllm.runs.best import Best, figure
from fedllm.runs.export import export
from fedllm.runs.folder import RunFolder
from fedllm.runs.run import Run
from fedllm.runs.seal import verify

QUIET = {"max_new_tokens": 4, "samples": 0, "exact_match": False}


@pytest.fixture
def worse(recipe):
    """A recipe that is tested after every round; at rates that are too large some of them get worse."""
    return recipe | {"rounds": 5, "local": {"lr": 0.02, "optimizer": "sgd", "steps": 2},
                     "evaluate": QUIET | {"every": 1}}


def digest_after(folder, round):
    from fedllm.core.payload import digest

    return digest(RunFolder(folder).load(round)[1]["state"])


def losses(folder):
    return [figure(e)[0] for e in RunFolder(folder).events() if e["kind"] == "evaluation"]


def test_the_best_by_its_own_words():
    best = Best()
    own = {"clients": {"a": {"loss": 2.0, "n": 1}, "b": {"loss": 1.0, "n": 3}}, "global": {"loss": 9.0, "n": 2}}
    assert figure(own) == (1.25, "the clients' own test rows") and figure({"global": {"loss": 9.0}})[0] == 9.0
    for round, loss in enumerate((3.0, 2.0, 2.5, math.nan, 1.9, 2.0)):
        best = best.after({"global": {"loss": loss}}, round)
    assert (best.round, best.loss, best.worse) == (4, 1.9, 1)
    assert best.after({"global": {"loss": 1.0}}, 5) == best  # the same round is no second test
    never = Best().after({"global": {"loss": math.inf}}, 0)
    assert (never.loss, never.worse) == (None, 1) and "no test had a loss" in never.over(1)
    assert not best.over(2) and "after round 4 (1.9) and no better in the 1 tests since" in best.over(1)


def test_it_ends_with_the_best_round(worse, tmp_path):
    for lr in (1.0, 0.2, 3.0, 0.1, 5.0, 8.0, 20.0, 0.5, 2.0):  # whether the last is the best hangs on their last bits
        result = fedllm.run(worse, root=tmp_path, **{"evaluate.keep_best": True, "local.optimizer": "adamw",
                                                     "local.lr": lr, "name": f"at-{lr}"})
        told = losses(result.folder)[:6]
        best = min(range(6), key=lambda i: told[i])
        if best < 5:
            break
    assert result.best["round"] == best < 5 and result.best["kept"]
    assert result.best["loss"] == pytest.approx(told[best])
    assert result.state_digest == digest_after(result.folder, best)
    assert figure(result.evaluation)[0] == pytest.approx(told[best])
    assert f"the model after round {best} of 5" in (result.folder / "model_card.md").read_text()
    assert verify(result.folder).intact and RunFolder(result.folder).rounds()[-1] == 5
    assert [e["round"] for e in RunFolder(result.folder).events() if e["kind"] == "kept_best"] == [best]


def test_it_stops_when_nothing_gets_better(worse, tmp_path, monkeypatch):
    worse["evaluate"] |= {"patience": 2}
    worse["local"] = {"lr": 20.0, "optimizer": "adamw", "steps": 2}
    whole = fedllm.run(worse, root=tmp_path, rounds=9)
    told = losses(whole.folder)
    assert whole.rounds < 9 and all(x >= min(told[:-2]) for x in told[-2:])
    assert "no better in the 2 tests since (evaluate.patience = 2)" in whole.ended
    assert f"nded before round {whole.rounds + 1} of 9" in (whole.folder / "report.html").read_text()
    assert [e["round"] for e in RunFolder(whole.folder).events() if e["kind"] == "early_stop"] == [whole.rounds]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_finish", lambda self, *args: (_ for _ in ()).throw(KeyboardInterrupt))
        fedllm.run(worse, root=tmp_path / "cut", rounds=9)
    again = fedllm.resume(tmp_path / "cut" / "small")
    assert (again.state_digest, again.ended, again.rounds) == (whole.state_digest, whole.ended, whole.rounds)


def test_every_round_can_be_had(worse, tmp_path, caplog):
    result = fedllm.run(worse, root=tmp_path, **{"record.keep_rounds": True})
    assert RunFolder(result.folder).rounds() == list(range(6))
    assert "is there already; this run goes to" not in caplog.text
    two, five = (export(result.folder, tmp_path / f"a{n}", round=n) for n in (2, 5))
    last = _tensors(result.folder / "adapter" / "adapter_model.safetensors")
    mine, early = (_tensors(p / "adapter_model.safetensors") for p in (five, two))
    assert all(mine[n].equal(last[n]) for n in last) and not all(early[n].equal(last[n]) for n in last)
    merged = AutoModelForCausalLM.from_pretrained(export(result.folder, tmp_path / "m2", round=2, merge=True))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(worse["model"]), two)
    ids = torch.tensor([[5, 9, 13]])
    with torch.no_grad():
        assert merged(input_ids=ids).logits.allclose(theirs(input_ids=ids).logits, atol=1e-4)
    with pytest.raises(RunError, match=r"--round 9: .* keeps checkpoints after 0, 1, 2, 3, 4, 5 rounds"):
        export(result.folder, tmp_path / "a9", round=9)


@pytest.mark.parametrize("more", [{"method": "fedavgm", "local": {"lr": 0.02, "steps": 2, "warmup": 3}},
                                  {"evaluate": QUIET | {"every": 2, "keep_best": True}}])
def test_added_rounds_end_as_if_they_had_been_there(recipe, tmp_path, more):
    recipe |= {"evaluate": QUIET, "rounds": 4} | more
    whole = fedllm.run(recipe, root=tmp_path / "whole")
    short = fedllm.run(recipe | {"rounds": 2}, root=tmp_path / "short")
    again = fedllm.resume(short.folder, rounds=4)
    assert again.state_digest == whole.state_digest
    assert again.rounds == 4 and again.bytes == whole.bytes and again.evaluation == whole.evaluation
    assert again.best == whole.best and verify(again.folder).intact
    assert fedllm.resume(short.folder, rounds=4).state_digest == whole.state_digest


@pytest.mark.slow
def test_rounds_that_cannot_be_added_are_refused(recipe, tmp_path, caplog):
    recipe |= {"evaluate": QUIET, "rounds": 2}
    run = fedllm.run(recipe, root=tmp_path).folder
    with pytest.raises(RecipeError, match=r"local\.lr: a run that has begun keeps its recipe"):
        fedllm.resume(run, **{"local.lr": 1.0})
    with pytest.raises(RecipeError, match="rounds = 1: the run has 2 rounds, and they can only become more"):
        fedllm.resume(run, rounds=1)
    assert "small is there already" not in caplog.text
    falls = fedllm.run(recipe | {"local": {"over_rounds": "cosine"}}, root=tmp_path).folder
    assert "small is there already; this run goes to" in caplog.text and falls.name == "small-2"
    with pytest.raises(RecipeError, match=r"local\.over_rounds = 'cosine' has fallen towards the end after 2 rounds"):
        fedllm.resume(falls, rounds=4)
    private = recipe | {"layers": [{"name": "dp_fedavg", "epsilon": 50.0, "clip_norm": 1.0}]}
    noisy = fedllm.run(private, root=tmp_path).folder
    with pytest.raises(RecipeError, match="layer 'dp_fedavg' was set for 2 rounds"):
        fedllm.resume(noisy, rounds=4)
    assert fedllm.resume(noisy).rounds == 2  # nothing was lost
    for key in ("keep_best", "patience"):
        with pytest.raises(RecipeError, match=rf"evaluate\.{key} = .* give evaluate\.every"):
            fedllm.run(recipe, root=tmp_path, **{f"evaluate.{key}": 1 if key == "patience" else True})
