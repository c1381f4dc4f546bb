"""The arena: every attack against every defense that applies, in one table and one picture.

`fedllm bench arena` runs the full grid (a day on one core). FEDLLM_ARENA="size=small" is a part of it in a quarter of
an hour; further keys pick rows: worlds, attacks, defenses, shares, seeds (lists with commas). A row that was measured
before, with the same settings, is not measured again, so the bench may be stopped at any moment.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.app.arena_page import write_page
from fedllm.app.bench_rows import Row, machine, row
from fedllm.app.rigs_arena import EDGES, WORLDS, Size, duel, nobody
from fedllm.core.errors import CompositionError, QuorumError, RecipeError, RunError

OUT = Path("docs/results/arena.json")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
TRIGGERS = {"topics": (2, 3)}
"""Token ids where a world has no tokenizer."""
NO_LABELS = ("label_flip 1 to 0", "edge cases")
"""Attacks on classes."""
AIMED = ("att_backdoor", "att_fm_backdoor")


@dataclass(frozen=True)
class Grid:
    """What of the arena is run."""

    sizes: Mapping[str, Size]
    shares: Sequence[float]
    seeds: Sequence[int]
    attacks: Sequence[str]
    defenses: Sequence[str]


def attacks(world: str) -> dict[str, dict[str, Any]]:
    """Name -> layer of every attack, without its clients."""
    plant = {"trigger": TRIGGERS.get(world, "cf mn bb tq"), "target": "zebra 0000" if world == "office" else 0,
             "share": 0.5}
    made: dict[str, dict[str, Any]] = {
        "sign_flip x10": {"name": "att_byzantine", "kind": "sign_flip", "scale": 10.0},
        "sign_flip": {"name": "att_byzantine", "kind": "sign_flip"},
        "random x10": {"name": "att_byzantine", "kind": "random", "scale": 10.0},
        "zero": {"name": "att_byzantine", "kind": "zero"},
        "alie": {"name": "att_byzantine", "kind": "alie", "z": 1.5},
        "ipm x2": {"name": "att_byzantine", "kind": "ipm", "scale": 2.0},
        "label_flip 1 to 0": {"name": "att_label_flip", "sources": (1,), "targets": (0,)},
        "label_flip": {"name": "att_label_flip"},
        "backdoor": {"name": "att_backdoor", **plant},
        "replacement": {"name": "att_backdoor", "kind": "replacement", **plant},
        "constrain": {"name": "att_backdoor", "kind": "constrain", **plant},
        "edge cases": {"name": "att_backdoor", "kind": "edge", "edges": EDGES, "target": 0, "share": 0.5},
        "fm backdoor": {"name": "att_fm_backdoor", **plant},
        "rider plain": {"name": "att_free_rider", "kind": "plain"},
        "rider disguised": {"name": "att_free_rider", "kind": "disguised", "sigma": 0.01},
        "rider dynamic": {"name": "att_free_rider", "kind": "delta_noise", "start": 3}}
    return {n: a for n, a in made.items() if world != "office" or n not in NO_LABELS}


def defenses(clients: int, share: float) -> dict[str, dict[str, Any] | None]:
    """Name -> layer of every defense, told how many attackers there are (a tenth where there are none)."""
    f = max(round(share * clients), clients // 10)
    bucket = max(1, min(2, clients // (2 * f)))
    return {
        "mean": None, "median": {"name": "median"}, "trimmed mean": {"name": "trimmed_mean", "trim": f / clients},
        "krum": {"name": "krum", "f": f}, "multi-krum": {"name": "krum", "f": f, "keep": None},
        "bulyan": {"name": "bulyan", "f": f}, "rfa": {"name": "rfa"},
        "centered clip": {"name": "centered_clip", "bucket": bucket},
        "foolsgold": {"name": "foolsgold"}, "norm clip": {"name": "norm_clip"},
        "weak dp": {"name": "norm_clip", "noise": 0.025}, "crfl": {"name": "crfl"}, "fltrust": {"name": "fltrust"},
        "rlr": {"name": "rlr", "theta": 2.0 * f + 1}, "anomaly": {"name": "anomaly"}, "s2_wef": {"name": "s2_wef"}}


FULL = Grid({"sst2": Size(20, 2000, 8), "office": Size(20, 1600, 16)}, SHARES, (0, 1, 2), tuple(attacks("sst2")),
            tuple(defenses(20, 0.0)))
SMALL = Grid({"sst2": Size(10, 800, 6)}, (0.0, 0.3), (0,),
             ("sign_flip x10", "alie", "label_flip 1 to 0", "backdoor", "replacement", "edge cases", "rider dynamic"),
             FULL.defenses)
SIZES = {"full": FULL, "small": SMALL}
KEYS = ("size", "worlds", "attacks", "defenses", "shares", "seeds")


def arena() -> list[Row]:
    """All rows that are still missing; then the table, the picture and a few rows that sum them up."""
    grid = asked(os.environ.get("FEDLLM_ARENA", ""))
    for job in jobs(grid):
        if _key(job) not in {_key(r) for r in _kept()}:
            found = {**job, **measured(job)}
            _write([*_kept(), found])  # read again: another process may measure other rows
    _write(_kept())
    return summary(_kept())


def asked(text: str) -> Grid:
    """The grid that FEDLLM_ARENA describes."""
    given = {k.strip(): v for k, _, v in (x.partition("=") for x in text.split(";") if x.strip())}
    if odd := [k for k in given if k not in KEYS]:
        raise RecipeError(f"FEDLLM_ARENA: {odd[0]!r} is unknown. Allowed: {', '.join(KEYS)}")
    size = given.get("size", "full").strip()
    base = SIZES.get(size)
    if base is None:
        raise RecipeError(f"FEDLLM_ARENA: size={size!r} is unknown. Allowed: {', '.join(SIZES)}")

    def some(key: str, known: Sequence[Any], default: Sequence[Any]) -> tuple[Any, ...]:
        if key not in given:
            return tuple(default)
        names = [n.strip() for n in given[key].split(",")]
        by = {str(k): k for k in known}
        if bad := [n for n in names if n not in by]:
            raise RecipeError(f"FEDLLM_ARENA: {key}={bad[0]!r} is unknown. Allowed: {', '.join(by)}")
        return tuple(by[n] for n in names)

    sizes = {**FULL.sizes, **base.sizes}
    worlds = some("worlds", tuple(sizes), tuple(base.sizes))
    return Grid({w: sizes[w] for w in worlds}, some("shares", SHARES, base.shares),
                some("seeds", range(10), base.seeds), some("attacks", FULL.attacks, base.attacks),
                some("defenses", FULL.defenses, base.defenses))


def jobs(grid: Grid) -> Iterator[dict[str, Any]]:
    """Every row to measure; without attackers one row with the attack none serves all attacks, but for what a clean
    model gives to those that have a target."""
    for (world, size), seed, share in itertools.product(grid.sizes.items(), grid.seeds, grid.shares):
        known = attacks(world)
        names = [a for a in grid.attacks if a in known]
        pairs = list(itertools.product(names if share else ["none"], grid.defenses))
        if not share:  # what the attacker gets of a clean model
            pairs += [(a, "mean") for a in names if known[a]["name"] in AIMED]
        for attack, defense in pairs:
            yield {"world": world, **asdict(size), "attack": attack, "defense": defense, "share": share, "seed": seed}


def _kept() -> list[dict[str, Any]]:
    return json.loads(OUT.read_text())["rows"] if OUT.exists() else []


def _key(job: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(job[k] for k in ("world", "clients", "rows", "rounds", "attack", "defense", "share", "seed"))


def measured(job: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one row, or the sentence with which the defense refuses it."""
    assert job["world"] in WORLDS
    attack = attacks(job["world"]).get(job["attack"])
    if attack and not job["share"]:
        attack |= nobody(attack)
    elif attack and attack["name"] != "att_fm_backdoor":  # whose poison comes from the server's generator
        attack |= {"clients": job["share"]}
    size = Size(job["clients"], job["rows"], job["rounds"])
    try:
        got = duel(job["world"], attack, defenses(size.clients, job["share"])[job["defense"]], job["seed"], size)
    except (RecipeError, CompositionError, QuorumError, RunError) as error:
        return {"refused": str(error)}
    return {k: round(v, 4) for k, v in got.items()}


