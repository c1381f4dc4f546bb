"""`make frontier`: accuracy against epsilon, for what is trained, whose privacy it is, and who adds the noise.

`python -m evidence.frontier [KEY=VALUE ...]` measures the cells that are not in docs/results/frontier.json yet (a cell
is one run of the framework) and writes that file after each, so that it can be stopped at any moment; then the page.
`data=sst2 space=head noise=shared epsilon=3` picks some; `seconds=600` stops by itself. Under a head each row passes
through the body once, and is remembered for the cells after it (and in FEDLLM_CACHE for other processes).
"""

from __future__ import annotations

import itertools
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.pages.frontier import write_page
from evidence.rigs.topics import cache_dir
from evidence.rigs.worlds import Remembered
from fedllm.core.record import Record
from fedllm.data.load import load_federation
from fedllm.data.section import DataSpec
from fedllm.runs.build import Parts, build
from fedllm.runs.course import Course
from fedllm.runs.judge import Judge
from fedllm.runs.recipe import load_recipe

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[1] / "docs" / "results"
EPSILONS = (3.0, 1.0, None, 8.0, 0.5)
NOISES = ("shared", "local", "central")
SEEDS = 5
KEYS = ("data", "space", "unit", "noise", "clients", "epsilon", "seed")
DATA: dict[str, dict[str, Any]] = {
    "sst2": {"source": "shared:sst2_train.jsonl", "test": "shared:sst2_dev.jsonl", "labels": ["negative", "positive"]},
    "masakhanews": {"source": "shared:masakhanews_train.jsonl", "test": "shared:masakhanews_test.jsonl"}}
SPACES: dict[str, tuple[Any, float]] = {
    "head": ("head", 10.0), "bias": ("bias", 1.0), "soft_prompt": ({"name": "soft_prompt", "length": 8}, 1.0),
    "lora": ({"name": "lora", "rank": 8, "targets": ["query", "value"]}, 0.5)}
"""What is trained, and the rate of one step on all rows at clip 1; only the head's was tuned."""
EACH = 7
"""Rows of a client where clients are what is private."""
MANY, RATE = 10_000, 0.1
"""So many clients are more than there are rows for: each then has rows drawn from all of them, which others have too,
and takes part in a round by a coin that falls in secret."""
Cell = Mapping[str, Any]


def cells() -> Iterator[dict[str, Any]]:
    """All of them, the cheap and telling ones first."""
    for space, data, seed, epsilon, noise in itertools.product(SPACES, DATA, range(SEEDS), EPSILONS, NOISES):
        if epsilon is not None or noise == "shared":  # without noise it is nobody's
            kind = noise if epsilon else "none"
            yield dict(zip(KEYS, (data, space, "example", kind, 10, epsilon, seed), strict=True))
    for data, count, seed, epsilon in itertools.product(DATA, (1000, 10_000), range(SEEDS), EPSILONS):
        yield dict(zip(KEYS, (data, "head", "client", "central" if epsilon else "none", count, epsilon, seed),
                       strict=True))


def recipe_of(cell: Cell) -> dict[str, Any]:
    """The run of a cell: at example level one step a round on all rows, at client level one pass at each client."""
    space, rate = SPACES[cell["space"]]
    layers: list[Any] = []
    if cell["unit"] == "example":
        local = {"optimizer": "sgd", "lr": rate, "over_rounds": "cosine", "steps": 1, "batch_size": 4096}
        noise = {"name": "dp_sgd", "noise": cell["noise"], "epsilon": cell["epsilon"], "delta": 1e-5, "clip_norm": 1.0}
        if not cell["epsilon"]:  # the same clipped steps, with next to none
            noise |= {"noise": "central", "epsilon": None, "noise_multiplier": 1e-3}
        layers = [noise, *(["secagg"] if cell["noise"] == "shared" else [])]
    else:
        local = {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 4096}  # `plan --propose`
        noise = {"name": "dp_fedavg", "epsilon": cell["epsilon"], "delta": 1e-5, "clip_norm": 0.037, "clip_lr": 0.0}
        if not cell["epsilon"]:
            noise |= {"epsilon": None, "noise_multiplier": 0.0}
        if cell["clients"] >= MANY:
            noise |= {"sampling": "poisson", "rate": RATE}
        layers = [noise]
    method = {"name": "fedavg", "server_lr": 30.0 if cell["unit"] == "client" else 1.0}
    data = {**DATA[cell["data"]], "task": "classification", "fields": {"text": "text", "label": "label"},
            "client_test": 0.0, "partition": {"kind": "iid", "clients": cell["clients"]}}
    if cell["clients"] >= MANY:
        data |= {"source": str(people_file(cell)), "partition": {"kind": "by_key", "key": "person"}}
    return {"name": "frontier", "model": {"name": "minilm", "pooling": "mean"}, "data": data, "method": method,
            "space": space, "layers": layers, "local": {**local, "max_length": 64}, "rounds": 40, "seed": cell["seed"],
            "evaluate": {"clients": False, "samples": 0}}


