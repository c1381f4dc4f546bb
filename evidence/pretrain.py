"""Pre-train a Llama of 1.9 M weights together from nothing: `make pretrain`, `python -m evidence.pretrain [seeds]`;
`python -m evidence.pretrain longer`: five times the steps, for who synchronizes seldom.

Four clients, fp32, the same tokens in every arm; perplexity on held-out text against bytes on the wire. A cell (arm, H,
seed) that docs/results/pretrain.json has is not run again, so that a killed run goes on where it was.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.bench.rows import machine
from evidence.pages.pretrain import write_page
from evidence.rigs.trials import Trial
from fedllm.core.errors import DataError
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.data.office import pretraining_rows
from fedllm.data.sources import resolve
from fedllm.engines.carry import carry_out
from fedllm.engines.world import World
from fedllm.local.requests import Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.wire import codec

OUT = Path(__file__).parents[1] / "docs/results/pretrain.json"
PLAYS = "shared:tinyshakespeare.txt"
CLIENTS, STEPS, ROWS, LENGTH, VOCABULARY = 4, 600, 2, 64, 2048
HELD, EVERY, OFFICE = 96, 100, 3000
LOCAL: Mapping[str, Any] = {"optimizer": "adamw", "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, "warmup": 30,
                            "over_rounds": "cosine_steps"}
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0}
RATES = (1e-3, 3e-3, 6e-3)
TUNED_ON = 100
"""The seed on which each arm's inner rate is chosen, at the shorter H and half of the steps (DDP: all of them)."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a method and its knobs, and how many rounds of it are H steps."""

    method: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1
    """Rounds in which everything is synchronized once."""


ARMS: Mapping[str, Arm] = {
    "diloco": Arm("diloco", OUTER),
    "streaming_diloco": Arm("streaming_diloco", {**OUTER, "fragments": 2, "delay": 2, "bits": 4}, 2),
    "sparse_loco": Arm("sparse_loco", {"k": 64}),
    "photon": Arm("photon"),
    "fedavg": Arm("fedavg", {"weighting": "uniform"}),
}
SPANS = (30, 100)
TIMES, LONGER = 5, ("ddp", "diloco", "streaming_diloco", "sparse_loco")
"""How many times as many steps `longer` makes, on seed 0 at the longer H, and of which arms: those of which something
is asked."""


@functools.cache
def blocks() -> tuple[list[Encoded], list[Encoded]]:
    """Training and held-out blocks of 64 tokens: every 16th block is held out, plays and office text alike."""
    try:
        plays = resolve(PLAYS).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{PLAYS} cannot be read ({error}); FEDLLM_DATA names the folder that has it") from None
    office = "\n".join(f"{r['prompt']}{r['response']}" for r in pretraining_rows(OFFICE, seed=0))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([plays, office], trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    train, held = [], []
    for text in (plays, office):
        ids = np.array(bpe.encode(text).ids, np.int32)
        for i, row in enumerate(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)):
            labels = row.astype(np.int64)
            labels[0] = -100
            (held if i % 16 == 0 else train).append(Encoded(row, labels, LENGTH - 1))
    return train, held


