"""Documents: texts that are searched, and from which nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.tasks.row import Encoded, Row, text_of
from fedllm.tasks.task import How, Losses, Shape, Task


class Documents(Task):
    """Rows that a site indexes, under ids; in a test a row is a query, with the ids of documents that answer it. The
    network is an encoder, there for its vectors: its head is asked nothing."""

    net, columns, outputs = "pooled", ("text",), 1

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """`id` (text) and `relevant` (ids of documents, or ids and grades) stay where they are."""
        stays = {name: row[name] for name in ("relevant",) if row.get(name) is not None}
        return {"text": text_of(row, "text", where), **stays,
                **({"id": str(row["id"])} if row.get("id") is not None else {})}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        raise CompositionError("data.task = 'documents': documents are searched, and nothing is learned from them; "
                               "allowed is a method that answers questions (fed_rag)")

    def row_losses(self, model: Any, batch: Any) -> Losses:
        raise CompositionError("data.task = 'documents' has no loss")
