"""Cooperative games: generators that ask for the worth of coalitions and return what each player is worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence

import numpy as np

Game = Generator[frozenset[str], float, dict[str, float]]
"""Asks for the worth of coalitions, one after the other, and returns what each player is worth."""


def walk(players: Sequence[str], rng: np.random.Generator, walks: int, eps: float, tolerance: float, window: int,
         cap: float) -> Game:
    """Monte Carlo over orders, each client first in turn; a walk is cut where the rest could change little."""
    whole, seen, phi, past = frozenset(players), set[frozenset[str]](), dict.fromkeys(players, 0.0), []
    all_, most, t = (yield whole), cap * 2 ** len(players), 0
    while True:
        first = players[t % len(players)]
        order = [first, *(str(k) for k in rng.permutation([p for p in players if p != first]))]
        s, v = frozenset[str](), (yield frozenset())
        for k in order:
            new = v
            if abs(all_ - v) >= eps and (s | {k} in seen or len(seen) < most - 2):
                seen.add(s | {k})
                new = yield s | {k}
            phi[k] += (new - v - phi[k]) / (t + 1)  # the mean over the walks so far
            s, v = s | {k}, new
        t += 1
        past.append(np.array(list(phi.values())))
        recent = past[-window - 1 :]
        change = [float(np.mean(np.abs(a - past[-1]) / (np.abs(past[-1]) + 1e-12))) for a in recent[:-1]]
        if (t >= max(walks, len(players)) and change and np.mean(change) <= tolerance) or t >= 500:
            return phi


def exact(players: Sequence[str]) -> Game:
    """phi_k = sum_S |S|! (N - |S| - 1)! / N! (v(S + k) - v(S))."""
    n, phi, v = len(players), dict.fromkeys(players, 0.0), dict[frozenset[str], float]()
    for size in range(n + 1):
        for s in itertools.combinations(players, size):
            v[frozenset(s)] = yield frozenset(s)
    for k in players:
        for s in (s for s in v if k not in s):
            phi[k] += (v[s | {k}] - v[s]) / (n * math.comb(n - 1, len(s)))
    return phi
