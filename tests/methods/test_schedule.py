"""DT-FM's costs against brute force, its search against the optimum, and what is refused."""

from __future__ import annotations

import itertools
import socket

import numpy as np
import pytest

from fedllm.core.errors import RecipeError
from fedllm.methods._schedule import Lines, cost, data_cost, match, order, search


def regions(rng, n, c_dp=4e7, c_pp=4e6, per=2):
    """Machines in regions of `per`: 5 ms and 250 MB/s inside, 11 to 67 ms and 128 to 156 MB/s across."""
    at = np.arange(n) // per
    same = at[:, None] == at[None]
    far, wide = rng.uniform(0.011, 0.067, (n, n)), rng.uniform(128e6, 156e6, (n, n))
    return Lines(np.where(same, 0.005, np.maximum(far, far.T)), np.where(same, 250e6, np.minimum(wide, wide.T)), c_dp,
                 c_pp)


def splits(n, stages, replicas):
    if not n:
        yield ()
        return
    first, *rest = n
    for others in itertools.combinations(rest, replicas - 1):
        left = [i for i in rest if i not in others]
        for more in splits(left, stages - 1, replicas):
            yield ((first, *others), *more)


def test_costs_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lines = regions(rng, 8)
        perm = rng.permutation(8)
        groups = tuple(tuple(int(x) for x in perm[i : i + 2]) for i in range(0, 8, 2))
        want = max(max(sum(2 * (lines.delay[i, j] + lines.c_dp / (2 * lines.bandwidth[i, j])) for j in g if j != i)
                       for i in g) for g in groups)
        assert data_cost(lines, groups) == pytest.approx(want)
        a, b = tuple(perm[:4]), tuple(perm[4:])
        t = lines.seconds(lines.c_pp)
        pairs = min(max(t[i, j] for i, j in zip(a, p, strict=True)) for p in itertools.permutations(b))
        got, paired = match(lines, a, b)
        assert got == pytest.approx(pairs) == max(t[i, j] for i, j in zip(a, paired, strict=True))
        m = rng.random((5, 5))
        m = m + m.T
        assert order(m)[0] == pytest.approx(min(
            sum(m[x, y] for x, y in itertools.pairwise(p)) for p in itertools.permutations(range(5))))


def test_the_search_finds_the_optimum_of_eight_machines():
    rng, hits = np.random.default_rng(1), 0
    for seed in range(3):
        lines = regions(rng, 8)
        best = min(cost(lines, g).seconds for g in splits(list(range(8)), 4, 2))
        hits += search(lines, 4, 2, seed=seed).seconds <= best * (1 + 1e-9)
    assert hits == 3


def test_large_gradients_stay_in_a_region_and_large_states_spread():
    rng = np.random.default_rng(2)
    near = search(regions(rng, 8, c_dp=1e9, c_pp=1.0), 4, 2)
    assert all(len({i // 2 for i in stage}) == 1 for stage in near.stages)
    far = search(regions(rng, 8, c_dp=1.0, c_pp=1e9), 4, 2)
    assert any(len({i // 2 for i in stage}) == 2 for stage in far.stages)


def test_the_same_seed_gives_the_same_schedule_and_every_machine_once():
    lines = regions(np.random.default_rng(3), 8)
    one, two = (search(lines, 2, 4, trials=100, seed=5) for _ in range(2))
    assert one == two and sorted(i for s in one.stages for i in s) == list(range(8))


def test_what_does_not_fit_is_refused():
    lines = regions(np.random.default_rng(0), 8)
    with pytest.raises(RecipeError, match="stages = 3 and replicas = 2 need 6 machines, and there are 8"):
        search(lines, 3, 2)
    with pytest.raises(RecipeError, match="no schedule was found"):
        search(Lines(lines.delay, np.zeros((8, 8)), 1.0, 1.0), 4, 2, trials=40)
    with pytest.raises(RecipeError, match="bandwidth has shape"):
        Lines(lines.delay, np.ones((8, 7)), 1.0, 1.0)
    with pytest.raises(RecipeError, match="c_dp = 0"):
        Lines(lines.delay, lines.bandwidth, 0.0, 1.0)


def test_a_machine_whose_line_ends_has_done_no_quick_iteration():
    from evidence.bench.slow_lines import Machine

    lines = Lines(np.zeros((2, 2)), np.full((2, 2), 1e9), 8.0, 8.0)
    machine, (mine, other) = object.__new__(Machine), socket.socketpair()
    machine.me, machine.lines, machine.out, machine.got = 0, lines, {1: mine}, {1: mine}
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="machine 1 is gone"):
        machine.iterate(cost(lines, ((0, 1),)))


@pytest.mark.slow  # seconds of this machine, which no test of CI goes by
def test_an_iteration_between_processes_takes_what_the_model_says():
    """Eight processes over lines that delay: the model adds parts up that may overlap, so that it is above or near."""
    from evidence.bench.slow_lines import measured, world

    lines = world(0)
    plan = search(lines, 4, 2, trials=200)
    assert 0.5 * plan.seconds < measured(lines, plan, 1) < 3 * plan.seconds
