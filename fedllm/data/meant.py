"""What of a source may not be meant, though every row can be read: columns that nobody reads, odd labels, rows and ids
that are there twice."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from fedllm.data.table import Table
from fedllm.tasks.chat import COLUMNS
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import Row, drawn, looks
from fedllm.tasks.task import Task
from fedllm.tasks.templates import columns_of, told_before

INPUTS = ("input", "inputs", "context", "passage", "document", "article", "background", "history", "system",
          "system_prompt", "instruction", "question", "query", "prompt", "premise", "hypothesis", "sentence1",
          "sentence2", "text", "knowledge", "evidence", "options", "choices", "sentence", "text_a", "text_b",
          "sentence_1", "sentence_2", "image", "images", "picture", "audio", "video")
"""Names of columns that people put in for a model to read."""

QUOTES = "\"'`\u201c\u201d\u2018\u2019"
JOINS = re.compile(r"(?<=\w)[\s_/\u2013\u2014-]+(?=\w)")
SAME = (("yes", "y", "true", "t", "positive", "pos"), ("no", "n", "false", "f", "negative", "neg"))
"""Words that mean one thing where a label is one of two."""
MISSING = ("nan", "none", "null", "na", "n/a", "nil", "missing", "undefined")
"""What programs write where a value is missing."""


def unread(task: str, template: str | Mapping[str, str] | None, fields: Mapping[str, str | list[str]],
           tables: Sequence[Table]) -> Iterator[str]:
    """Columns that are named like an input and hold something, and that neither template nor task reads; what
    `fields` maps for nobody; a prompt that tells the response."""
    made = task_of(task)
    framed = "template" in made.takes
    if (not framed and made.columns[0] != "text") or task == "documents":
        return
    by = f"data.template = {template or 'plain'!r}" if framed else f"data.task = {task!r}"
    how = "a format string over columns takes it in" if framed else "data.fields.text = [...] joins columns"
    if framed and (both := told_before(template)):
        yield f"{by} puts {both[0]!r} into the prompt and into the response: the answer is told before it is asked"
    for table in tables:
        columns = list(table.rows[0])
        read = _read(made, template, [*columns, *fields])
        yield from _for_nobody({n: c for n, c in fields.items() if isinstance(c, list) or c not in read}, read, by)
        mapped = [fields.get(name, name) for name in read] + [c for n, c in fields.items() if n not in INPUTS]
        taken = {name for one in mapped for name in (one if isinstance(one, list) else [one])}
        for column in columns:
            if column.lower() in INPUTS and column not in taken and any(
                    row.get(column) not in (None, "", [], {}) for row in table.rows):
                yield (f"{table.name}: no row's {column!r} is read by {by}, so that the model never sees it; {how}")
                break


def _read(task: Task, template: str | Mapping[str, str] | None, columns: Sequence[str]) -> set[str]:
    """The fields that are made into what the model reads and learns."""
    if "template" not in task.takes:
        return set(task.columns)
    turns = [c for c in COLUMNS if c in columns] if template == "chat" else []
    read = {turns[0], "tools"} if turns and task.speaks else columns_of(template)
    return read | (set() if task.speaks else set(task.columns))


def _for_nobody(fields: Mapping[str, str | list[str]], read: set[str], by: str) -> Iterator[str]:
    for ours in (n for n in fields if n not in read):
        meant = difflib.get_close_matches(ours, sorted(read), n=1, cutoff=0.75)
        if ours in INPUTS or meant:
            yield (f"data.fields.{ours}: {by} reads no {ours!r}, so that the model never sees it"
                   + (f"; did you mean {meant[0]!r}?" if meant else ""))


def odd_labels(labels: Sequence[str]) -> Iterator[str]:
    """One class alone, a word for what is missing, and a -1 among counted classes (where it mostly stands for a label
    that is not known)."""
    missing = [x for x in labels if x.strip(" <>[]").casefold() in MISSING]
    if missing and len(labels) > 1:
        yield f"the label {missing[0]!r} is a class of its own; where it stands for 'not known', leave its rows out"
    yield from _spelled(labels)
    if len(labels) == 1:
        yield f"there is one label alone, {labels[0]!r}: every answer is right, and nothing is learned"
    numbers = {int(x) for x in labels if x.removeprefix("-").isdecimal()}
    if len(numbers) == len(labels) > 2 and -1 in numbers and numbers - {-1} == set(range(len(labels) - 1)):
        yield "the label -1 is a class beside 0, 1, ...; where it stands for 'not known', leave its rows out"


def _spelled(labels: Sequence[str]) -> Iterator[str]:
    """Two labels that one person may write for the other: with other marks, or as another word for yes or no."""
    seen: dict[str, str] = {}
    for label in labels:
        bare = JOINS.sub(" ", label.strip(QUOTES)).rstrip(".,;:").casefold()
        if bare and (other := seen.setdefault(bare, label)) != label:
            yield (f"the labels {other!r:.80} and {label!r:.80} are two classes and differ in marks alone (quotes, "
                   "_, -, a full stop); write them one way if they are one")
    for words in SAME:
        if len(both := [x for x in labels if x.strip().casefold() in words]) > 1:
            yield (f"the labels {both[0]!r} and {both[1]!r} are two classes; write them one way if they mean the same")


def twice(train: Sequence[Row], test: Sequence[Row], name: str = "the global test", but: Collection[str] = (), *,
          among: str = "the training rows", so: str = "what is measured on them is memory") -> Iterator[str]:
    """Rows of a test that are trained on, word for word (blanks, case and the fields `but` aside)."""
    if not test:
        return
    known = {_key(row, but) for row in train}
    if both := sum(_key(row, but) in known for row in test):
        yield f"{both} of {len(test)} rows of {name} stand among {among} word for word; {so}"


def alike(tables: Sequence[Table]) -> Iterator[str]:
    """Files that hold the very same rows."""
    seen: dict[int, Table] = {}
    for table in tables:
        first = seen.setdefault(hash((len(table.rows), repr(table.rows[0]), repr(table.rows[-1]))), table)
        if first is not table and list(first.rows) == list(table.rows):
            yield f"{table.name} holds the very same rows as {first.name}, so that they count twice"


def near_ids(ids: Sequence[str]) -> Iterator[str]:
    """Clients whose ids look the same, which may be one client written in two ways."""
    seen: dict[str, str] = {}
    for name, form in itertools.product(ids, (looks, drawn)):
        bare = form(name.rpartition("~")[0] or name).strip(" _")
        if bare and (first := seen.setdefault(bare, name)) != name:
            yield (f"the clients {first!r} and {name!r} are two whose ids look alike (case, blanks or code points); "
                   "write them one way if they are one")
            return


def _key(row: Row, but: Collection[str]) -> str:
    return repr(sorted((n, " ".join(v.split()).casefold() if isinstance(v, str) else v) for n, v in row.items()
                       if n != "category" and n not in but))
