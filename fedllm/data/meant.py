"""What of a source may not be meant, though every row can be read: columns that nobody reads, odd labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedllm.data.sources import Table
from fedllm.tasks.chat import COLUMNS
from fedllm.tasks.registry import task_of
from fedllm.tasks.templates import columns_of

INPUTS = ("input", "inputs", "context", "passage", "document", "article", "background", "history", "system",
          "system_prompt", "instruction", "question", "query", "prompt", "premise", "hypothesis", "sentence1",
          "sentence2", "text", "knowledge", "evidence", "options", "choices")
"""Names of columns that people put in for a model to read."""


def unread(task: str, template: str | Mapping[str, str] | None, fields: Mapping[str, str | list[str]],
           tables: Sequence[Table]) -> Iterator[str]:
    """Columns that are named like an input and hold something, and that neither template nor task reads."""
    if not task_of(task).speaks:
        return
    for table in tables:
        columns = list(table.rows[0])
        turns = next((c for c in COLUMNS if c in columns), None)
        read = {turns} if template == "chat" and turns else columns_of(template)
        mapped = [fields.get(name, name) for name in read if name] + list(fields.values())
        taken = {name for one in mapped for name in (one if isinstance(one, list) else [one])}
        for column in columns:
            if column.lower() in INPUTS and column not in taken and any(
                    row.get(column) not in (None, "", [], {}) for row in table.rows):
                yield (f"{table.name}: no row's {column!r} is read by data.template = {template or 'plain'!r}, so that "
                       "the model never sees it; a format string over columns takes it in")
                break


def odd_labels(labels: Sequence[str]) -> Iterator[str]:
    """One class alone, and a -1 among counted classes (where it mostly stands for a label that is not known)."""
    if len(labels) == 1:
        yield f"there is one label alone, {labels[0]!r}: every answer is right, and nothing is learned"
    numbers = {int(x) for x in labels if x.removeprefix("-").isdecimal()}
    if len(numbers) == len(labels) > 2 and -1 in numbers and numbers - {-1} == set(range(len(labels) - 1)):
        yield "the label -1 is a class beside 0, 1, ...; where it stands for 'not known', leave its rows out"
