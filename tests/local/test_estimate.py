"""Estimators from losses: against autograd, sums over all prompts, quadratic programs and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm

from fedllm.local.estimate import Bayes, Policy, Spsa, expected_improvement, onto_simplex, posterior


def quadratic(q=5, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(q, q)), rng.normal(size=q)
    a = a @ a.T / q + np.eye(q)
    return lambda zs: 0.5 * np.einsum("ki,ij,kj->k", zs, a, zs) - zs @ b, lambda z: a @ z - b


def test_spsa_is_unbiased_on_a_quadratic():
    """E[D_i^-1 D_j] = [i = j] for independent symmetric signs, and the even terms cancel between + and -."""
    loss, grad = quadratic()
    z = np.linspace(-1, 1, 5)
    g = Spsa(5, average=40_000).gradient(z, loss, np.random.default_rng(1), c=0.3)
    assert g == pytest.approx(grad(z), abs=0.08)


def test_spsa_follows_its_equations_and_goes_on_where_it_stood():
    loss, _ = quadratic()
    spsa, memory, rng, twin = Spsa(5, 2, 3, 0.2, 0.1), {}, np.random.default_rng(2), np.random.default_rng(2)
    z = spsa.start()["z"]
    m = np.zeros(5)
    for t in range(1, 5):
        g = spsa.gradient(z, loss, twin, 0.1 / t**0.1)
        m = 0.9 * m + g
        z = z - 0.2 / (t + 1) ** 0.4 * (g + 0.9 * m)
    shared = spsa.search(spsa.start(), loss, rng, 0, memory)
    shared = spsa.search(shared, loss, rng, 1, memory)
    assert np.array_equal(shared["z"], z) and np.array_equal(memory["momentum"].numpy(), m)


def test_the_policy_gradient_is_that_of_the_expected_loss():
    """Over many draws: d/dp sum_j prod_i p_i(j_i) l(j) over all 9 prompts, by autograd."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(3, 3))
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    expected = sum(p[0, i] * p[1, j] * table[i, j] for i, j in itertools.product(range(3), range(3)))
    (wanted,) = torch.autograd.grad(expected, p)
    q = p.detach().numpy()
    picks = np.stack([rng.choice(3, 200_000, p=row) for row in q], 1)
    got = Policy(2, 3).gradient(q, picks, table[picks[:, 0], picks[:, 1]])
    # the mean loss as baseline takes a multiple of the ones off each row, which the simplex does not feel
    centered = lambda g: g - (g * q).sum(1, keepdims=True)  # noqa: E731
    assert centered(got) == pytest.approx(centered(wanted.numpy()), abs=0.03)


def test_two_prompts_by_hand():
    """I = 2: G = ((l_1 - l_2) / 2) (1/p at picks_1 - 1/p at picks_2)."""
    g = Policy(1, 4, samples=2).gradient(np.full((1, 4), 0.25), np.array([[0], [3]]), [3.0, 1.0])
    assert g.tolist() == [[4.0, 0.0, 0.0, -4.0]]
    g = Policy(1, 4, samples=2, spread=True).gradient(np.full((1, 4), 0.25), np.array([[0], [3]]), [3.0, 1.0])
    assert g.tolist() == [[8.0, 0.0, 0.0, -8.0]]  # -1/p where nothing was drawn


def test_rows_go_to_the_nearest_probabilities():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(6, 5))
    got = onto_simplex(rows)
    assert got.sum(1) == pytest.approx(np.ones(6), abs=1e-12) and got.min() >= 0
    for row, mine in zip(rows, got, strict=True):
        best = minimize(lambda x, row=row: ((x - row) ** 2).sum(), np.full(5, 0.2), bounds=[(0, 1)] * 5,
                        constraints={"type": "eq", "fun": lambda x: x.sum() - 1}, options={"ftol": 1e-14})
        assert mine == pytest.approx(best.x, abs=1e-5)
    assert onto_simplex(got) == pytest.approx(got, abs=1e-15)


def test_a_mean_of_policies_is_a_policy():
    policy, rng = Policy(4, 30, steps=10, lr=0.05), np.random.default_rng(5)
    table = rng.normal(size=(4, 30))
    ask = lambda picks: table[np.arange(4), picks].mean(1)  # noqa: E731
    found = [policy.search(policy.start(), ask, rng, 0, {}) for _ in range(3)]
    p = policy.merge(policy.start(), found, [1, 7, 3])["p"]
    assert p.sum(1) == pytest.approx(np.ones(4), abs=1e-12) and p.min() >= 0
    assert p == pytest.approx((found[0]["p"] + 7 * found[1]["p"] + 3 * found[2]["p"]) / 11)
    assert policy.best({"p": np.array([[0.2, 0.8], [0.6, 0.4]])}).tolist() == [1, 0]


def test_the_posterior_is_the_closed_form():
    """K(X*, X) (K + s^2 I)^-1 y on standardized losses, with the kernel that was fitted."""
    rng = np.random.default_rng(6)
    zs, new = rng.normal(size=(12, 3)), rng.normal(size=(4, 3))
    ys = (zs**2).sum(1) + 0.1 * rng.normal(size=12)
    gp = posterior(zs, ys)
    mean, std = gp.predict(new, return_std=True)
    k, noise = gp.kernel_.k1, gp.kernel_.k2.noise_level
    inverse = np.linalg.inv(k(zs) + noise * np.eye(12))
    scaled = (ys - ys.mean()) / ys.std()
    assert mean == pytest.approx(ys.mean() + ys.std() * k(new, zs) @ inverse @ scaled, abs=1e-6)
    left = np.diag(k(new)) + noise - np.einsum("ij,jk,ik->i", k(new, zs), inverse, k(new, zs))
    assert std == pytest.approx(ys.std() * np.sqrt(left), abs=1e-6)


def test_expected_improvement_is_the_integral():
    f = np.linspace(-9, 11, 200_001)
    for mean, std, best in [(1.0, 0.8, 0.5), (0.0, 1.0, 0.0), (2.0, 0.1, 0.0)]:
        wanted = np.trapezoid(np.maximum(0, best - f) * norm.pdf(f, mean, std), f)
        assert expected_improvement(np.array(mean), np.array(std), best) == pytest.approx(wanted, abs=1e-7)


def test_bayes_finds_a_lower_point_than_random_ones_do():
    wins = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        low = rng.normal(size=4)
        loss = lambda zs, low=low: ((zs - low) ** 2).sum(1)  # noqa: E731
        bayes = Bayes(4, steps=25)
        found = bayes.merge(bayes.start(), [bayes.search(bayes.start(), loss, rng, 0, {})], [1])
        assert found["y"] == pytest.approx(loss(found["z"]) - loss(np.zeros((1, 4))))
        wins += float(loss(bayes.best(found)[None])[0]) < float(loss(rng.normal(size=(50, 4))).min())
    assert wins >= 4
