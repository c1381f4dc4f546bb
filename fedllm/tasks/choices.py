"""Multiple choice by likelihood: a row's `choices`, each as the model would answer it, and which of them is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import DataError
from fedllm.tasks.answers import letter_in, same_answer
from fedllm.tasks.row import Row, bad_row
from fedllm.tasks.templates import Render, as_response

FIGURE = "choice_likelihood"
"""The share of rows of which the right option is the likeliest."""


def options(rows: Sequence[Row]) -> list[tuple[list[Row], int]]:
    """For each row the same row once with each of its options as the answer, and the index of the right one; empty
    where no row has any. A DataError names a row that has none where others do, or whose answer is none of them."""
    if not any("choices" in row for row in rows):
        return []
    return [_options(row, i) for i, row in enumerate(rows, start=1)]


def _options(row: Row, i: int) -> tuple[list[Row], int]:
    said = row.get("choices")
    if not said:
        raise bad_row(row, i, ": it has no 'choices', and other rows have; evaluate.metric 'choice' needs them in all "
                      "rows or in none", "value")
    return [_with(row, text) for text in said], _right(row, said, i)


def _with(row: Row, text: str) -> Row:
    """The row with another answer."""
    turns = row.get("messages")
    talk = {"messages": [*turns[:-1], {"role": turns[-1]["role"], "content": text}]} if turns else {}
    return {**row, "response": text, **talk}


def _right(row: Row, said: Sequence[str], i: int) -> int:
    """The option that is the row's answer, or that its letter names."""
    same = [k for k, text in enumerate(said) if same_answer(text, row["response"])]
    if same:
        return same[0]
    letter = letter_in(row["response"])
    at = ord(letter) - ord("A") if letter else len(said)
    if at >= len(said):
        raise bad_row(row, i, f": its answer {str(row['response'])[:40]!r} is none of its {len(said)} choices, nor the "
                      "letter of one", "value")
    return at


def picked(losses: np.ndarray, made: Sequence[tuple[Sequence[Any], int]]) -> list[float]:
    """For each row 1.0 where the right option has the least loss, from the summed losses of all options in a row."""
    out, at = [], 0
    for each, right in made:
        mine = losses[at : at + len(each)]
        out.append(float(int(np.argmin(mine)) == right))  # of equals the first: no option gains by a tie
        at += len(each)
    return out


def shaped_choices(row: Row, where: str, render: Render) -> dict[str, list[str | None]]:
    """`choices` as the template writes a response; nothing where the row has none, or no one field is the response."""
    made = [as_response(render, row, text, where) for text in _choices(row, where) or ()]
    return {"choices": made} if made and None not in made else {}


def _choices(row: Row, where: str) -> list[str] | None:
    """The row's options: a list of texts, or an object with a list `text` (as ARC has); None of any other column."""
    said = row.get("choices")
    if isinstance(said, Mapping):
        said = said.get("text")
    if not isinstance(said, Sequence) or isinstance(said, str) or not all(isinstance(c, str) for c in said):
        return None
    if len(said) < 2 or not all(c.strip() for c in said):
        raise DataError(f"{where}: 'choices' must hold two texts or more, none of them empty", kind="value")
    return list(said)