def people_file(cell: Cell) -> Path:
    """Where the rows of very many clients lie."""
    return cache_dir() / "frontier" / f"{cell['data']}-{cell['clients']}-{cell['seed']}.jsonl"


def write_people(path: Path, rows: Sequence[Mapping[str, Any]], clients: int, seed: int) -> None:
    """`EACH` rows for each client, drawn with replacement: what a person has, others may have too."""
    drawn = np.random.default_rng(seed).integers(len(rows), size=(clients, EACH))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({**rows[i], "person": f"p{k:05}"}) + "\n"
                            for k, mine in enumerate(drawn.tolist()) for i in mine))
    part.replace(path)


def measure(cell: Cell) -> dict[str, Any]:
    """Accuracy on the test, and the epsilon that the run's own statement says."""
    if cell["clients"] >= MANY and not people_file(cell).exists():
        data = {**recipe_of({**cell, "clients": 1})["data"]}
        shards = load_federation(DataSpec.model_validate(data), cell["seed"]).clients.values()
        write_people(people_file(cell), [r for s in shards for r in s.train], cell["clients"], cell["seed"])
    parts = build(load_recipe(recipe_of(cell), {}))
    net, began = parts.world.model.net, time.process_time()
    if cell["space"] == "head":
        net.body, net.pooling = Remembered(net.body), "cls"  # type: ignore[attr-defined]
    course = _gone(parts)
    found = Judge(parts, parts.method, Record(lambda event: None)).test(course.state, course.engine.memory, 0)
    says = [x.statement(s) or {} for x, s in zip(course.layers, course.states, strict=True)]
    spent = max((float(s["epsilon"]) for s in says if "epsilon" in s), default=None) if cell["epsilon"] else None
    if isinstance(net.body, Remembered):
        net.body.save()
    return {**cell, "accuracy": round(found["global"]["accuracy"], 4), "spent": spent,
            "cpu_seconds": round(time.process_time() - began, 1),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}


def _gone(parts: Parts) -> Course:
    course = Course(parts, parts.method, parts.layers)
    for round in range(parts.recipe.rounds):
        course.step(round)
    return course


def main(words: Sequence[str]) -> None:
    """Measure what is asked for and not there yet."""
    asked = dict(w.split("=", 1) for w in words)
    ends = time.monotonic() + float(asked.pop("seconds", "inf"))
    if odd := asked.keys() - set(KEYS):
        raise SystemExit(f"{sorted(odd)[0]} is no part of a cell; allowed are {', '.join(KEYS)} and seconds")
    path = FOLDER / "frontier.json"
    done = json.loads(path.read_text()) if path.exists() else []
    have = {tuple(row[k] for k in KEYS) for row in done}
    for cell in cells():
        if tuple(cell[k] for k in KEYS) in have or any(str(cell[k]) not in asked[k].split(",") for k in asked):
            continue
        if time.monotonic() > ends:
            break
        try:
            done.append(measure(cell))
        except Exception as error:
            log.warning("%s: %s: %s", cell, type(error).__name__, error)
            continue
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in done) + "\n]\n")
        log.warning("%s", done[-1])
    write_page(done, [c for c in cells() if tuple(c[k] for k in KEYS) not in {tuple(r[k] for k in KEYS) for r in done}],
               FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
