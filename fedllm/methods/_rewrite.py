"""Responses in the model's own words: what a client makes once of its rows before it trains (FedSD, FedSDR)."""

from __future__ import annotations

from typing import Any

from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.payload import Tree

ASKED = "{prompt}\nReference answer: {response}\nThe same answer in your own words:\n"


def need_generation(name: str, model: Any) -> None:
    """Rows must have a prompt and a response."""
    if model.task != "generation":
        raise CompositionError(f"method '{name}' and data.task = {model.task!r} do not fit together: it rewrites "
                               "responses; use data.task = 'generation'")


def rewritten(client: Client, theta: Tree, how: str, field: str, longest: float, tokens: int) -> list[Any]:
    """The client's rows, tokenized, with rewritten responses: made once, with the model that came first, and kept.

    `how`: the `model` is asked, with prompt and reference; `field`: the rows bring them in this column; `identity`:
    they stay. A rewrite that is empty, or more than `longest` times as long as the reference, is not taken.
    """
    rows = client.data
    said = client.memory.get("rewritten")
    if said is None or len(said) != len(rows):
        said = [row["response"] for row in rows]
        if how == "field":
            if lacking := [i for i, row in enumerate(rows, 1) if not isinstance(row.get(field), str)]:
                raise DataError(f"row {lacking[0]} has no text in {field!r}, which method.field names for rewritten "
                                f"responses; it has {', '.join(map(str, rows[lacking[0] - 1]))}")
            made = [row[field] for row in rows]
        else:
            made = said if how == "identity" else client.generate(
                [ASKED.format(**row) for row in rows], theta, max_new_tokens=tokens)
        said = [new if new.strip() and len(new) <= longest * len(old) else old
                for new, old in zip(made, said, strict=True)]
        client.memory["rewritten"] = said
    return list(client.encode([{**row, "response": text} for row, text in zip(rows, said, strict=True)]))
