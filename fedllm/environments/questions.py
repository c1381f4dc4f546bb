"""Questions of one's own, from a file: what tools of one's own (an MCP server's) are asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.errors import DataError
from fedllm.core.knobs import knob
from fedllm.environments.env import layout
from fedllm.environments.problems import Asked, Problem
from fedllm.environments.reading import calculator
from fedllm.environments.rules import NONE
from fedllm.environments.words import WordScene, width

TRIAL = tuple({"prompt": f"what is {a} plus {b}?", "response": str(a + b), "calls": [f"calc {a} + {b}", f"calc {a}"]}
              for a, b in ((1, 2), (3, 4), (5, 6), (7, 8)))
"""Without a file: enough to try the environment with."""


@dataclass(frozen=True)
class Questions(WordScene):
    """`TOOL ARGUMENT`, then `answer TEXT`. A line of the file is JSON: `prompt`, `response`, `calls` to choose from by
    number ({found}: what was found last), and `values` to be found on the way, by default the response."""

    file: str = knob("", "JSON lines; without one four sums, to try it with")
    choices: int = knob(4, "calls to choose from by number; a question with fewer repeats its last", ge=1, le=100)
    cost: float = knob(0.02, "what a line costs", ge=0)
    width: int = width
    layout: int = layout
    tools = True

    @property
    def actions(self) -> int:  # type: ignore[override]
        return self.choices + 1

    def told(self, rules=NONE) -> Asked:
        rows = _rows(Path(self.file), self.choices) if self.file else TRIAL
        box = rules.box([calculator()], self, file=self.file, layout=self.layout)
        return Asked(functools.partial(self.problem, rows), box, self.cost)

    def problem(self, rows: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Problem:
        """One of the questions."""
        row = rows[int(rng.integers(len(rows)))]
        lines = [*row["calls"], *[row["calls"][-1]] * (self.choices - len(row["calls"]))]
        calls = tuple((lambda found, line=line: line.replace("{found}", [*found, "0"][len(found) - 1 if found else 0]))
                      for line in lines)
        return Problem(row["prompt"], tuple(row.get("values") or (row["response"],)), row["response"], calls)


@functools.lru_cache(maxsize=64)
def _rows(path: Path, choices: int) -> tuple[Mapping[str, Any], ...]:
    """The file's questions; DataError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.environment.file = '{path}' cannot be read ({error})", file=str(path)) from None
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            fits = all(isinstance(row[k], str) and row[k].strip() for k in ("prompt", "response"))
            calls, values = row["calls"], row.get("values", [row["response"]])
            fits = fits and 1 <= len(calls) <= choices and bool(values) and isinstance(calls, list)
            fits = fits and all(isinstance(v, str) for v in (*calls, *values))
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise DataError(f"{path}, line {i}: allowed is a mapping of 'prompt' and 'response' (text), 'calls' (1 to "
                            f"{choices} lines, data.environment.choices) and, if there are any, 'values' (words to be "
                            "found)", file=str(path), row=i)
        rows.append(row)
    if not rows:
        raise DataError(f"data.environment.file = '{path}' is empty", file=str(path), kind="empty")
    return tuple(rows)
