"""What rows hold that was hardly meant, though each can be read: counted, and said with the place of the first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm.data.meant import MISSING
from fedllm.data.table import Table
from fedllm.tasks.row import Row, is_blank, where_of

TESTS = ("test", "tests", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "heldout", "holdout")
SPLITS = ("split", "subset", "fold", "set", "client")
"""Columns that say which rows are a test (`client`: the keys of a .json that maps names to lists of rows)."""
LOST = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac[\u0080-\u02ff\u2018-\u2122]|"
                  "\u00ef\u00bb\u00bf")
"""A character that stands for lost ones, and UTF-8 that was read as Latin-1 or cp1252 and written once more."""
ERRORS = (*MISSING, "ref!", "div/0!", "value!", "name?", "num!", "null!")
"""What programs write where a value is missing or could not be worked out, beside `#`, `<>` and `[]`."""
TEXTS = ("prompt", "response", "text", "chosen", "rejected")
MANY = 20
SEVERAL = 5


def tests_among(tables: Sequence[Table]) -> Iterator[str]:
    """Files and rows that are called a test, and are trained on with the others."""
    words = [re.split(r"[\W_]+", Path(table.name).stem.lower()) for table in tables]
    files = [table for table, said in zip(tables, words, strict=True) if said[0] in TESTS or said[-1] in TESTS]
    if files and len(files) < len(tables):
        yield (f"{files[0].name} is among the rows that are trained on; if it is a test, as it is called, name it in "
               "data.test")
    for table in tables:
        for column in (c for c in table.rows[0] if str(c).lower() in SPLITS):
            said = [str(row.get(column)).strip().lower() in TESTS for row in table.rows]
            if any(said) and not all(said):
                yield (f"{table.name}: the column {column!r} calls {sum(said)} of {len(said)} rows a test, and all are "
                       "trained on; write them into a file of their own, and name it in data.test")
                return


def odd_texts(rows: Sequence[Row]) -> Iterator[str]:
    """Lost characters, missing values that are words, nothing to read, and prompts that end with their own answer."""
    lost, missing, blank, told = [], [], [], 0
    for i, row in enumerate(rows, 1):
        if any(LOST.search(text) for text in _texts(row)):
            lost.append(where_of(row, i))
        said, asked = row.get("response"), row.get("prompt", row.get("text"))
        if isinstance(said, str):
            if said.strip(" #<>[]\n").casefold() in ERRORS:
                missing.append(where_of(row, i))
            told += isinstance(asked, str) and bool(said.strip()) and asked.rstrip().endswith(said.strip())
        turns = [turn["content"] for turn in row.get("messages") or () if turn.get("role") == "user"]
        if any(isinstance(text, str) and is_blank(text) for text in turns or [asked]):
            blank.append(where_of(row, i))
    if lost:
        yield (f"{_rows(lost)} characters that were lost or read in another encoding (\ufffd, \u00c3\u00a9): make the "
               "file anew from its source, as UTF-8")
    if missing:
        yield f"{_rows(missing)} as response what programs write for a missing value (nan, None, #N/A); it is learned"
    if blank and (len(blank) < len(rows) or "text" in rows[0] or "messages" in rows[0]):
        yield f"{_rows(blank)} nothing to read (an empty prompt, text or turn of the user)"
    yield from _all_alike(rows)
    yield from _pairs(rows)
    yield from _calls(rows)
    if rows and told == len(rows):
        yield "every prompt ends with its own response: the model copies what it is told, and learns nothing else"


def _all_alike(rows: Sequence[Row]) -> Iterator[str]:
    """Responses that begin with their own prompt, one response to everything, one prompt for everything."""
    for name in ("response", "chosen"):
        pairs = [(row["prompt"].strip(), row[name].strip()) for row in rows if isinstance(row.get(name), str)
                 and isinstance(row.get("prompt"), str) and not row.get("messages")]
        if not pairs or len(pairs) < len(rows):
            continue
        prompts, said = {asked for asked, _ in pairs}, {answer for _, answer in pairs}
        if all(len(asked) > 1 and len(answer) > len(asked) and answer.startswith(asked) for asked, answer in pairs):
            yield (f"every {name} begins with its own prompt, so that the model learns to say the prompt once more; "
                   "leave it out of one of them")
        if len(pairs) >= SEVERAL and len(said) == 1 < len(prompts):
            yield f"every {name} is the same ({pairs[0][1]!r:.60}), whatever the prompt"
        if len(pairs) >= SEVERAL and len(prompts) == 1 < len(said) and pairs[0][0]:
            yield f"every prompt is the same ({pairs[0][0]!r:.60}), and there are {len(said)} answers to it"


def _pairs(rows: Sequence[Row]) -> Iterator[str]:
    """Pairs of which others say the opposite."""
    known = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows if "chosen" in row and "rejected" in row}
    if both := sum((asked, worse, better) in known for asked, better, worse in known):
        yield f"{both} pairs of answers stand there both ways: each of the two is chosen once and rejected once"


def _calls(rows: Sequence[Row]) -> Iterator[str]:
    """Calls of a tool that is none of the row's tools."""
    def named(tool: Any) -> Any:
        return tool.get("function", tool).get("name")

    astray = [(where_of(row, i), named(call)) for i, row in enumerate(rows, 1) if row.get("tools")
              for turn in row.get("messages") or () for call in turn.get("tool_calls", ())
              if named(call) not in map(named, row["tools"])]
    if astray:
        yield f"{astray[0][0]} calls {astray[0][1]!r:.60}, which is none of its tools" + (
            f" (and {len(astray) - 1} more such calls)" if len(astray) > 1 else "")


def odd_classes(train: Sequence[Row], test: Sequence[Row], labels: Sequence[str], given: bool, apart: bool = False
                ) -> Iterator[str]:
    """Of texts with one label: labels for nearly each row, of no row, of the test's alone, and where the test is a file
    `apart` not of the test's; texts that have several."""
    rows = [*train, *test]
    found, learned, asked = ({row["label"] for row in some if isinstance(row.get("label"), int)}
                             for some in (rows, train, test))
    if not found:
        return
    if alone := sorted(found - learned):
        yield (f"the label {labels[alone[0]]!r:.40} is of rows of the test alone, so that nobody learns it"
               + (f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""))
    if apart and asked and (never := sorted(learned - asked)):
        yield (f"no row of the test has the label {labels[never[0]]!r:.40}, so that nothing is said of it"
               + (f" (nor of {len(never) - 1} more)" if len(never) > 1 else ""))
    if given and (none := [label for i, label in enumerate(labels) if i not in found]):
        yield f"no row has the label {', '.join(f'{label!r:.40}' for label in none[:5])}, which data.labels names"
    if len(found) > MANY and 2 * len(found) > len(rows):
        yield (f"there are {len(found)} labels for {len(rows)} rows; if another column holds the label, data.fields "
               "names it")
    first: dict[Any, int] = {}
    if several := {row["text"] for row in rows if "text" in row
                   and first.setdefault(row["text"], row["label"]) != row["label"]}:
        yield f"{len(several)} texts stand there under more than one label"


def _texts(row: Row) -> list[str]:
    turns = row.get("messages") or ()
    return [text for text in (*(row.get(name) for name in TEXTS), *(turn.get("content") for turn in turns))
            if isinstance(text, str)]


def _rows(at: Sequence[str]) -> str:
    return f"{at[0]} has" if len(at) == 1 else f"{len(at)} rows ({at[0]} is the first) have"
