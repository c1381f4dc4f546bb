"""Preference: a prompt with a response that was chosen and one that was rejected, as DPO and reward models take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.tasks.chat import messages_of
from fedllm.tasks.generation import answered, joined, next_words
from fedllm.tasks.row import IGNORE, Encoded, Placed, Row, bad_row, text_of
from fedllm.tasks.task import How, Losses, Metric, Shape, Task
from fedllm.tasks.templates import exchange, template
from fedllm.tasks.tools import said_in, tools_of

REJECTED = ("rejected_ids", "rejected_mask", "rejected_labels")


class Preference(Task):
    """A plain fit learns the chosen response; an objective may look at the rejected one, in the row's parts."""

    net, columns, takes = "causal", ("prompt", "chosen", "rejected"), ("template",)
    metrics: ClassVar = {"preference_accuracy": Metric("max")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        if how.template is template("chat"):
            return _talks(row, where)
        if odd := next((n for n in ("prompt", "chosen", "rejected") if isinstance(row.get(n), list)), None):
            raise DataError(f"{where}: {odd!r} is a list of turns; data.template = 'chat' reads those", kind="chat")
        said = {name: text_of(row, name, where) for name in ("chosen", "rejected")}
        if bad := [name for name, text in said.items() if not text.strip()]:
            raise DataError(f"{where}: {bad[0]!r} is {said[bad[0]]!r:.80}; a preference row needs text in chosen and "
                            "in rejected")
        if said["chosen"].strip() == said["rejected"].strip():
            raise DataError(f"{where}: 'chosen' and 'rejected' are the same text, so that nothing is preferred")
        made = {name: how.template({**row, "response": text}, where) for name, text in said.items()}
        return {"prompt": made["chosen"]["prompt"], **{name: m["response"] for name, m in made.items()}}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """The chosen response after the prompt, as in generation; the rejected one after the prompt lies in parts."""
        better, worse = side(rows, "chosen", how), side(rows, "rejected", how)
        return [replace(a, parts=_parts(b), pads={n: float(IGNORE if n == REJECTED[2] else 0) for n in REJECTED})
                for a, b in zip(better, worse, strict=True)]

    def row_losses(self, model: Any, batch: Any) -> Losses:
        return next_words(model, batch)

    def figures(self, model: Any, batch: Any) -> Tensor:
        """The chosen response's losses; a hit where it is likelier than the rejected one."""
        total, count, _ = next_words(model, batch)
        ids, mask, labels = (batch.parts[n] for n in REJECTED)
        mask = mask.clone()
        mask[~mask.any(1), 0] = True  # rows that fill a lane: an empty mask would make attention NaN
        other, _, _ = next_words(model, replace(batch, ids=ids.long(), mask=mask.bool(), labels=labels, parts={}))
        good = count > 0
        return torch.stack([x.double() for x in (total, count, (total < other) & good, good)], 1)

    def measured(self, figures: np.ndarray, labels: tuple[str, ...]) -> dict[str, float]:
        return {"preference_accuracy": float(figures[:, 2].sum() / max(1.0, figures[:, 3].sum()))}


def _talks(row: Row, where: str) -> dict[str, Any]:
    """The row as two conversations that differ in their last turn: chosen and rejected are texts, the last turns, or
    whole conversations; the prompt is a text or the turns before."""
    before, talks = row.get("prompt"), {}
    for name in ("chosen", "rejected"):
        said = row.get(name)
        if isinstance(said, list):
            said = said if any(_role(t) in ("user", "human") for t in said) else [*_asked(row, before, where), *said]
        elif isinstance(before, list):
            said = [*before, {"role": "assistant", "content": text_of(row, name, where)}]
        else:
            said = exchange(row, text_of(row, "prompt", where), text_of(row, name, where), where)
        talks[name] = messages_of({"messages": said}, f"{where}, {name}") or []
    one, two = talks["chosen"], talks["rejected"]
    if one == two or one[:-1] != two[:-1]:
        why = "are the same, so that nothing is preferred" if one == two else "differ before their last turn"
        raise DataError(f"{where}: 'chosen' and 'rejected' {why}", kind="chat")
    tools = tools_of(row, where)
    return {"talks": talks, "prompt": said_in(one[-2]), "chosen": said_in(one[-1]), "rejected": said_in(two[-1]),
            **({"tools": tools} if tools else {})}


def _role(turn: Any) -> str:
    return str(turn.get("role", turn.get("from"))) if isinstance(turn, Mapping) else ""


def _asked(row: Row, before: Any, where: str) -> list[Any]:
    return before if isinstance(before, list) else exchange(row, text_of(row, "prompt", where), "", where)[:-1]


def side(rows: Sequence[Row], which: str, how: How) -> list[Encoded]:
    """One response of each row ("chosen" or "rejected") after its prompt, as a row of generation."""
    if any("talks" in row for row in rows):
        last = replace(how, every_turn=False)
        out = [answered(_talk(row, which), i, last) for i, row in enumerate(rows, start=1)]
    else:
        out = joined(rows, [(row["prompt"], row[which]) for row in rows], how)
    for i, encoded in enumerate(out, start=1):
        if not encoded.n_target:
            raise bad_row(rows[i - 1], i, f" has nothing to learn: {which!r} gives no token to predict from a token "
                          "before it", "empty")
    return out


def _talk(row: Row, which: str) -> Row:
    """One of the row's conversations, at the row's place."""
    made = {**row, "messages": row["talks"][which]}
    return Placed(made, row.file, row.row, row.line) if isinstance(row, Placed) else made


def chosen(row: Encoded) -> Encoded:
    """The prompt with the chosen response alone."""
    return replace(row, parts={}, pads={})


def rejected(row: Encoded) -> Encoded:
    """The prompt with the rejected response alone."""
    ids, _, labels = (row.parts[name] for name in REJECTED)
    return Encoded(ids.astype(np.int32), labels, int((labels[1:] != IGNORE).sum()))


def _parts(row: Encoded) -> Mapping[str, np.ndarray]:
    assert isinstance(row.labels, np.ndarray)
    return dict(zip(REJECTED, (row.ids.astype(np.int64), np.ones(len(row.ids), bool), row.labels), strict=True))
