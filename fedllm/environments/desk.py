"""A desk with tools: questions that a local SQLite database, a folder of files and a calculator answer."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.environments.env import layout
from fedllm.environments.problems import Asked, Call, Problem, wordings
from fedllm.environments.reading import calculator, database, files
from fedllm.environments.rules import NONE
from fedllm.environments.words import WordScene, width

NAMES = ("kim", "lee", "noor", "otto", "pia", "ravi", "sue", "tom")
TOWNS = ("Bern", "Cairo", "Delhi", "Lima", "Oslo", "Quito", "Seoul", "Tunis")
DIALECTS = (("invoices", "id", "amount"), ("bills", "number", "total"))
"""How a site's database calls its table, its key and its figure."""
INVOICES = 40
KINDS = {
    "amount": ("what is invoice {x} over", "how much do we owe on invoice {x}", "the figure of invoice {x}",
               "look up invoice {x}"),
    "both": ("what do invoices {x} and {y} come to together", "the sum of invoice {x} and invoice {y}",
             "add up invoices {x} and {y}", "invoice {x} plus invoice {y}, how much"),
    "town": ("where does {who} live", "which town is {who} in", "the address of {who}", "find {who} on the map"),
}


@dataclass(frozen=True)
class Desk(WordScene):
    """`sql SELECT ...`, `read FILE`, `files`, `calc EXPRESSION`, `note FILE TEXT` (which writes: off unless the site's
    `may` says so), then `answer TEXT`. Each layout has other figures, and a dialect in which its database speaks."""

    own: int = knob(2, "of the four ways of putting a question, those that a layout knows; 0: all", ge=0, le=4)
    dialect: int = knob(0, "how the database calls its table and columns", ge=0, lt=len(DIALECTS))
    cost: float = knob(0.02, "what a line costs", ge=0)
    width: int = width
    layout: int = layout
    actions, tools = 2 * len(DIALECTS) + 4, True

    def told(self, rules=NONE) -> Asked:
        """Where tools may write, each environment has files of its own; they are gone when it is."""
        room = made(self) if "write" in rules.may else _shared(replace(self, own=0, cost=0.0, width=256))
        db, folder = Path(room.name) / "desk.db", Path(room.name) / "files"
        box = rules.box([database(db, rules.seconds), *files(folder), calculator()], self, db=db, files=folder,
                        layout=self.layout)
        asked = Asked(functools.partial(self.problem, self.amounts(), self.towns()), box, self.cost)
        asked.keeps = room
        return asked

    def amounts(self) -> list[int]:
        """What each invoice is over."""
        return numpy_stream(self.layout, "desk").integers(100, 1000, INVOICES).tolist()

    def towns(self) -> dict[str, str]:
        """Who lives where."""
        return dict(zip(NAMES, numpy_stream(self.layout, "towns").choice(TOWNS, len(NAMES)).tolist(), strict=True))

    def problem(self, amounts: list[int], towns: dict[str, str], rng: np.random.Generator) -> Problem:
        """One question."""
        kind = list(KINDS)[int(rng.integers(len(KINDS)))]
        x, y = (int(i) for i in rng.choice(INVOICES, 2, replace=False))
        who = NAMES[int(rng.integers(len(NAMES)))]
        ways = wordings(KINDS[kind], self.layout, self.own)
        text = f"{ways[int(rng.integers(len(ways)))].format(x=x, y=y, who=who)}?"
        total = str(amounts[x] + amounts[y])
        values = {"amount": (str(amounts[x]),), "both": (str(amounts[x]), str(amounts[y]), total),
                  "town": (towns[who],)}[kind]
        calls: list[Call] = [functools.partial(query, d, i) for d in range(len(DIALECTS)) for i in (x, y)]
        calls += [lambda found: f"read {who}.txt", lambda found: f"calc {' + '.join(found) or '0'}",
                  lambda found: f"note {who}.txt moved"]
        return Problem(text, values, values[-1], tuple(calls), kind)


def query(dialect: int, invoice: int, found: Sequence[str] = ()) -> str:
    """The call for an invoice's figure in this dialect, whatever was found so far."""
    table, key, figure = DIALECTS[dialect]
    return f"sql SELECT {figure} FROM {table} WHERE {key} = {invoice}"


def made(desk: Desk) -> tempfile.TemporaryDirectory:
    """A folder with `desk.db` and `files/`, which lives as long as this handle."""
    room = tempfile.TemporaryDirectory(prefix="fedllm-desk-")
    folder = Path(room.name) / "files"
    folder.mkdir()
    for who, town in desk.towns().items():
        (folder / f"{who}.txt").write_text(f"{who} lives in {town}")
    table, key, figure = DIALECTS[desk.dialect]
    at = sqlite3.connect(Path(room.name) / "desk.db")
    with at:
        at.execute(f"CREATE TABLE {table} ({key} INTEGER PRIMARY KEY, {figure} INTEGER)")
        at.executemany(f"INSERT INTO {table} VALUES (?, ?)", list(enumerate(desk.amounts())))
    at.close()
    return room


_shared = functools.lru_cache(maxsize=64)(made)
