"""Which machine does what over slow lines: DT-FM's cost of data and pipeline parallel, and a search for the cheapest.

Yuan et al., Decentralized Training of Foundation Models in Heterogeneous Environments, NeurIPS 2022, arXiv
2206.01288. N = stages * replicas machines with pairwise delay A [N, N] (seconds) and bandwidth B [N, N] (bytes a
second; 0: no line).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from fedllm.core.errors import RecipeError

EXACT = 14
"""Of so many stages at most the cheapest order is found exactly: the table has 2^stages rows."""
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Lines:
    """The network, and what crosses it in an iteration."""

    delay: np.ndarray
    bandwidth: np.ndarray
    c_dp: float
    """Bytes of one stage's gradients."""
    c_pp: float
    """Bytes of one micro-batch's states between two stages."""

    def __post_init__(self) -> None:
        n = len(self.delay)
        for name, m in (("delay", self.delay), ("bandwidth", self.bandwidth)):
            if m.shape != (n, n) or not (m >= 0).all() or not np.isfinite(m).all():
                raise RecipeError(f"{name} has shape {m.shape}; allowed is [{n}, {n}], finite and from 0 up: seconds "
                                  "and bytes a second between each two machines")
        if self.c_dp <= 0 or self.c_pp <= 0:
            raise RecipeError(f"c_dp = {self.c_dp:g} and c_pp = {self.c_pp:g}: both must be > 0, in bytes")

    def seconds(self, size: float) -> np.ndarray:
        """[N, N]: of so many bytes on each line; infinite where there is none."""
        with np.errstate(divide="ignore"):
            return np.where(self.bandwidth > 0, self.delay + size / self.bandwidth, np.inf)


@dataclass(frozen=True)
class Schedule:
    """The machines of each stage in the pipeline's order (replica r is column r), and what an iteration costs."""

    stages: Groups
    seconds: float


def data_cost(lines: Lines, groups: Groups) -> float:
    """The slowest group's exchange, each member a server for its share: max_i sum_j 2 (A_ij + c_dp / (k B_ij))."""
    worst = 0.0
    for group in groups:
        t = lines.seconds(lines.c_dp / len(group))[np.ix_(group, group)]
        np.fill_diagonal(t, 0.0)
        worst = max(worst, float(2 * t.sum(1).max()))
    return worst


def match(lines: Lines, a: Sequence[int], b: Sequence[int]) -> tuple[float, list[int]]:
    """The pairing of two groups whose slowest line is quickest, and its seconds; infinite where none is whole."""
    t = lines.seconds(lines.c_pp)[np.ix_(a, b)]
    levels = np.unique(t[np.isfinite(t)])
    low, high, found = 0, len(levels) - 1, None
    while low <= high:  # the least bar below which a whole pairing is left
        mid = (low + high) // 2
        rows, cols = linear_sum_assignment(t > levels[mid])
        if not (t[rows, cols] > levels[mid]).any():
            found, high = (float(levels[mid]), [b[c] for c in cols]), mid - 1
        else:
            low = mid + 1
    return found or (np.inf, list(b))


def order(costs: np.ndarray) -> tuple[float, list[int]]:
    """The cheapest open path through all groups [S, S]: exactly up to 14 of them, above by swaps from the nearest."""
    n = len(costs)
    if n > EXACT:
        return _swapped(costs)
    best = {(1 << i, i): (0.0, [i]) for i in range(n)}
    for size in range(2, n + 1):
        for some in itertools.combinations(range(n), size):
            mask = sum(1 << i for i in some)
            for last in some:
                ways = ((best[mask ^ (1 << last), p][0] + costs[p, last], p) for p in some if p != last)
                total, before = min(ways)
                best[mask, last] = total, [*best[mask ^ (1 << last), before][1], last]
    return min((best[(1 << n) - 1, i] for i in range(n)), key=lambda x: x[0])


def _swapped(costs: np.ndarray) -> tuple[float, list[int]]:
    def length(path: Sequence[int]) -> float:
        return float(sum(costs[a, b] for a, b in itertools.pairwise(path)))

    paths = []
    for start in range(len(costs)):
        path = [start]
        while left := [i for i in range(len(costs)) if i not in path]:
            path.append(min(left, key=lambda i: costs[path[-1], i]))
        paths.append(path)
    path = min(paths, key=length)
    for i, j in itertools.combinations(range(len(costs) + 1), 2):  # 2-opt
        turned = [*path[:i], *path[i:j][::-1], *path[j:]]
        path = min(path, turned, key=length)
    return length(path), path


def cost(lines: Lines, groups: Groups) -> Schedule:
    """DATAP + 2 PIPELINEP of these groups, with the order and the pairs that it takes."""
    n = len(groups)
    costs = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        costs[i, j] = costs[j, i] = match(lines, groups[i], groups[j])[0]
    pipeline, path = order(costs)
    stages = [tuple(groups[path[0]])]
    for g in path[1:]:
        stages.append(tuple(match(lines, stages[-1], groups[g])[1]))
    return Schedule(tuple(stages), data_cost(lines, groups) + 2 * pipeline)


def search(lines: Lines, stages: int, replicas: int, *, trials: int = 1600, population: int = 24,
           seed: int = 0) -> Schedule:
    """The cheapest schedule that a memetic search over balanced groups finds; the same for the same seed.

    RecipeError where stages * replicas is not the number of machines, or no schedule has lines for all it sends.
    """
    n = len(lines.delay)
    if stages < 1 or replicas < 1 or stages * replicas != n:
        raise RecipeError(f"stages = {stages} and replicas = {replicas} need {stages * replicas} machines, and there "
                          f"are {n}; their product must be {n}")
    rng = np.random.default_rng(seed)
    known: dict[Groups, float] = {}

    def worth(label: np.ndarray) -> float:
        groups = groups_of(label, stages)
        if groups not in known:
            known[groups] = cost(lines, groups).seconds
        return known[groups]

    def climbed(label: np.ndarray) -> np.ndarray:
        """Better by swaps of two machines, as long as one of a few tries helps."""
        for _ in range(4 * n):
            i, j = rng.choice(n, 2, replace=False)
            other = label.copy()
            other[[i, j]] = label[[j, i]]
            if label[i] != label[j] and worth(other) < worth(label):
                label = other
        return label

    pool = [rng.permutation(np.repeat(np.arange(stages), replicas)) for _ in range(population)]
    for _ in range(max(1, trials // (4 * n))):
        a, b = rng.choice(population, 2, replace=False)
        worse = a if worth(pool[a]) > worth(pool[b]) else b
        child = climbed(balanced(np.where(rng.random(n) < 0.5, pool[a], pool[b]), stages, replicas, rng))
        if worth(child) <= worth(pool[worse]):
            pool[worse] = child
    best = cost(lines, groups_of(min(pool, key=worth), stages))
    if not np.isfinite(best.seconds):
        raise RecipeError("no schedule was found in which all machines that must talk have lines (bandwidth > 0)")
    return best


def groups_of(label: np.ndarray, stages: int) -> Groups:
    """The machines of each label, in a form that does not depend on which label is whose."""
    return tuple(sorted(tuple(int(i) for i in np.flatnonzero(label == s)) for s in range(stages)))


def balanced(label: np.ndarray, stages: int, replicas: int, rng: np.random.Generator) -> np.ndarray:
    """The same with every label `replicas` times: some of those that are too many become those that are too few."""
    label = label.copy()
    few = [s for s in range(stages) for _ in range(replicas - int((label == s).sum()))]
    many = np.concatenate([rng.permutation(np.flatnonzero(label == s))[replicas:] for s in range(stages)])
    label[many] = few
    return label
