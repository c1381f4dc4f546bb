"""Membership scores, exposure and empirical epsilon against closed forms."""

import numpy as np
import pytest
from scipy.stats import binom

from fedllm.audits.epsilon import from_rates, one_run, p_value
from fedllm.audits.membership import auc, bounds, lira, tpr_at
from fedllm.audits.memorized import memorized
from fedllm.core.errors import DataError
from fedllm.data.canaries import canaries, exposures, planted
from fedllm.data.federation import Federation, Shard
from tests.conftest import WORDS, word_tokenizer


def test_auc_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    pairs = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a, b) == pytest.approx(pairs)


def test_no_rate_is_told_that_the_rows_cannot_show():
    assert tpr_at(np.ones(10), np.zeros(99), 0.01) is None
    got = tpr_at(np.r_[np.ones(30), np.zeros(70)], np.r_[0.5, np.zeros(99)], 0.01)
    assert got["tpr"] == 0.3 and got["low"] < 0.3 < got["high"]
    assert bounds(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))


def test_lira_tells_rows_that_single_scores_cannot():
    """Rows differ more in how hard they are than membership moves them: the loss alone says little."""
    rng = np.random.default_rng(1)
    hard, inside = rng.normal(0, 5, 300), rng.random((16, 300)) < 0.5
    shadows = hard + inside * 1.0 + rng.normal(0, 0.5, inside.shape)
    mine = rng.random(300) < 0.5
    target = hard + mine * 1.0 + rng.normal(0, 0.5, 300)
    score = lira(target, shadows, inside)
    good = np.isfinite(score)
    assert auc(score[good & mine], score[good & ~mine]) > 0.85 > 0.65 > auc(target[mine], target[~mine])
    inside[:, 0] = True
    assert np.isnan(lira(target, shadows, inside)[0])


def test_one_run_refutes_what_the_binomial_does():
    inside = np.arange(400) % 2 == 0
    perfect = one_run(inside.astype(float), inside)
    assert perfect["right"] == perfect["guesses"] == 200
    assert binom.sf(199, 200, 1 / (1 + np.exp(-perfect["epsilon"]))) == pytest.approx(0.05)
    rng = np.random.default_rng(2)
    chance = [one_run(rng.random(400), rng.random(400) < 0.5)["epsilon"] > 0 for _ in range(100)]
    assert np.mean(chance) < 0.15  # 5 in 100 by construction
    assert one_run(inside.astype(float), inside, delta=1e-2)["epsilon"] < perfect["epsilon"]
    assert p_value(10, 10, 0, 1.0, 0.0) == 1.0


def test_randomized_response_is_not_overestimated():
    """Each bit is told right with probability e / (1 + e): epsilon is 1, and the bound stays below it."""
    rng, low = np.random.default_rng(3), []
    for _ in range(40):
        inside = rng.random(1000) < 0.5
        told = np.where(rng.random(1000) < np.e / (1 + np.e), inside, ~inside)
        low.append(one_run(told + 1e-6 * rng.random(1000), inside)["epsilon"])
    assert np.mean(np.array(low) > 1.0) <= 0.15 and np.mean(low) > 0.5
    assert from_rates(95, 100, 5, 100) == pytest.approx(np.log(bounds(95, 100)[0] / bounds(5, 100)[1]))
    assert from_rates(5, 100, 5, 100) == 0.0


def test_exposure_counts_ranks():
    others = np.arange(1.0, 1024.0)
    got = exposures(np.array([0.5, 2000.0, 512.5]), others)
    assert got[0] == 10 and got[1] == 0 and got[2] == pytest.approx(10 - np.log2(513))


def test_coins_plant_half_and_the_seed_says_which():
    fed = Federation({c: Shard([{"prompt": "a", "response": "b"}]) for c in "xy"}, [], "generation")
    all_ = canaries("xy", 40, 3, word_tokenizer())
    assert all_ == canaries("xy", 40, 3, word_tokenizer()) != canaries("xy", 40, 4, word_tokenizer())
    ins = [c for c in all_ if c.planted]
    assert 25 < len(ins) < 55 and len({str(c.row) for c in all_}) == 80
    grown = planted(fed, 40, 2, 3, word_tokenizer())
    assert sum(len(s.train) for s in grown.clients.values()) == 2 + 2 * len(ins)
    assert all(grown.clients[c.client].train.count(c.row) == 2 for c in ins)
    words = ins[0].row["prompt"].split() + ins[0].row["response"].split()
    assert len(set(words)) == 10 and set(words) <= set(WORDS)


def test_too_small_a_vocabulary_is_named():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": WORDS[:20]})
    with pytest.raises(DataError, match="canaries need 20 words and the model's tokenizer has"):
        canaries("x", 1, 0, tokenizer)


def test_paraphrases_count_as_near_and_others_do_not():
    vectors = {"cat sat": (1, 0), "a cat was sitting": (0.97, 0.24), "dog": (0, 1), "rain": (-1, 0)}
    look = lambda texts: np.array([np.array(vectors[t]) / np.linalg.norm(vectors[t]) for t in texts])  # noqa: E731
    got = memorized(["a cat was sitting", "dog", "dog"], ["cat sat", "dog", "rain"], look)
    assert got["verbatim"] == pytest.approx(1 / 3) and got["near"] == pytest.approx(2 / 3)
