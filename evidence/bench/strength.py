"""How many attackers and how many honest clients each detector casts out, as attackers grow louder.

`fedllm bench strength` measures the rows that docs/results/strength.jsonl lacks, adding each as it is measured, and
then writes the page and its picture. Attackers are 30 % of the clients and do what a defense expects of honest ones:
riders whose noise hides that they send the model's own last step, colluders (ALIE, inner product) at honest length;
beside them a sign flip of growing length, which hides nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import track

from evidence.bench.arena import defenses
from evidence.bench.rows import Row, machine, row
from evidence.pages.strength import write_page
from evidence.rigs.arena import Size, duel

OUT = Path("docs/results/strength.jsonl")
SIZE, SHARE, SEEDS, WORLD = Size(20, 2000, 8), 0.3, (0, 1, 2), "sst2"
DETECTORS = ("multi-krum", "foolsgold", "fltrust", "anomaly", "s2_wef")
KEYS = ("attack", "strength", "defense", "seed")
QUIET = {"rider": (0.1, 0.3, 1.0, 3.0, 10.0), "alie": (0.25, 0.5, 1.0, 2.0, 4.0), "ipm": (1.0,),
         "sign flip": (0.1, 0.3, 1.0, 3.0, 10.0)}
"""Attack -> its strengths: noise by the rms of the last step; z in standard deviations; none (at honest length the
inner product has no other); length by the honest update's."""


def attack(name: str, strength: float) -> dict[str, Any]:
    """The layer, with this much of what makes it seen."""
    kinds: dict[str, dict[str, Any]] = {
        "rider": {"name": "att_free_rider", "kind": "delta_noise", "noise": strength},
        "alie": {"name": "att_byzantine", "kind": "alie", "z": strength, "honest_norm": True},
        "ipm": {"name": "att_byzantine", "kind": "ipm", "scale": strength, "honest_norm": True},
        "sign flip": {"name": "att_byzantine", "kind": "sign_flip", "scale": strength}}
    return {**kinds[name], "clients": SHARE}


def jobs() -> Iterator[dict[str, Any]]:
    """Every row to measure; `mean` is what the attack costs where nobody is cast out."""
    for seed, (name, strengths), rule in itertools.product(SEEDS, QUIET.items(), ("mean", *DETECTORS)):
        for strength in strengths:
            yield dict(zip(KEYS, (name, strength, rule, seed), strict=True))


def strength() -> list[Row]:
    """All rows that are still missing, the page, and for each detector what it makes of the riders it sees best."""
    lines = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else [{"machine": machine()}]
    have = {tuple(r[k] for k in KEYS) for r in lines[1:]}
    for job in track([j for j in jobs() if tuple(j[k] for k in KEYS) not in have], description="strength"):
        rule = defenses(SIZE.clients, SHARE)[job["defense"]]
        got = duel(WORLD, attack(job["attack"], job["strength"]), rule, job["seed"], SIZE)
        lines.append({**job, **{k: round(v, 4) for k, v in got.items() if k in ("quality", "recall",
                                                                                "false_positives")}})
        OUT.write_text("".join(json.dumps(line) + "\n" for line in lines))
    order = {tuple(j[k] for k in KEYS): i for i, j in enumerate(jobs())}
    rows = sorted((r for r in lines[1:]), key=lambda r: order.get(tuple(r[k] for k in KEYS), len(order)))
    write_page(rows, lines[0]["machine"]["cpu"], OUT.parent)
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> list[Row]:
    """For each quiet attack the largest share that any detector casts out more of attackers than of honest clients."""
    out = []
    for name in QUIET:
        gaps = {d: mean(margins(rows, name, d)) for d in DETECTORS if margins(rows, name, d)}
        if gaps:
            best = max(gaps, key=lambda d: gaps[d])
            out.append(row(f"strength/{name}: {best}", gaps[best], "cast out, attackers less honest", "chance: 0", 0.5))
    return out


def margins(rows: list[dict[str, Any]], name: str, rule: str) -> list[float]:
    """Recall less false positives, over strengths and seeds."""
    mine: list[Mapping[str, Any]] = [r for r in rows if (r["attack"], r["defense"]) == (name, rule) and "recall" in r]
    return [r["recall"] - r["false_positives"] for r in mine]
