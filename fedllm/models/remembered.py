"""Pooled states of rows, kept from one pass to the next where nothing but the classifier above them is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedllm.models.batch import Batch

MOST = 1 << 28
"""Bytes of states that are kept for a model; rows beyond are computed each time."""


class Memo:
    """Token ids of a row -> its pooled states [d]: a frozen body says the same of the same row each time."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Tensor] = {}
        self.bytes = 0
        self.on = False

    def pooled(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """[N, d]; only rows that were never seen pass through the body."""
        lengths = batch.mask.sum(1).tolist()
        ids = batch.ids.cpu().numpy()
        keys = [ids[i, :n].tobytes() for i, n in enumerate(lengths)]
        new = [i for i, key in enumerate(keys) if key not in self.rows]
        fresh: dict[bytes, Tensor] = {}
        if new:
            at = torch.tensor(new, device=batch.ids.device)
            with torch.no_grad():
                made = compute(Batch(1, batch.ids[at], batch.mask[at], batch.labels[at]))
            fresh = {keys[i]: made[j] for j, i in enumerate(new)}
            if self.bytes < MOST:
                self.rows |= {key: x.clone() for key, x in fresh.items()}
                self.bytes += made.numel() * made.element_size()
        return torch.stack([self.rows[key] if key in self.rows else fresh[key] for key in keys])


def frozen_body(model: Any) -> bool:
    """Whether nothing below the classifier is trained, and rows are right-padded words alone."""
    return model.rules.net == "pooled" and all(n.startswith("classifier.") for n in model.initial())


@contextlib.contextmanager
def remembering(model: Any) -> Iterator[None]:
    """Within, rows that were seen before do not pass through a frozen body again."""
    memo: Memo = model.memo
    before, memo.on = memo.on, memo.on or frozen_body(model)
    try:
        yield
    finally:
        memo.on = before
