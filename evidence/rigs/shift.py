"""Rig B of the dossiers: the same topics at every client, but a share of the words in a code of the client's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, VOCAB, documents, pretrained, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import Profile
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

CLIENTS = 5


def coded(rng: np.random.Generator, share: float) -> np.ndarray:
    """What each word is written as [V]: a permutation of so large a share of the words."""
    code, some = np.arange(VOCAB), rng.permutation(np.arange(20, VOCAB))[: int(share * (VOCAB - 20))]
    code[some] = rng.permutation(some)
    return code.astype(np.int32)


def shifted(seed: int, shift: float, rows: int, clients: int = CLIENTS) -> Federation:
    """Clients with so many rows of eight topics each, and 200 test rows in the same code."""
    rng = numpy_stream(seed, "shift")
    words, shards = topics(rng, len(CLASSES)), {}
    for k in range(clients):
        code = coded(rng, shift)

        def write(n: int, code: np.ndarray = code) -> list[Any]:
            return [replace(e, ids=code[e.ids]) for e in
                    documents(rng, words, rng.permutation(np.arange(n) % len(CLASSES)), 0.35)]

        shards[f"client-{k}"] = Shard(write(rows), write(200))
    return Federation(shards, shards["client-0"].test, "classification", CLASSES)


def shift(method: str, seed: int, *, shift: float = 0.5, rows: int = 80, space: Mapping[str, Any] | None = None,
          knobs: Mapping[str, Any] | None = None, rounds: int = 10, local: Mapping[str, Any] | None = None,
          mixed: bool = False) -> Metrics:
    """`accuracy` and `loss`: the clients' mean on their own test rows, each with the model that it would use; `least`
    is the worst client's. `mixed`: every other client has one block of the encoder instead of two."""
    torch.set_num_threads(1)
    made = dict(space or {"name": "adapter", "size": 12})
    kind = make_space(made.pop("name"), **made)
    fed = shifted(seed, shift, rows)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    model = encoder_of(seed, kind, 2)
    more: dict[str, Any] = {}
    if mixed:
        more = {"profiles": {c: Profile(model="one block") for c in list(fed.clients)[::2]},
                "held": Shelf({"one block": lambda: encoder_of(seed, kind, 1)})}
    run = Trial(method, World(model, fed, spec, seed, **more), dict(knobs or {})).rounds(rounds)
    scores = run.scores("local").values()
    right = [s.get("prototype_accuracy", s["accuracy"]) for s in scores]
    wire = run.engine.record.totals()
    return {"accuracy": float(np.mean(right)), "least": float(min(right)), "up_bytes": float(wire["up"]),
            "loss": float(np.mean([s["loss"] for s in scores])), **run.work()}


def encoder_of(seed: int, space: Any, blocks: int) -> Model:
    """The pre-trained encoder with so many of its blocks."""
    net = pretrained(seed)
    net.body.encoder.layer = net.body.encoder.layer[:blocks]
    net.body.config.num_hidden_layers = blocks
    return Model(net, None, "classification", space, labels=CLASSES, seed=seed)


RIGS = {"shift": shift}
