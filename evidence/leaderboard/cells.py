"""The cells of the leaderboard: which run each is, where it lies, and what came of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence.leaderboard.code import code_of, data_of
from evidence.leaderboard.fit import Edits
from evidence.leaderboard.worlds import World
from fedllm.comparisons.design import Cell
from fedllm.comparisons.pool import Pool
from fedllm.core.client import SERVER
from fedllm.core.errors import RunError
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import read_recipe
from fedllm.runs.result import Result
from fedllm.runs.store import read_json

COST = "cost.json"
WEIGHTS = ("checkpoints", "adapter", "model", "trainables", "clients")
"""What a finished cell does without: whoever wants the model repeats the cell."""


def rows_of(name: str, world: World, room: Path) -> str:
    """Where the world's rows are; those that are made lie in the room, as JSONL."""
    if world.rows is None:
        return str(world.recipe["data"]["source"])
    path, text = room / "data" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in world.rows())
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(path)


def make_cell(name: str, world: World, room: Path, form: Edits, point: Mapping[str, Any], seed: int) -> Cell:
    """A run of a method on a world. Its folder's name ends in a digest of recipe, rows and code: what was made of
    others is another cell."""
    method = form["method"]["name"]
    base = {**json.loads(json.dumps(dict(world.recipe))), "name": "cell"}
    base["data"] = {**base["data"], "source": rows_of(name, world, room)}
    edits = {**json.loads(json.dumps(dict(form))), **point, "seed": seed}
    said = read_recipe(base, edits).model_dump()
    files = [data_of(f) for f in (base["data"]["source"], base["data"].get("test")) if isinstance(f, str)]
    said["data"]["source"] = "as its digest says"  # the same rows elsewhere are the same cell
    key = hashlib.sha256(json.dumps([said, files, code_of(method)], sort_keys=True).encode()).hexdigest()[:10]
    return Cell(name, method, seed, point, read_recipe(base, {**edits, "name": f"{method}-seed{seed}-{key}"}))


def place(room: Path, world: str) -> Path:
    """The folder of a world's cells."""
    return room / "cells" / world


def run_cell(workers: Pool, cell: Cell, at: Path) -> dict[str, Any]:
    """What came of a cell: nothing, or `error` and `kind`. A finished one is not run again, a half-written one is
    taken up where it stood."""
    folder = at / cell.name
    at.mkdir(parents=True, exist_ok=True)
    if not (folder / "result.json").is_file():
        begun = (folder / "recipe.yaml").is_file()
        got = workers.each("cell", [cell], at, lambda cell, got: None)[cell.name]
        if "error" in got and not (folder / "result.json").is_file():
            return got
        cpu = None if begun else got.get("cpu_seconds")  # of a run that was taken up it is a part alone
        (folder / COST).write_text(json.dumps({"cpu_seconds": cpu, "remember": remember(folder)}))
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "report.html").unlink(missing_ok=True)  # 5 MB each; `fedllm report` writes it anew
    try:
        result = Result.load(folder)
    except RunError as error:
        return {"error": f"{error}; remove {folder}, and the same command makes it anew", "kind": "RunError"}
    return {"error": f"the run did nothing: {result.failed}", "kind": "DidNothing"} if result.failed else {}


def remember(folder: Path) -> int | None:
    """How many clients keep something from one round to the next, by the run's last checkpoint."""
    found = RunFolder(folder).load()
    return None if found is None else sum(bool(kept) for c, kept in found[1]["memory"].items() if c != SERVER)


def cost_of(folder: Path) -> dict[str, Any]:
    """`cpu_seconds` of a whole cell (none where it was taken up, so that only a part was counted), and how many clients
    `remember`."""
    path = folder / COST
    return read_json(path) if path.is_file() else {}
