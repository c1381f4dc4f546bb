"""Tokens in the place of tokens, drawn so that a draw tells little of what it stands for (local privacy)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import ModelError
from fedllm.models.model import Model

EXACT = 2048
"""Vocabularies of at most so many tokens are calibrated to the last bit; of larger ones the usual bound is taken."""
MADE: weakref.WeakKeyDictionary[Model, Table] = weakref.WeakKeyDictionary()


class Table:
    """A public table of token embeddings, of which tokens are near each other and how likely each one is drawn.

    `tokens` are the ids that may be drawn [V] (special ones never are), `unit` their directions [V, d].
    """

    def __init__(self, tokens: np.ndarray, vectors: np.ndarray) -> None:
        x = vectors.astype(np.float64)
        self.tokens, self.raw = tokens, x
        self.unit = x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)
        self.at = {int(t): i for i, t in enumerate(tokens)}
        self.spread = x.max(0) - x.min(0)  # [d]
        self._scales: dict[float, float] = {}

    @classmethod
    def of(cls, model: Any) -> Table:
        """The table of a model that lies here; ModelError for an endpoint, which shows none."""
        if not isinstance(model, Model):
            raise ModelError("a client that holds an endpoint has no table of token embeddings; let it hold a model "
                             "(clients.models)")
        if model not in MADE:
            weight = model.net.get_input_embeddings().weight.detach().float().cpu().numpy()  # type: ignore[operator]
            tokenizer: Any = model.tokenizer
            ids = np.setdiff1d(np.arange(min(len(tokenizer), len(weight))), list(tokenizer.all_special_ids))
            MADE[model] = cls(ids, weight[ids])
        return MADE[model]

    def likely(self, i: int, scale: float) -> np.ndarray:
        """p(u | token i) ~ exp(scale * cos(i, u)) [V]."""
        z = scale * (self.unit @ self.unit[i])
        p = np.exp(z - z.max())
        return p / p.sum()

    def worst(self, scale: float) -> float:
        """The largest log-ratio of what two tokens may be replaced by: the epsilon of one draw."""
        z = scale * (self.unit @ self.unit.T)  # [V, V]
        top = z.max(1, keepdims=True)
        z -= top + np.log(np.exp(z - top).sum(1, keepdims=True))
        return float((z.max(0) - z.min(0)).max())

    def scale(self, epsilon: float, exact: bool = True) -> float:
        """The largest scale found at which one draw keeps within epsilon; at least epsilon / 4, since cosines differ by
        2 at most and a sum of them by as much again."""
        key = epsilon if exact else -epsilon
        if key not in self._scales:
            low = epsilon / 4
            if exact and len(self.tokens) <= EXACT:
                high = 2 * low
                while self.worst(high) <= epsilon and high < 1e6 * low:
                    low, high = high, 2 * high
                for _ in range(20):
                    middle = (low + high) / 2
                    low, high = (middle, high) if self.worst(middle) <= epsilon else (low, middle)
            self._scales[key] = low
        return self._scales[key]

    def draw(self, ids: Sequence[int], epsilon: float, rng: np.random.Generator, exact: bool = True) -> list[int]:
        """Each token replaced by the exponential mechanism over the whole vocabulary; one id for one id.

        Tokens that may not be drawn (special ones) are replaced as if they were the first that may.
        """
        scale = self.scale(epsilon, exact)
        return [int(self.tokens[rng.choice(len(self.tokens), p=self.likely(self.at.get(int(t), 0), scale))])
                for t in ids]

    def rantext(self, ids: Sequence[int], epsilon: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """RANTEXT (Tong et al. 2023): tokens, and how many candidates each had. Its epsilon is no guarantee: which
        tokens are candidates depends on the token itself."""
        out, sizes = [], []
        for t in ids:
            i = self.at.get(int(t), 0)
            # 1. v' = v + Laplace(0, df / (eps / 2)) for each dimension
            noisy = self.raw[i] + rng.laplace(0.0, np.maximum(self.spread, 1e-12) / (epsilon / 2))
            # 2. candidates: at least as near to v as v' is
            cosines = self.unit @ self.unit[i]
            near = float(self.unit[i] @ noisy / max(np.linalg.norm(noisy), 1e-12))
            found = np.flatnonzero(cosines >= min(near, cosines[i]))
            # 3. p(u) ~ exp(eps / 2 * cos(v, u)) among them
            p = np.exp(epsilon / 2 * (cosines[found] - cosines[found].max()))
            out.append(int(self.tokens[found[rng.choice(len(found), p=p / p.sum())]]))
            sizes.append(len(found))
        return out, sizes


def refuted(draws_one: np.ndarray, draws_other: np.ndarray, size: int, alpha: float = 0.05) -> float:
    """The epsilon that these draws refute with confidence 1 - alpha: draws for one token and for another, as indices.

    The event is chosen on the first half of the draws, and counted on the second (Clopper and Pearson).
    """
    from scipy.stats import beta

    half = len(draws_one) // 2
    a, b = (np.bincount(d[:half], minlength=size) + 0.5 for d in (draws_one, draws_other))
    event = np.log(a / b) > np.log(a / b).max() - 1e-9
    hits, misses = int(event[draws_one[half:]].sum()), int(event[draws_other[half:]].sum())
    n = len(draws_one) - half
    low = beta.ppf(alpha / 2, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(1 - alpha / 2, misses + 1, n - misses) if misses < n else 1.0
    return max(0.0, math.log(low / high)) if low > 0 else 0.0