def _write(rows: Sequence[Mapping[str, Any]]) -> None:
    kinds, rules = ("none", *FULL.attacks), FULL.defenses
    rows = sorted(rows, key=lambda r: (r["world"], r["clients"], kinds.index(r["attack"]), r["share"],
                                       rules.index(r["defense"]), r["seed"]))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    partial = OUT.with_suffix(".part")
    lines = ",\n".join("  " + json.dumps(r) for r in rows)
    partial.write_text(f'{{"machine": {json.dumps(machine())},\n "rows": [\n{lines}\n]}}\n')
    partial.replace(OUT)
    write_page(rows, OUT.parent)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """For each world: what sign flip costs the mean and the best defense at 30 %."""
    out = []
    for world in sorted({r["world"] for r in rows}):
        mine = [r for r in rows if r["world"] == world and "quality" in r]
        clean = [r["quality"] for r in mine if r["attack"] == "none" and r["defense"] == "mean"]
        hit = [r for r in mine if r["attack"] == "sign_flip x10" and r["share"] == 0.3]
        by: dict[str, list[float]] = {}
        for r in hit:
            by.setdefault(r["defense"], []).append(r["quality"])
        if not clean or "mean" not in by or len(by) < 2:
            continue
        lost = {d: sum(clean) / len(clean) - sum(q) / len(q) for d, q in by.items()}
        best = min((d for d in lost if d != "mean"), key=lambda d: lost[d])
        out += [row(f"arena/{world} sign_flip x10 of 30 %, mean", lost["mean"], "quality lost", "no attack", 0.2),
                row(f"arena/{world} sign_flip x10 of 30 %, {best}", lost[best], "quality lost", "no attack", 0.03,
                    least=True)]
    return out
