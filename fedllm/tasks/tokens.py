"""Token classification: words, and a tag for each, as in named-entity recognition (BIO, IO or plain tags)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError, ModelError
from fedllm.tasks.labels import index_of, label_names
from fedllm.tasks.row import IGNORE, Encoded, Row, value_of
from fedllm.tasks.task import How, Losses, Metric, Shape, Task, hits, wide

OUTSIDE = "O"
ALLOWED, TARGET = "allowed", "target"
"""Parts by which a row may soften its tags, each [T, C]: tags that a token may have (0 or 1), or how likely each is."""


class Tokens(Task):
    """A tag for each word, by an encoder's states; the first piece of a word has its tag, and the others none."""

    net, columns, takes = "tokens", ("tokens", "tags"), ("labels",)
    metrics: ClassVar = {"entity_f1": Metric("max"), "macro_f1": Metric("max"), "tag_accuracy": Metric("max")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """`tags` become indices in [0, len(labels))."""
        words, tags = _lists(row, where)
        return {"tokens": words, "tags": [index_of(tag, how.labels, where, "tags") for tag in tags]}

    def found(self, rows: Iterable[tuple[Row, str]]) -> tuple[str, ...]:
        """The tags of all rows, `O` first, B-x beside I-x."""
        seen = set(label_names(tag for row, where in rows for tag in _lists(row, where)[1]))
        return tuple(sorted(seen, key=lambda tag: (tag != OUTSIDE, entity_type(tag) or "", tag)))

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """Words that `max_length` cuts off are neither learned nor scored."""
        got = how.tokens([list(row["tokens"]) for row in rows], is_split_into_words=True, truncation=True,
                         max_length=how.max_length)
        if not how.tokenizer.is_fast:
            raise ModelError(f"data.task = 'tokens' and the tokenizer {how.tokenizer.name_or_path!r}, which cannot say "
                             "which word a token is of, do not fit together; a fast tokenizer works")
        out = []
        for i, row in enumerate(rows):
            labels, last = [], None
            for word in got.word_ids(i):
                labels.append(IGNORE if word is None or word == last else int(row["tags"][word]))
                last = word
            count = sum(label != IGNORE for label in labels)
            if not count:
                raise DataError(f"row {i + 1} has nothing to learn: none of its {len(row['tokens'])} words gives a "
                                "token")
            out.append(Encoded(np.array(got["input_ids"][i], np.int32), np.array(labels, np.int64), count))
        return out

    def row_losses(self, model: Any, batch: Any) -> Losses:
        """Cross-entropy of the tags, or of what a row's parts `target` or `allowed` say in their place."""
        return _losses(wide(model.class_logits(batch)), batch)

    def figures(self, model: Any, batch: Any) -> Tensor:
        """The losses, then for each type: entities found right, said, and there."""
        z = wide(model.class_logits(batch))
        types, said, there = entity_types(model.labels), z.argmax(-1).cpu().numpy(), batch.labels.cpu().numpy()
        counts = np.zeros((len(there), len(types), 3))
        for i, (mine, truth) in enumerate(zip(said, there, strict=True)):
            at = truth != IGNORE if truth.ndim else np.zeros(0, bool)
            got, want = (spans([model.labels[t] for t in tags[at]]) for tags in (mine, truth))
            for j, kind in enumerate(types):
                a, b = ({s for s in found if s[0] == kind} for found in (got, want))
                counts[i, j] = len(a & b), len(a), len(b)
        own = torch.from_numpy(counts.reshape(len(there), -1)).to(z.device)
        return torch.cat([torch.stack([x.double() for x in _losses(z, batch)], 1), own], 1)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        """Entities count where type, first and last word are right; the macro mean is over types said or there."""
        right, said, there = figures[:, 3:].sum(0).reshape(-1, 3).T  # each [types]
        known = said + there > 0
        each = 2 * right[known] / (said + there)[known]
        total = (said + there).sum()
        return {"entity_f1": float(2 * right.sum() / total) if total else 1.0,
                "macro_f1": float(each.mean()) if known.any() else 1.0, "tag_accuracy": hits(figures)}


def _losses(z: Tensor, batch: Any) -> Losses:
    """z [N, T, C]."""
    good, logp = batch.labels != IGNORE, z.log_softmax(-1)
    if TARGET in batch.parts:
        ce = -(batch.parts[TARGET].to(z.dtype) * logp).sum(-1)
    elif ALLOWED in batch.parts:  # -log of all that a token may be; where nothing is scored, everything may
        ce = -logp.masked_fill((batch.parts[ALLOWED] == 0) & good[..., None], float("-inf")).logsumexp(-1)
    else:
        ce = -logp.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    right = (z.argmax(-1) == batch.labels) & good
    return (ce * good).sum(1), good.sum(1).to(z.dtype), right.sum(1).to(z.dtype)


def _lists(row: Row, where: str) -> tuple[list[str], list[Any]]:
    words, tags = value_of(row, "tokens", where), value_of(row, "tags", where)
    for name, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            raise DataError(f"{where}: {name!r} is {value!r:.80}; it must be a list of strings")
    if len(words) != len(tags) or not words:
        raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags; every token must have one tag")
    return [str(w) for w in words], tags


def entity_type(tag: str) -> str | None:
    """`person` of `B-person`; of a tag without a prefix itself; None of `O`."""
    return None if tag == OUTSIDE else tag[2:] if tag[:2] in ("B-", "I-") else tag


def entity_types(labels: Iterable[str]) -> list[str]:
    """The types that a list of tags speaks of, sorted."""
    return sorted({kind for tag in labels if (kind := entity_type(tag))})


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity; an I-x that goes on from nothing begins one."""
    found, begin = set(), 0
    for i in range(len(tags) + 1):
        before = entity_type(tags[i - 1]) if i else None
        now = entity_type(tags[i]) if i < len(tags) else None
        fresh = now != before or (i < len(tags) and tags[i].startswith("B-"))
        if before and fresh:
            found.add((before, begin, i))
        if fresh:
            begin = i
    return found
