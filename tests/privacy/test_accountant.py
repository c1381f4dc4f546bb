"""The ledger's epsilon against dp-accounting itself, known answers, budgets, and claims that are lost."""

import logging
import math
import resource
import time

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import Facts
from fedllm.local.spec import LocalSpec
from fedllm.privacy.accountant import BudgetSpent, Ledger, Release, join, noise_for, rounds_for, spent
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.dp_ftrl import DPFTRL
from fedllm.privacy.dp_sgd import DPSGD


@pytest.mark.parametrize("z, sampling, q, n, rdp, pld", [
    (1.0, "poisson", 0.1, 100, 7.904, 7.047), (0.8, "poisson", 0.5, 30, 29.60, 27.06),
    (1.0, "none", 1.0, 10, 19.05, 17.86), (1.0, "poisson", 0.01, 1000, 2.101, 1.828)])
def test_known_answers(z, sampling, q, n, rdp, pld):
    """Figures of the dossier, made with dp-accounting 0.6.0 by another hand; delta 1e-5."""
    row = ((z, sampling, q, 0, n),)
    assert spent(row, 1e-5, "rdp") == pytest.approx(rdp, rel=1e-2)
    assert spent(row, 1e-5, "pld") == pytest.approx(pld, rel=1e-3)


def test_epsilon_agrees_with_a_computation_from_privacy_loss_distributions():
    state = {}
    ledger = Ledger(state)
    for _ in range(30):
        ledger.book(Release(1.1, "poisson", 0.2))
    ledger.book(Release(3.0), 4)
    a = privacy_loss_distribution.from_gaussian_mechanism(1.1, sampling_prob=0.2, use_connect_dots=True)
    b = privacy_loss_distribution.from_gaussian_mechanism(3.0)
    independent = a.self_compose(30).compose(b.self_compose(4)).get_epsilon_for_delta(1e-5)
    assert ledger.epsilon(1e-5) == pytest.approx(independent, rel=0.01)
    assert state["releases"] == [[1.1, "poisson", 0.2, 0, 30], [3.0, "none", 1.0, 0, 4]]  # plain lists
    assert ledger.epsilon(1e-5, "rdp") >= ledger.epsilon(1e-5, "pld")


def test_a_gaussian_alone_has_its_closed_form():
    """Balle and Wang 2018: delta = Phi(1/(2z) - eps z) - e^eps Phi(-1/(2z) - eps z)."""
    z, eps = 2.0, spent(((2.0, "none", 1.0, 0, 1),), 1e-5)

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    assert phi(1 / (2 * z) - eps * z) - math.exp(eps) * phi(-1 / (2 * z) - eps * z) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("layer, z", [(DPSGD, 0.01), (DPSGD, 1e-3), (DPFedAvg, 0.01), (DPFedAvg, 1e-4), (DPFTRL, 0.01),
                                      (DPFTRL, 1e-4)])  # a ledger of dp_sgd holds no less than 1e-3
def test_next_to_no_noise_takes_no_time_and_no_memory(layer, z):
    """It ran past four minutes at 4.9 GB, after the training: now before it, by RDP, and told as what it is."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = Facts({f"c{i}": 200 + i for i in range(10)}, 10, 10, LocalSpec(optimizer="sgd", steps=5))
    bound = layer(noise_multiplier=z).bind(facts)
    assert bound.foresee(facts)["epsilon"] > 1e4
    with pytest.raises(RecipeError, match="no number of rounds keeps to it"):
        layer(noise_multiplier=z, epsilon=8.0).bind(facts)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_ledger_of_many_kinds_of_releases_is_read_at_once():
    rows = tuple((0.9 + i / 37, "poisson", 0.05 + 0.001 * i, 0, 60) for i in range(40))
    began = time.process_time()
    assert spent(rows, 1e-5) == spent(rows, 1e-5, "rdp") and time.process_time() - began < 20


def test_fixed_size_sampling_pays_for_replacing_a_client():
    """A replaced client moves the sum by 2 C, so the whole cohort under "fixed" costs what half the noise would."""
    everybody = Release(4.0, "fixed", 1.0, 20)
    half = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(dp.GaussianDpEvent(2.0), 5)
    assert spent(((*[4.0, "fixed", 1.0, 20], 5),), 1e-5) >= 0.98 * half.get_epsilon(1e-5)
    assert everybody.event.event.noise_multiplier == 2.0
    with pytest.raises(CompositionError, match="PLD accountant and fixed-size"):
        spent(((4.0, "fixed", 0.5, 20, 1),), 1e-5, "pld")
    with pytest.raises(CompositionError, match="cannot share a ledger"):
        spent(((4.0, "fixed", 0.5, 20, 1), (4.0, "none", 1.0, 0, 1)), 1e-5)


def test_calibration_and_rounds_are_each_other_s_inverse():
    z = noise_for(8.0, 1e-5, 100, "poisson", 0.1)
    assert spent(((z, "poisson", 0.1, 0, 100),), 1e-5, "pld") <= 8.0
    assert z == pytest.approx(0.936, abs=0.002)  # the dossier's
    assert z < noise_for(8.0, 1e-5, 100, "poisson", 0.1, kind="rdp") < 1.01  # a bound may only err upward
    assert rounds_for(8.0, 1e-5, Release(z, "poisson", 0.1)) >= 100
    assert rounds_for(1e-3, 1e-5, Release(0.5)) == 0


def test_a_budget_stops_before_it_is_exceeded():
    ledger, release = Ledger({}), Release(5.0)
    affordable = rounds_for(2.0, 1e-5, release)
    ledger.book(release, affordable)
    assert ledger.epsilon(1e-5) <= 2.0
    with pytest.raises(BudgetSpent, match="budget is 2 "):
        ledger.afford(release, 2.0, 1e-5)
    ledger.afford(release, None, 1e-5)


def test_a_release_without_noise_voids_the_claim_loudly(caplog):
    state = {}
    ledger = Ledger(state)
    ledger.book(Release(1.0))
    with caplog.at_level(logging.WARNING):
        ledger.book_unaccounted("FedAvg.local of round 3 was released without noise")
    assert ledger.epsilon(1e-5) == math.inf and "claim of this run is void" in caplog.text
    joined = join([{"layer": "DPFedAvg", "void": state["unbooked"]}])
    assert joined["claim"] == "none" and "without noise" in joined["void"][0]
    assert join([]) is None
    loud, claim = {"layer": "dp_fedavg", "void": [], "epsilon": 9e7}, {"layer": "dp_sgd", "void": [], "epsilon": 900.0}
    assert join([loud, claim])["void"] == ["epsilon = 9e+07 promises nothing"] and join([claim])["claim"] == "private"


@pytest.mark.parametrize("call, says", [
    (lambda: Release(0.0), "noise_multiplier = 0.0"), (lambda: Release(1.0, "poisson", 1.5), "rate = 1.5"),
    (lambda: spent(((1.0, "none", 1.0, 0, 1),), 0.0), "delta = 0.0"),
    (lambda: noise_for(-1.0, 1e-5, 3), "epsilon = -1.0"),
    (lambda: noise_for(1e-9, 1e-5, 1000), "above a million")])
def test_promises_of_nothing_are_refused(call, says):
    with pytest.raises(RecipeError, match=says):
        call()
