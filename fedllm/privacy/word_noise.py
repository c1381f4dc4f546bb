"""Words exchanged for others before a text leaves, so that who reads it cannot be sure of any (InferDPT, FedCoT)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.errors import CompositionError


@dataclass(frozen=True)
class WordNoise:
    """Each token by a draw of its own among all tokens that write something.

    `exponential`: P(u | t) ~ exp(epsilon cos(t, u) / 4), which is epsilon-locally private for every token, since
    cosines differ by 2 at the most. `rantext` (arXiv 2310.12214): P(u | t) ~ exp(epsilon cos(t, u) / 2) among those as
    near as a noisy copy of t; which these are depends on t, so that nothing is proven for it. A text of n tokens spends
    n times as much.
    """

    epsilon: float
    mechanism: Literal["exponential", "rantext"] = "exponential"

    def __call__(self, model: Any, texts: Sequence[str], rng: np.random.Generator) -> tuple[list[str], int]:
        """The texts with other words, as many tokens each, and how many tokens the longest has."""
        tok = model.tokenizer
        if tok is None:
            raise CompositionError("words are exchanged by their embeddings, and this model has no tokenizer")
        unit, allowed, spread = table(model)
        out, most = [], 0
        for text in texts:
            ids = np.array(tok(text, add_special_tokens=False)["input_ids"], np.int64)
            most = max(most, len(ids))
            out.append(tok.decode([self.drawn(unit, allowed, spread, int(t), rng) for t in ids]))
        return out, most

    def drawn(self, unit: np.ndarray, allowed: np.ndarray, spread: np.ndarray, t: int, rng: np.random.Generator) -> int:
        """A token for this one: `unit` [V, d] are embeddings of length 1, `allowed` [M] what may be drawn."""
        near = unit[allowed] @ unit[t]
        if self.mechanism == "exponential":
            p = np.exp(self.epsilon / 4 * (near - near.max()))
        else:
            noisy = unit[t] + rng.laplace(0.0, 2 * spread / self.epsilon)
            far = float(noisy @ unit[t] / max(np.linalg.norm(noisy), 1e-12))
            p = np.where(near >= min(far, near.max()), np.exp(self.epsilon / 2 * (near - near.max())), 0.0)
        return int(rng.choice(allowed, p=p / p.sum()))

    def spent(self, tokens: int) -> float | None:
        """Epsilon of a text of so many tokens; None where nothing is proven."""
        return self.epsilon * tokens if self.mechanism == "exponential" else None


@functools.lru_cache(maxsize=4)
def table(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model's embeddings at length 1 [V, d], the tokens that write something, and each place's spread [d]."""
    e = model.words.double().numpy()
    unit = e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12)
    special = set(model.tokenizer.all_special_ids)
    allowed = np.array([i for i in range(min(len(e), len(model.tokenizer))) if i not in special])
    return unit, allowed, unit.max(0) - unit.min(0)
