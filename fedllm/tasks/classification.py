"""Classification: a text, and one of a fixed list of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.tasks.labels import index_of, is_number, label_names, raw_label
from fedllm.tasks.row import IGNORE, Encoded, Row, bad_row, text_of
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, hits, wide


class Classification(Task):
    """A class of a text, by an encoder's pooled states."""

    net, columns, takes = "pooled", ("text", "label"), ("labels",)
    metrics: ClassVar = {"accuracy": Metric("max")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """`label` becomes an index in [0, len(labels))."""
        return {"text": text_of(row, "text", where), "label": index_of(raw_label(row, where), how.labels, where)}

    def came(self, row: Row, labels: tuple[str, ...]) -> bool:
        return isinstance(row.get("text"), str) and type(row.get("label")) is int and 0 <= row["label"] < len(labels)

    def found(self, rows: Iterable[tuple[Row, str]]) -> tuple[str, ...]:
        return label_names(raw_label(row, where) for row, where in rows)

    def agree(self, rows: Iterable[tuple[Row, str]], labels: tuple[str, ...]) -> None:
        one_name(rows, labels)

    def kind(self, row: Row, labels: tuple[str, ...]) -> Any:
        return labels[row["label"]]

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """The tokenizer's own special tokens and truncation."""
        return [Encoded(ids, int(row["label"]), 1, cut=cut) for row, (ids, cut) in zip(rows, texts_of(rows, how),
                                                                                      strict=True)]

    def row_losses(self, model: Any, batch: Any) -> Losses:
        return class_losses(wide(model.class_logits(batch)), batch.labels)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        return {"accuracy": hits(figures)}


def texts_of(rows: Sequence[Row], how: How) -> list[tuple[np.ndarray, str]]:
    """Each row's `text` as tokens, int32, and "text" where `max_length` cut it."""
    got = how.tokens([row["text"] for row in rows], truncation=True, max_length=how.max_length)
    cut = [bool(e.overflowing) for e in got.encodings] if got.encodings else [
        len(one) == how.max_length for one in got["input_ids"]]
    for i, one in enumerate(got["input_ids"], start=1):
        if not one:
            raise bad_row(rows[i - 1], i, f": the text {rows[i - 1]['text'][:40]!r} gives no token", "empty")
    return [(np.array(one, dtype=np.int32), "text" * was) for one, was in zip(got["input_ids"], cut, strict=True)]


def class_losses(z: Tensor, y: Tensor) -> Losses:
    """Cross-entropy of logits [N, C] and labels [N], of which IGNORE counts nothing."""
    good = y != IGNORE
    ce = F.cross_entropy(z, y, ignore_index=IGNORE, reduction="none")
    return ce, good.to(ce.dtype), ((z.argmax(-1) == y) & good).to(ce.dtype)


def one_name(rows: Iterable[tuple[Row, str]], labels: tuple[str, ...]) -> None:
    """A DataError where some rows have a label's name and others its number."""
    if any(is_number(name) for name in labels):  # numbers are names then, and none is a place
        return
    by_name, by_number = "", ""
    for row, where in rows:
        name = str(raw_label(row, where))
        by_name = by_name or (where if name in labels else "")
        by_number = by_number or (where if name not in labels and is_number(name) else "")
        if by_name and by_number:
            raise DataError(f"'label' is one of the names {', '.join(labels)} in {by_name}, and a number in "
                            f"{by_number}; write labels one way")
