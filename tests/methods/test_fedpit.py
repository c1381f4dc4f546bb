"""Parameter isolation: what is sent learned from synthetic rows alone, copies do not leave, and home keeps its own."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import RecipeError
from fedllm.core.payload import norm, sub
from fedllm.core.program import drive
from fedllm.engines.client import ClientCall
from fedllm.methods.privacy.fedpit import FedPIT
from fedllm.methods.registry import make_method
from fedllm.models.overlap import closest, rouge_l

SAYS = {"template": "w1 {prompt} w2 {response} w3 ", "temperature": 2.0, "max_new_tokens": 24}
FEW = [{"prompt": "w5 w6 w7", "response": "w8"}, {"prompt": "w9 w10", "response": "w11 w12"}]


@pytest.mark.slow
def test_engines_agree_on_rows_that_the_model_itself_invents(begin, gap):
    runs = [begin("fedpit", engine=e, loopback=e == "in_process", **SAYS).go(2) for e in ("in_process", "vectorized")]
    assert gap(*(r.state["theta"] for r in runs)) < 1e-10
    assert norm(sub(runs[0].state["theta"], runs[0].world.model.initial())) > 1e-4
    for client in ("c0", "c3"):
        assert gap(*(r.engine.memory[client]["private"] for r in runs)) < 1e-10


def test_rows_that_the_model_invents_are_new(begin):
    run, seen = begin("fedpit", **SAYS), {}
    real = FedPIT.audit

    def audit(self, client, synthetic, own):
        seen[client] = (list(synthetic), list(own))
        real(self, client, synthetic, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedPIT, "audit", audit)
        run.go(1)
    for synthetic, own in seen.values():
        assert 0 < len(synthetic) <= len(own)
        assert all(closest(r["prompt"], [o["prompt"] for o in own]) <= 0.7 for r in synthetic)


@pytest.mark.parametrize("beta, alike", [(1.0, True), (0.5, False)])
def test_only_with_beta_below_one_does_the_upload_depend_on_private_rows(begin, gap, monkeypatch, beta, alike):
    monkeypatch.setattr(FedPIT, "invent", lambda self, client, w, own: FEW)
    plain, other = begin("fedpit", beta=beta), begin("fedpit", beta=beta)
    for shard in other.world.federation.clients.values():
        for i, row in enumerate(shard.train):
            row["response"] = f"w{i + 30} w{i + 31}"  # the same rows with other answers
    ends = [r.go(1) for r in (plain, other)]
    assert (gap(*(r.state["theta"] for r in ends)) == 0) == alike
    assert gap(*(r.engine.memory["c0"]["private"] for r in ends)) > 1e-6


def test_a_generator_that_copies_is_stopped_by_the_audit(begin, monkeypatch):
    """With the filter off, copies reach the audit and the client sends nothing; others go on."""
    real = ClientCall.generate

    def parrot(self, prompts, theta=None, **options):
        if self.id != "c1":
            return real(self, prompts, theta, **options)
        row = self.data[0]
        return [f"{row['prompt']} w2 {row['response']} w3"] * len(prompts)

    monkeypatch.setattr(ClientCall, "generate", parrot)
    run = begin("fedpit", rouge_max=1.0, **SAYS).go(1)
    missing = [e for e in run.engine.record.events if e["kind"] == "missing"]
    assert [e["client"] for e in missing] == ["c1"] and "copies one of its own (ROUGE-L 1.00" in missing[0]["why"]
    assert "c1" not in {e["client"] for e in run.engine.record.events if e.get("direction") == "up"}
    filtered = begin("fedpit", **SAYS).go(1)
    why = [e["why"] for e in filtered.engine.record.events if e["kind"] == "missing"]
    assert len(why) == 1 and "has no synthetic row after" in why[0]


def test_at_home_the_private_adapter_answers(begin, monkeypatch):
    monkeypatch.setattr(FedPIT, "invent", lambda self, client, w, own: FEW)
    run = begin("fedpit", local={"lr": 0.5, "epochs": 5}).go(2)
    scores = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)
    for c in ("c0", "c2"):
        call_like = begin("fedavg")
        call_like.state["theta"] = run.engine.memory[c]["private"]
        want = drive(call_like.method.evaluate(call_like.state, call_like.world.infos(), "local"), call_like.engine)
        assert scores[c]["loss"] == pytest.approx(want[c]["loss"], abs=1e-12)


@pytest.mark.parametrize("text, row", [
    ("w4 w5 w2 w6 w3 w1 w9", {"prompt": "w4 w5", "response": "w6"}),
    ("w4 w2 w6 w7", {"prompt": "w4", "response": "w6 w7"}),
    ("w4 w5", None), ("w2 w6", None), ("w4 w2  w3", None)])
def test_what_the_model_wrote_is_read(text, row):
    assert make_method("fedpit", **SAYS).read(text) == row


@pytest.mark.parametrize("knobs, says", [
    ({"synthetic_ratio": 0.0}, "nothing would train what is sent"), ({"beta": 1.5}, "beta = 1.5 is not allowed"),
    ({"template": "{prompt} {response}"}, "it must be a mark"), ({"rouge_max": 0}, "rouge_max = 0 is not allowed")])
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(RecipeError, match=says):
        make_method("fedpit", **knobs)


def test_rouge_l():
    assert rouge_l("a b c d", "a c d e f") == pytest.approx(2 * 3 / 9)
    assert rouge_l("the cat", "The cat") == 1 and rouge_l("a", "b") == 0 and rouge_l("", "a") == 0
    assert rouge_l("a b c", "c b a", 0.9) == pytest.approx(1 / 3)
    assert rouge_l("a b", "b a x x x x", 0.9) == pytest.approx(0.5)  # the bound: two words are shared
    assert rouge_l("a b", "b a x x x x") == pytest.approx(0.25)
    assert closest("a b", []) == 0 and closest("a b", ["x", "a b c"]) == pytest.approx(0.8)


def test_no_synthetic_rows_are_needed_below_beta_one(begin):
    run = begin("fedpit", beta=0.5, synthetic_ratio=0.0).go(1)
    assert torch.isfinite(next(iter(run.state["theta"].values()))).all()
    assert not [e for e in run.engine.record.events if e["kind"] == "missing"]
