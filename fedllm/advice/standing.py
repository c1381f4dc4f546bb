"""The leaderboard's rows that come with fedllm, and where each method stands on them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedllm.core.errors import RecipeError

Row = Mapping[str, Any]
FILE = Path(__file__).with_name("leaderboard.json")
"""Written by `make leaderboard`."""
REFERENCE = ("fedavg", "fedit")
"""Whose bytes of a world others are held against, the first that is there."""


@functools.cache
def board() -> Mapping[str, Any]:
    """`worlds` and `rows`, as `make leaderboard` packed them."""
    try:
        told = json.loads(FILE.read_text(encoding="utf-8"))
        return {"worlds": dict(told["worlds"]), "rows": list(told["rows"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"the leaderboard that comes with fedllm cannot be read ({type(error).__name__}: {error}); "
                          "install fedllm again, or write it with `make leaderboard` in a checkout") from None


def rows_for(task: str | None = None) -> list[Row]:
    """The measured rows of the worlds with this task, or of all."""
    worlds = board()["worlds"]
    return [r for r in board()["rows"] if r["status"] in ("measured", "part")
            and task in (None, worlds[r["world"]]["task"])]


def places(rows: Sequence[Row], which: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(world, method) -> place and out of how many, by the global or the personal model; pooled rows, and for the
    global model those whose server has none, take none."""
    out: dict[tuple[str, str], tuple[int, int]] = {}
    for name, world in board()["worlds"].items():
        mine = [r for r in rows if r["world"] == name and r[which] and not r["pooled"]
                and (which == "personal" or r["serves"])]
        mine.sort(key=lambda r: r[which][0], reverse=world["better"] == "max")
        out |= {(name, r["method"]): (i + 1, len(mine)) for i, r in enumerate(mine)}
    return out


def standing(method: str, found: Mapping[tuple[str, str], tuple[int, int]]) -> float | None:
    """The mean of its places as shares, 0 the best and 1 the last; None of a method without any."""
    shares = [(place - 1) / max(1, of - 1) for (_, name), (place, of) in found.items() if name == method]
    return mean(shares) if shares else None


def share_of_bytes(method: str, rows: Sequence[Row]) -> float | None:
    """Its bytes over FedAvg's on the same world, mean over worlds; None where it stands beside none."""
    shares = []
    for row in rows:
        if row["method"] == method and row["up"] is not None:
            others = {r["method"]: r["up"] + r["down"] for r in rows if r["world"] == row["world"] and r["up"]}
            base = next((others[n] for n in REFERENCE if n in others), None)
            shares += [(row["up"] + row["down"]) / base] if base else []
    return mean(shares) if shares else None
