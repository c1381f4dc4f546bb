"""The leaderboard in few figures: what the page that sorts shows, and what `fedllm advise` has with it in the wheel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.leaderboard.code import code_of
from evidence.leaderboard.figures import spread
from evidence.leaderboard.worlds import WORLDS, World
from fedllm.comparisons.axes import words
from fedllm.comparisons.figures import on_front
from fedllm.methods.registry import METHODS

Row = Mapping[str, Any]
PACKED = Path(__file__).parents[2] / "fedllm" / "advice" / "leaderboard.json"
WHICH = ("global", "personal")
"""Whose model: the server's on the global test, each client's own on its own test rows."""
BASE = "fedit"
"""Against which all are held, seed by seed."""
COSTS = ("up", "down", "cpu_seconds", "memory", "joules")
TRAITS = ("title", "sends", "kinds", "pooled", "serves", "ranks", "mixes", "gradients", "remember", "own_part")


def brief(rows: Sequence[Row], worlds: Mapping[str, World] = WORLDS) -> dict[str, Any]:
    """Worlds with their work, and of each row what is read: quality, costs, traits, and where it stands."""
    out = []
    for world in worlds:
        mine = [r for r in rows if r["world"] == world]
        done = [r for r in mine if r["status"] in ("measured", "part") and r["global"] | r["personal"]]
        on = {which: fronts(done, worlds[world], which) for which in WHICH}
        base = next((r for r in done if r["method"] == BASE), None)
        out += [{**_brief(r, worlds[world], [w for w in WHICH if on[w].get(r["method"])]),
                 "against": {w: against(r, base, w, worlds[world].metric) for w in WHICH}} for r in mine]
    told = {name: {"title": w.title, "about": w.about, "metric": w.metric,
                   "better": "min" if w.metric == "loss" else "max", "work": work_of(w),
                   "task": w.recipe["data"].get("task", "generation")} for name, w in worlds.items()
            if any(r["world"] == name for r in out)}
    return {"worlds": told, "rows": out}


def _brief(row: Row, world: World, front: list[str]) -> dict[str, Any]:
    kept = {k: row[k] for k in ("world", "method", "family", "status", "why")}
    for which in WHICH:
        s = row.get(which, {}).get(world.metric)
        kept[which] = None if s is None else [s["mean"], s["low"], s["high"]]
    space = row.get("form", {}).get("space", {}).get("name")
    return {**kept, **{k: row.get(k) for k in (*COSTS, *TRAITS)}, "seeds": len(row.get("seeds", ())), "space": space,
            "rates": words(row["rates"]) if row.get("rates") else "", "front": front,
            "stale": row["method"] not in METHODS or row["code"] != code_of(row["method"])}


def against(row: Row, base: Row | None, which: str, metric: str) -> list[float | None] | None:
    """The mean of a row's figure less FedIT's on the same seeds, and its interval: what worlds of single seeds add to
    both is gone. None where there is no such pair, and for FedIT itself."""
    if base is None or row["method"] == BASE or not all(metric in r.get(which, {}) for r in (row, base)):
        return None
    mine, other = (dict(zip(r["seeds"], r[which][metric]["each"], strict=False)) for r in (row, base))
    told = spread([mine[s] - other[s] for s in mine if s in other])
    return None if told is None else [told["mean"], told["low"], told["high"]]


def fronts(rows: Sequence[Row], world: World, which: str) -> dict[str, bool]:
    """Method -> whether no other one is at least as good for no more bytes. Pooled rows stand aside, and where the
    global model is asked for those whose server ends with none."""
    less = world.metric == "loss"
    worth = [s["mean"] if (s := r[which].get(world.metric)) and not r["pooled"] and (
        which == "personal" or r["serves"]) else None for r in rows]
    found = on_front(worth, [(r["up"] or 0) + (r["down"] or 0) for r in rows], less)
    return dict(zip((r["method"] for r in rows), found, strict=True))


def work_of(world: World) -> str:
    """What every method may do."""
    local = world.recipe["local"]
    return f"{world.recipe['rounds']} rounds of {local['steps']} client steps of {local['batch_size']} rows"


def pack(rows: Sequence[Row], file: Path, worlds: Mapping[str, World] = WORLDS) -> None:
    """Write the copy that the wheel holds."""
    file.write_text(json.dumps(brief(rows, worlds), separators=(",", ":"), ensure_ascii=False) + "\n")
