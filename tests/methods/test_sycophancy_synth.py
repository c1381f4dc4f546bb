"""Opinions that change nothing: what rows are made, that truth hangs on the claim alone, the filter, the mixture."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.engines.client import ClientCall
from fedllm.methods._opinions import AGREE, DISAGREE, NAMES, Wording, claims_of, told
from fedllm.methods.registry import make_method
from tests.methods.conftest import begin

PAIRS = [(f"question {i}", f"answer {i % 5}") for i in range(20)]
KNOBS = {"n": 12, "filtration": False}


def test_the_right_answer_hangs_on_the_claim_and_on_nothing_else():
    rng, says = np.random.default_rng(0), Wording()
    claims = claims_of(PAIRS, 2000, says, rng)
    rows = told(claims, says, NAMES[::2], rng)
    gold = np.array([r["response"] == AGREE for r in rows])
    assert gold.tolist() == [c.true for c in claims] and 0.45 < gold.mean() < 0.55
    for mark in ("I agree that", "Choices: Agree,"):  # opinion, order of the choices
        has = np.array([mark in r["prompt"] for r in rows])
        table = [[int((has & gold).sum()), int((has & ~gold).sum())], [int((~has & gold).sum()),
                                                                        int((~has & ~gold).sum())]]
        assert chi2_contingency(table).pvalue > 0.05 and 0.4 < has.mean() < 0.6
    right = dict(PAIRS)
    for c in claims[:200]:
        prompt, said = c.text.split("'")[1], c.text.split("'")[3]
        assert (right[prompt] == said) is c.true
    assert not any(f"name is {n}." in r["prompt"] for r in rows for n in NAMES[1::2])


def test_the_filter_leaves_out_exactly_what_the_model_gets_wrong():
    run = begin("sycophancy_synth", n=12)
    claims = claims_of(PAIRS, 40, Wording(), np.random.default_rng(1))

    class Client:
        """Finds Agree likelier for claims of even length, and so is wrong about some."""

        def probe(self, thetas, on):
            n = len(on) // 2
            likes = [len(c.text) % 2 == 0 for c in claims]
            loss = [*(0.1 if x else 2.0 for x in likes), *(2.0 if x else 0.1 for x in likes)]
            assert [r["response"] for r in on] == [AGREE] * n + [DISAGREE] * n
            assert not any("my name is" in r["prompt"] for r in on)
            return [type("Got", (), {"total": np.array(loss), "count": np.ones(2 * n)})()]

    got = run.method.known(Client(), {}, claims)
    assert got == [(len(c.text) % 2 == 0) == c.true for c in claims] and 0 < sum(got) < 40


def test_rows_go_down_once_and_are_a_share_of_what_is_learned(monkeypatch):
    run = begin("sycophancy_synth", engine="in_process", rho=0.5, **KNOBS)
    learned, fit = {}, ClientCall.fit

    def seen(self, theta, **how):
        learned.setdefault(self.id, []).append(len(how.get("on") or ()))
        return fit(self, theta, **how)

    monkeypatch.setattr(ClientCall, "fit", seen)
    run.go(2)
    sizes = {c: len(s.train) for c, s in run.world.federation.clients.items()}
    assert {c: counts for c, counts in learned.items() if c != SERVER} == {
        c: [n + min(12, n)] * 2 for c, n in sizes.items()}
    down = [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"]
    assert max(down[len(sizes):]) < min(down[:len(sizes)])
    assert run.method.report(run.state) == {"rows": 12, "left_out": 0} and len(run.state["rows"]) == 24


def test_without_claims_it_is_fedavg_and_what_does_not_fit_is_refused():
    one, other = begin("sycophancy_synth", n=0).go(2), begin("fedavg").go(2)
    assert all(t.equal(other.state["theta"][n]) for n, t in one.state["theta"].items())
    with pytest.raises(RecipeError, match="persona"):
        make_method("sycophancy_synth", persona="hello")
    with pytest.raises(CompositionError, match="classification"):
        make_method("sycophancy_synth").check(begin("fedavg", task="classification").world.model)
    bare = begin("sycophancy_synth", engine="in_process", **KNOBS)
    bare.world.federation.public[:] = bare.world.federation.public[:1]
    with pytest.raises(DataError, match="different answers"):
        bare.go(1)


def test_a_client_that_lost_its_rows_says_so_and_is_sent_them_again():
    run = begin("sycophancy_synth", engine="in_process", rho=0.5, **KNOBS).go(1)
    run.engine.memory["c0"] = {}
    run.go(1)
    assert "c0" not in run.state["told"] and "c1" in run.state["told"]
    run.go(1)
    assert "c0" in run.state["told"] and run.engine.memory["c0"]["handed"]