def world(seed: int, rate: float, steps: int, rounds: int, clients: int) -> World:
    """Random weights by the seed, and the blocks dealt at random in equal parts; one client has the rows of all, and
    as many a step."""
    train, held = blocks()
    rng = numpy_stream(seed, "pretrain")
    order = rng.permutation(len(train))
    shards = {f"client-{k}": Shard([train[i] for i in part]) for k, part in enumerate(np.array_split(order, clients))}  # type: ignore[misc]
    test = [held[i] for i in numpy_stream(0, "held").permutation(len(held))[:HELD]]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=160, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=LENGTH))
    spec = LocalSpec(**LOCAL, lr=rate, steps=steps, batch_size=ROWS * CLIENTS // clients)
    model = Model(net, None, "generation", make_space("full"), seed=seed)
    return World(model, Federation(shards, test, "generation"), spec, seed, exact_match=False, rounds=rounds)  # type: ignore[arg-type]


def perplexity(of: World, theta: Tree) -> float:
    """On the held-out blocks."""
    rows: Any = of.federation.test
    return math.exp(carry_out([Losses("held", of.model, theta, None, rows)], of.limits)[0].mean)


def ddp(seed: int, rate: float, steps: int | None = None) -> dict[str, Any]:
    """Every step synchronous: AdamW on the mean gradient of all clients' rows, which is one process with all of them.
    Its bytes are those of a message with the gradient from and to each client, each step."""
    at = world(seed, rate, EVERY, (steps or STEPS) // EVERY, 1)
    run = Trial("diloco", at, dict(PLAIN))
    message = codec.size({f"gradient/{n}": t for n, t in at.model.initial().items()})
    return {**_curve(run, at, EVERY, lambda t: 2 * CLIENTS * message * t * EVERY), "message": message}


def federated(name: str, span: int, seed: int, rate: float, steps: int | None = None) -> dict[str, Any]:
    """One arm at H = `span`, over all steps or so many. Starting weights are not counted (all have the seed), the last
    model's way down is."""
    arm = ARMS[name]
    each, steps = span // arm.parts, steps or STEPS
    at = world(seed, rate, each, steps // each, CLIENTS)
    run = Trial(arm.method, at, dict(arm.knobs))

    def sent(rounds: int) -> float:
        wire = [e for e in run.engine.record.events if e["kind"] == "wire" and e["round"] < rounds]
        start = sum(e["bytes"] for e in wire if e["round"] == 0 and e["direction"] == "down")
        last = sum(e["bytes"] for e in wire if e["round"] == rounds - 1 and e["direction"] == "down")
        return sum(e["bytes"] for e in wire) - start + (last if rounds > 1 else start)

    return _curve(run, at, each, sent)


def _curve(run: Trial, at: World, each: int, sent: Any) -> dict[str, Any]:
    began, points, rounds = time.process_time(), [], at.rounds or 0
    every = max(1, EVERY // each)
    for t in range(1, rounds + 1):
        run.rounds(1)
        if not t % every or t == rounds:
            points.append([t * each, float(sent(t)), perplexity(at, run.method.served(run.state)[0])])
    return {"points": points, "perplexity": points[-1][2], "bytes": points[-1][1],
            "tokens": rounds * each * ROWS * CLIENTS * (LENGTH - 1), "cpu_seconds": time.process_time() - began}


def settings() -> dict[str, Any]:
    """All that a cell's figures hang on; a cell of other settings is run again."""
    return {"clients": CLIENTS, "steps": STEPS, "rows": ROWS, "length": LENGTH, "vocabulary": VOCABULARY,
            "held": HELD, "office": OFFICE, "local": dict(LOCAL), "rates": list(RATES)}


def cells(seeds: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Arm, H and seed; H = 1 is DDP. Seed by seed, so that what there is after a while can be compared."""
    for seed in seeds:
        yield from [("ddp", 1, seed), *((name, span, seed) for span in SPANS[::-1] for name in ARMS)]


def main(seeds: Sequence[int], longer: bool = False) -> None:
    """Run what is not there yet (`longer`: of the long run), write each cell as it ends, and the page at the end."""
    torch.set_num_threads(1)
    console = Console()
    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    if found.get("settings") != settings():
        found = {"settings": settings(), "cpu": machine()["cpu"], "tuning": {}, "cells": []}

    def keep() -> None:
        fresh = OUT.with_suffix(".part")
        fresh.write_text(json.dumps(found, indent=1) + "\n")
        fresh.replace(OUT)
        write_page(found, OUT.parent)

    def best(name: str) -> float:
        """The rate of the grid at which this arm ends lowest, on a seed apart."""
        seen = found["tuning"].setdefault(name, {})
        for rate in RATES:
            if f"{rate:g}" not in seen:
                got = ddp(TUNED_ON, rate) if name == "ddp" else federated(name, SPANS[0], TUNED_ON, rate, STEPS // 2)
                seen[f"{rate:g}"] = got["perplexity"]
                console.log(f"tuning {name}: lr {rate:g} perplexity {got['perplexity']:.2f}")
                keep()
        return float(min(seen, key=seen.get))

    here = found.setdefault("longer" if longer else "cells", [])
    steps = STEPS * TIMES if longer else STEPS
    for name, span, seed in cells(seeds):
        if longer and (name not in LONGER or span not in (1, SPANS[-1])):
            continue
        rate = best(name)
        mine = [c for c in here if (c["arm"], c["H"], c["seed"]) == (name, span, seed)]
        if not any(c["lr"] == rate for c in mine):
            got = ddp(seed, rate, steps) if name == "ddp" else federated(name, span, seed, rate, steps)
            here[:] = [c for c in here if c not in mine]  # of another rate, or of none
            here.append({"arm": name, "H": span, "seed": seed, "lr": rate, **got})
            console.log(f"{name} H={span} seed {seed}: perplexity {got['perplexity']:.2f}, {got['bytes']:.3g} bytes, "
                        f"{got['cpu_seconds']:.0f} s of CPU")
            keep()


if __name__ == "__main__":
    if sys.argv[1:] == ["longer"]:
        main([0], longer=True)
    else:
        main([int(s) for s in sys.argv[1:]] or [0, 1, 2])
