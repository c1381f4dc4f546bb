"""The arena: every attack against every defense that applies, in one table and one picture.

`fedllm bench arena` runs the full grid (an hour of one core). FEDLLM_ARENA="size=small" is a part of it in two
minutes; further keys pick rows: worlds, attacks, defenses, shares, seeds (lists with commas), so that a second process
may measure other rows beside the first. Each row is a line of `arena.jsonl`, added as soon as it is measured; one that
was measured before, with the same settings, is not measured again, so the bench may be stopped at any moment.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import track

from evidence.bench.rows import Row, machine, row
from evidence.pages.arena import write_page
from evidence.rigs.arena import EDGES, WORLDS, Size, duel, nobody
from fedllm.core.errors import CompositionError, QuorumError, RecipeError, RunError

OUT = Path("docs/results/arena.jsonl")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
TRIGGERS: dict[str, Any] = {"topics": (2, 3), "office": "zzz " * 8}
"""Token ids where a world has no tokenizer; text that the last block of the embedded model can tell apart."""
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
    plant = {"trigger": TRIGGERS.get(world, "cf mn bb tq"), "target": "zebra" if world == "office" else 0,
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


FULL = Grid({"sst2": Size(20, 2000, 8), "office": Size(20, 1600, 6)}, SHARES, (0, 1, 2), tuple(attacks("sst2")),
            tuple(defenses(20, 0.0)))
SMALL = Grid({"sst2": Size(10, 800, 6)}, (0.0, 0.3), (0,),
             ("sign_flip x10", "alie", "label_flip 1 to 0", "backdoor", "replacement", "edge cases", "rider dynamic"),
             FULL.defenses)
SIZES = {"full": FULL, "small": SMALL}
KEYS = ("size", "worlds", "attacks", "defenses", "shares", "seeds")


def arena() -> list[Row]:
    """All rows that are still missing; then the tables, the pictures and a few rows that sum them up."""
    grid = asked(os.environ.get("FEDLLM_ARENA", ""))
    kept = {_key(r) for r in _kept()}
    missing = [job for job in jobs(grid) if _key(job) not in kept]
    for job in track(missing, description="arena"):
        _add({**job, **measured(job)})
    rows = in_order(_kept())
    write_page(rows, next((line["machine"]["cpu"] for line in _lines() if "machine" in line), ""), OUT.parent)
    return summary(rows)


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


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []


def _kept() -> list[dict[str, Any]]:
    return [line for line in _lines() if "world" in line]  # the others say on what machine


def _add(found: Mapping[str, Any]) -> None:
    """One more line, in one write: another process may be adding others."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    first = "" if OUT.exists() else json.dumps({"machine": machine()}) + "\n"
    with OUT.open("a") as file:
        file.write(first + json.dumps(found) + "\n")


def _key(job: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(job[k] for k in ("world", "clients", "rows", "rounds", "attack", "defense", "share", "seed"))


def measured(job: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one row, or the sentence with which the defense refuses it."""
    assert job["world"] in WORLDS
    attack = attacks(job["world"]).get(job["attack"])
    if attack and not job["share"]:
        attack |= nobody(attack)
    elif attack:  # the poison of the last comes from the server's generator: so much of its rows
        attack |= {"share" if attack["name"] == "att_fm_backdoor" else "clients": job["share"]}
    size = Size(job["clients"], job["rows"], job["rounds"])
    try:
        got = duel(job["world"], attack, defenses(size.clients, job["share"])[job["defense"]], job["seed"], size)
    except (RecipeError, CompositionError, QuorumError, RunError) as error:
        return {"refused": str(error)}
    return {k: round(v, 4) for k, v in got.items()}


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By world, attack, share, defense and seed, as they are listed here."""
    kinds, rules = ("none", *FULL.attacks), FULL.defenses
    return sorted(rows, key=lambda r: (r["world"], r["clients"], kinds.index(r["attack"]), r["share"],
                                       rules.index(r["defense"]), r["seed"]))


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """For each world at 30 %: what sign flip costs the mean and the best defense, and what backdoors get of both."""
    out = []
    for world in sorted({r["world"] for r in rows}):
        mine = [r for r in rows if r["world"] == world and "quality" in r]
        clean = [r["quality"] for r in mine if r["attack"] == "none" and r["defense"] == "mean"]
        for attack in ("sign_flip x10", "backdoor", "replacement") if clean else ():
            hit = [r for r in mine if r["attack"] == attack and r["share"] == 0.3]
            lost = {d: mean(clean) - q for d, q in by_defense(hit, "quality").items()}
            if "mean" not in lost or len(lost) < 2:
                continue
            name, rest = f"arena/{world} {attack} of 30 %, ", [d for d in lost if d != "mean"]
            if attack == "sign_flip x10":
                best = min(rest, key=lambda d: lost[d])
                out += [row(name + "mean", lost["mean"], "quality lost", "no attack", 0.2),
                        row(name + best, lost[best], "quality lost", "no attack", 0.03, least=True)]
            else:
                got = by_defense(hit, "success")
                best = min([d for d in rest if lost[d] <= 0.02] or rest, key=lambda d: got[d])
                out += [row(name + "mean", got["mean"], "success", "no attack", 0.9),
                        row(name + best, got[best], "success", "no attack", 0.15, least=True, lost=lost[best])]
    return out


def by_defense(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Each defense's mean over seeds."""
    return {d: mean(r[metric] for r in rows if r["defense"] == d) for d in dict.fromkeys(r["defense"] for r in rows)}
