"""Masked words: a text some of whose tokens are hidden, and a masked language model that names them (BERT)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.rng import numpy_stream
from fedllm.tasks.classification import texts_of
from fedllm.tasks.row import IGNORE, Encoded, Row, text_of
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, hits, wide

SHARE = 0.15
"""Of a row's tokens are targets: 80 % of them hidden, 10 % another token, 10 % as they were (Devlin et al. 2019)."""


class MaskedWords(Task):
    """Which tokens of a row are hidden follows from its tokens, so that every pass and every test hide the same."""

    net, columns = "masked", ("text",)
    metrics: ClassVar = {"masked_accuracy": Metric("max")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        return {"text": text_of(row, "text", where)}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        if how.tokenizer.mask_token_id is None:
            raise CompositionError(f"data.task = 'masked_words' and the tokenizer {how.tokenizer.name_or_path!r}, "
                                   "which has no mask token, do not fit together; a masked language model works")
        special = np.array(sorted(how.tokenizer.all_special_ids))
        out = []
        for i, (ids, _) in enumerate(texts_of(rows, how), start=1):
            words = np.flatnonzero(~np.isin(ids, special))
            if not len(words):
                raise DataError(f"row {i} has nothing to learn: its text {rows[i - 1]['text'][:40]!r} gives special "
                                "tokens alone")
            out.append(hidden(ids, words, how.tokenizer.mask_token_id, len(how.tokenizer)))
        return out

    def row_losses(self, model: Any, batch: Any) -> Losses:
        rows, cols = (batch.labels != IGNORE).nonzero(as_tuple=True)
        y, z = batch.labels[rows, cols], wide(model.word_logits(batch)[rows, cols])  # [M], [M, V]
        ce, n = F.cross_entropy(z, y, reduction="none"), len(batch.ids)
        right = (z.argmax(-1) == y).to(ce.dtype)
        return (ce.new_zeros(n).index_add(0, rows, ce), torch.bincount(rows, minlength=n).to(ce.dtype),
                ce.new_zeros(n).index_add(0, rows, right))

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        return {"masked_accuracy": hits(figures)}


def hidden(ids: np.ndarray, words: np.ndarray, mask: int, vocabulary: int) -> Encoded:
    """The row with a share of its `words` (one at least) as targets."""
    rng = numpy_stream("masked words", hashlib.sha256(ids.tobytes()).hexdigest())
    at = rng.choice(words, max(1, round(SHARE * len(words))), replace=False)
    labels, seen, lot = np.full(len(ids), IGNORE, np.int64), ids.copy(), rng.random(len(at))
    labels[at] = ids[at]
    seen[at[lot < 0.8]] = mask
    other = at[(lot >= 0.8) & (lot < 0.9)]
    seen[other] = rng.integers(0, vocabulary, len(other))
    return Encoded(seen, labels, len(at))
