"""What privacy costs in quality: FedAvg-LoRA on SST-2 with ten clients, plain and under each layer, in one table.

`fedllm bench quality` runs all of it (hours on two cores); FEDLLM_QUALITY="rounds=2; rows=none,secagg" a part, whose
rows say how many rounds they had. A row's run is kept, and is not made again for the same recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from evidence.bench.rows import Row, row
from evidence.rigs.topics import cache_dir
from fedllm.core.errors import RecipeError

RECIPE = Path(__file__).parents[2] / "recipes" / "sst2.yaml"
EPSILONS = (8.0, 3.0, 1.0)
SEEDS = 5


def stacks() -> dict[str, tuple[list[dict[str, Any]], int]]:
    """Name -> layers and seed of every row."""
    out: dict[str, tuple[list[dict[str, Any]], int]] = {
        "none": ([], 0), "secagg": ([{"name": "secagg"}], 0), "he_ckks": ([{"name": "he_ckks"}], 0)}
    out |= {f"dp_fedavg epsilon {e:g}": ([{"name": "dp_fedavg", "epsilon": e, "delta": 1e-2, "clip_norm": 0.3}], 0)
            for e in EPSILONS}
    out |= {f"dp_sgd epsilon {e:g}": ([{"name": "dp_sgd", "epsilon": e, "clip_norm": 1.0}], 0) for e in EPSILONS}
    for seed in range(SEEDS):
        out |= {f"none seed {seed}": ([], seed), f"int8 seed {seed}": ([{"name": "codec_quant", "bits": 8}], seed)}
    return out


def quality() -> list[Row]:
    """A row for each stack, and int8 against the plain runs over five seeds when all of these were made."""
    said = os.environ.get("FEDLLM_QUALITY", "")
    given = dict(x.strip().partition("=")[::2] for x in said.split(";") if x.strip())
    known, names = stacks(), [n for n in given.get("rows", "").split(",") if n]
    if odd := [n for n in names if n not in known] + [k for k in given if k not in ("rows", "rounds")]:
        raise RecipeError(f"FEDLLM_QUALITY: {odd[0]!r} is unknown. Allowed: rounds=N; rows=A,B with {', '.join(known)}")
    rounds = int(given["rounds"]) if "rounds" in given else None
    made = {name: measured(*known[name], rounds) for name in names or known}
    rows = [row(f"quality/{name}", got["accuracy"], "accuracy", "fedavg without a layer", loss=got["loss"],
                rounds=got["rounds"], bytes_up=got["up"], bytes_down=got["down"], seconds=got["seconds"],
                epsilon=got["epsilon"], claim=got["claim"]) for name, got in made.items()]
    pairs = [(made[f"int8 seed {s}"], made[f"none seed {s}"]) for s in range(SEEDS)
             if f"int8 seed {s}" in made and f"none seed {s}" in made]
    if len(pairs) == SEEDS:
        gaps = [a["accuracy"] - b["accuracy"] for a, b in pairs]
        plain = [b["accuracy"] for _, b in pairs]
        spread = (sum((x - sum(plain) / SEEDS) ** 2 for x in plain) / (SEEDS - 1)) ** 0.5
        rows.append(row("quality/int8 over 5 seeds", -sum(gaps) / SEEDS, "accuracy lost", "seed noise", spread,
                        least=True, each=[round(g, 4) for g in gaps], seed_noise=round(spread, 4)))
    return rows


def measured(layers: list[dict[str, Any]], seed: int, rounds: int | None) -> dict[str, Any]:
    """The final figures of one run, from the cache where it was made before."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {"name": "quality", "layers": layers, "seed": seed, "rounds": rounds or recipe["rounds"],
               "evaluate": {"clients": False, "samples": 0}}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    kept = cache_dir() / "quality" / f"{key}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    from fedllm.api import run

    result = run(recipe, root=cache_dir() / "quality" / "runs")
    privacy = result.privacy or {}
    epsilon = max((float(s["epsilon"]) for s in privacy.get("layers", []) if "epsilon" in s), default=None)
    test = result.evaluation["global"]
    got = {"accuracy": test["accuracy"], "loss": round(test["loss"], 4), "rounds": result.rounds, "epsilon": epsilon,
           "up": result.bytes["up"], "down": result.bytes["down"], "seconds": round(result.seconds, 1),
           "claim": privacy.get("claim")}
    kept.write_text(json.dumps(got))
    return got
