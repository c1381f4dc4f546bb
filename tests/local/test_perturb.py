"""Directions by number: values do not depend on order, partition or company; moments are those of the law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedllm.core.errors import RecipeError
from fedllm.local.perturb import CHUNK, LAWS, Directions, flat, signed_sums, spiral, unflat

both = pytest.mark.parametrize("law", LAWS)


@both
@pytest.mark.parametrize("size", [1, 1001, 70_001])
def test_parts_have_the_bits_of_the_whole(law, size):
    z, weights = Directions(5, size, law), {3: 0.5, 40: -2.0, 17: 0.25, 4: 1.0}
    whole = z.add(torch.zeros(size), weights)
    cuts = [0, *sorted({min(size, c) for c in (1, 7, 500, 30_003)}), size]
    parts = [Directions(5, size, law).add(torch.zeros(b - a), weights, a)
             for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)


@both
def test_a_direction_does_not_depend_on_what_was_drawn_before(law):
    once = Directions(1, 3000, law).direction(77)
    z = Directions(1, 3000, law)
    for j in (5, 78, 76, 2**62):
        z.direction(j)
    assert torch.equal(z.direction(77), once)
    assert not torch.equal(Directions(2, 3000, law).direction(77), once)


@both
@pytest.mark.parametrize("size", [500, 80_000])
def test_the_sum_is_the_sum_of_the_directions(law, size):
    z, weights = Directions(9, size, law), {j: 0.1 * (j - 20) for j in (0, 1, 15, 16, 33, 47)}
    want = sum(a * z.direction(j).double() for j, a in weights.items())
    assert torch.allclose(z.add(torch.zeros(size, dtype=torch.float64), weights), want, atol=1e-6)


@both
def test_moments(law):
    z = torch.stack([Directions(3, 40_000, law).direction(j).double() for j in range(40)])
    gram = z @ z.T / 40_000
    assert float((gram - torch.eye(40)).abs().max()) < 5 * (2 / 40_000) ** 0.5  # five standard errors
    assert abs(float(z.mean())) < 5 / (40 * 40_000) ** 0.5
    assert abs(float((z**4).mean()) - (3.0 if law == "gaussian" else 1.0)) < 0.05
    assert law == "gaussian" or set(z.unique().tolist()) == {-1.0, 1.0}


def test_the_spiral_is_a_normal_distribution_in_the_plane():
    from scipy import stats

    points = spiral().view(np.float64).reshape(-1, 2)
    assert abs(points.mean(0)).max() < 1e-9
    assert np.allclose(points.T @ points / len(points), np.eye(2), atol=1e-6)
    for angle in (0.0, 0.4, 1.1, 2.0):  # in every direction
        along = points @ [np.cos(angle), np.sin(angle)]
        assert stats.kstest(along, "norm").statistic < 1e-3
    assert 4.3 < abs(points).max() < 4.8


def test_neighbors_and_long_vectors():
    v = Directions(11, CHUNK + 100_000).direction(3).double()
    for lag in (1, 2, 3, 8):
        assert abs(float((v[:-lag] * v[lag:]).mean())) < 5 / len(v) ** 0.5


def test_known_values_stay_as_they_are():
    """Models are remade from these numbers: another value would be another model."""
    assert Directions(7, 5).direction(3).tolist() == KNOWN["gaussian"]
    assert Directions(7, 5, "rademacher").direction(3).tolist() == KNOWN["rademacher"]


KNOWN = {"gaussian": [-0.11366399377584457, 0.785081148147583, -0.8097452521324158, 0.16961978375911713,
                      0.5330899357795715],
         "rademacher": [1.0, -1.0, -1.0, 1.0, 1.0]}


def test_signed_sums_and_trees():
    assert signed_sums(np.array([1.0, 10.0])).tolist() == [-11.0, -9.0, 9.0, 11.0]
    tree = {"b": torch.arange(3.0), "a": torch.arange(4.0).view(2, 2)}
    assert flat(tree).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert all(torch.equal(unflat(flat(tree), tree)[n], tree[n]) for n in tree)


@pytest.mark.parametrize("make", [lambda: Directions(-1, 5), lambda: Directions(0, 5, "uniform"),
                                  lambda: Directions(0, 5).direction(-1), lambda: Directions(0, 5).direction(0, 3, 9)])
def test_bad_input_is_refused(make):
    with pytest.raises(RecipeError, match="allowed are"):
        make()
