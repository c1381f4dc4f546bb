"""Next items: what a user took so far, and which of all items comes next; also for language models, by the names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.tasks.classification import class_losses, texts_of
from fedllm.tasks.labels import index_of
from fedllm.tasks.row import IGNORE, Encoded, Row, text_of, value_of
from fedllm.tasks.rules import Rule, item_knn, popularity
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, wide

HISTORY = "history"
CUT = 10
"""The k of HR@k and NDCG@k."""


class NextItem(Task):
    """A ranking of all items (of the shop, where names say one), with no sampling of others; an item's name is its
    label. A model with a tokenizer reads the history's names, one without their numbers."""

    net, columns, takes, bare = "pooled", (HISTORY, "item"), ("labels",), True
    metrics: ClassVar = {"ndcg10": Metric("max"), "hr10": Metric("max")}
    rules: ClassVar[Mapping[str, Rule]] = {"popularity": popularity, "item_knn": item_knn}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """Both become indices in [0, len(labels))."""
        known = _places(how.labels)
        return {HISTORY: [known[i] if i in known else index_of(i, how.labels, where, HISTORY)
                          for i in _history(row, where)],
                "item": known[i] if (i := text_of(row, "item", where)) in known else index_of(
                    i, how.labels, where, "item"),
                "text": "; ".join(_history(row, where))}

    def found(self, rows: Iterable[tuple[Row, str]]) -> tuple[str, ...]:
        return tuple(sorted({item for row, at in rows for item in (*_history(row, at), text_of(row, "item", at))}))

    def kind(self, row: Row, labels: tuple[str, ...]) -> Any:
        return shop_of(labels[row["item"]]) or None

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """Its items [T], and where there is a tokenizer the tokens of their names."""
        items = [np.array(row[HISTORY], np.int64) for row in rows]
        read = [(x.astype(np.int32), "") for x in items] if how.tokenizer is None else texts_of(rows, how)
        return [Encoded(ids, int(row["item"]), 1, {HISTORY: x}, {HISTORY: -1.0}, cut)
                for row, x, (ids, cut) in zip(rows, items, read, strict=True)]

    def row_losses(self, model: Any, batch: Any) -> Losses:
        return class_losses(within(wide(model.class_logits(batch)), batch.labels, model.labels), batch.labels)

    def figures(self, model: Any, batch: Any) -> Tensor:
        """The losses, then HR@10 and NDCG@10 of the row."""
        z = within(wide(model.class_logits(batch)), batch.labels, model.labels)
        losses = torch.stack([x.double() for x in class_losses(z, batch.labels)], 1)
        return torch.cat([losses, ranked(z, batch.labels)], 1)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        count = max(1.0, figures[:, 1].sum())
        return {"ndcg10": float(figures[:, 4].sum() / count), "hr10": float(figures[:, 3].sum() / count)}

    def by_rule(self, name: str, train: Sequence[Encoded], test: Sequence[Encoded], labels: tuple[str, ...]
                ) -> dict[str, float]:
        scores = torch.from_numpy(self.rules[name](train, test, len(labels)))  # [N, C]
        y = torch.tensor([int(e.labels) for e in test])
        got = ranked(within(scores, y, labels), y).mean(0)
        return {"n": len(test), "ndcg10": float(got[1]), "hr10": float(got[0])}


def shop_of(name: str) -> str:
    """What stands before an item's first slash."""
    return name.partition("/")[0] if "/" in name else ""


def within(z: Tensor, y: Tensor, labels: Sequence[str]) -> Tensor:
    """Scores [N, C], of which those of other shops than the wanted item's can win nothing."""
    names = [shop_of(label) for label in labels]
    known = sorted(set(names))
    if len(known) == 1:
        return z
    shop = torch.tensor([known.index(n) for n in names], device=z.device)
    return z.masked_fill(shop[None] != shop[y.clamp(min=0)][:, None], torch.finfo(z.dtype).min)


def ranked(z: Tensor, y: Tensor) -> Tensor:
    """HR@10 and NDCG@10 of each row [N, 2], fp64; equal scores share their ranks' mean, so that no order helps."""
    z, at = z.double(), y.clamp(min=0)[:, None]
    mine = z.gather(1, at)
    rank = 1 + (z > mine).sum(1) + 0.5 * ((z == mine).sum(1) - 1)
    hit = ((rank <= CUT) & (y != IGNORE)).double()
    return torch.stack([hit, hit / torch.log2(1 + rank)], 1)


@functools.lru_cache(maxsize=4)
def _places(labels: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(labels)}


def _history(row: Row, where: str) -> list[str]:
    items = value_of(row, HISTORY, where)
    if not isinstance(items, list) or not items or not all(isinstance(i, str) and i.strip() for i in items):
        raise DataError(f"{where}: 'history' is {items!r:.80}; it must be a list of items' names, one at least")
    return items
