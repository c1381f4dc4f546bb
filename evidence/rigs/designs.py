"""Clients whose networks differ in design: `RIGS["designs"](method, seed)` gives their accuracy on everybody's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, documents, pretrained, topic_federation, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import Profile
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

COARSE, CLIENTS, SHARE = 4, 4, 0.4
STEPS, DIGEST, OWN = 6, 9, 15
"""Local steps of a round, those towards the consensus, and those before the first round: few, since a seed of both arms
would take a quarter of a minute with three times as many, and come out alike."""
PUBLIC = 200
OURS = {"digest_steps": DIGEST, "own_steps": OWN, "alignment": PUBLIC}


def designs(method: str, seed: int, *, skew: str = "subclass", knobs: Mapping[str, Any] | None = None,
            rounds: int = 6, local: Mapping[str, Any] | None = None) -> Metrics:
    """Encoders of one and of two blocks, by turns; 200 public rows of all kinds.

    `subclass`: four clients know all of four labels, each by a topic of its own. `label`: eight clients by
    Dirichlet(0.1) over eight labels. `accuracy` is the clients' mean on the IID test, `bytes_spread` by how much what
    a client sends and gets in a round differs between the designs. A method that does not digest gets as many steps.
    """
    torch.set_num_threads(1)
    fed = _subclasses(seed) if skew == "subclass" else _labels(seed)
    labels = CLASSES[:COARSE] if skew == "subclass" else CLASSES
    two, one = _net(seed, len(labels), 2), _net(seed, len(labels), 1)
    profiles = {c: Profile(model="one block") for c in list(fed.clients)[::2]}
    own = method == "fedmd"
    told = {"optimizer": "adamw", "lr": 2e-3, "batch_size": 16, "steps": STEPS if own else STEPS + DIGEST}
    spec = LocalSpec(**{**told, **(local or {})})
    world = World(two, fed, spec, seed, profiles, held=Shelf({"one block": lambda: one}))
    run = Trial(method, world, {**(OURS if own else {}), **(knobs or {})})
    run.rounds(rounds if own else rounds + OWN // (STEPS + DIGEST))
    steps = run.t * (STEPS + DIGEST) + (OWN if own else 0)
    scores = run.scores("global").values()
    first = [e for e in run.engine.record.events if e["kind"] == "wire" and e["round"] == 0]
    each = {c: sum(e["bytes"] for e in first if e["client"] == c) for c in fed.clients}
    return {"work_steps": float(steps), "work_rows_a_step": float(spec.batch_size),
            "accuracy": float(np.mean([s["accuracy"] for s in scores])),
            "least": float(min(s["accuracy"] for s in scores)),
            "bytes_spread": float(max(each.values()) - min(each.values()))}


def _net(seed: int, labels: int, blocks: int) -> Model:
    """The pre-trained encoder with so many of its blocks, all of it trained."""
    net = pretrained(seed)
    net.body.encoder.layer = net.body.encoder.layer[:blocks]
    net.body.config.num_hidden_layers = blocks
    net.classifier = torch.nn.Linear(net.body.config.hidden_size, labels)
    return Model(net, None, "classification", make_space("full"), labels=CLASSES[:labels], seed=seed)


def _subclasses(seed: int) -> Federation:
    """Client k has 80 rows of topic k of each of the labels; test and public rows are of all topics."""
    rng = numpy_stream(seed, "subclasses")
    words = topics(rng, COARSE * CLIENTS)  # topic label * CLIENTS + k

    def rows(n: int, kind: int | None = None) -> list[Any]:
        y = rng.integers(0, COARSE, n)
        k = rng.integers(0, CLIENTS, n) if kind is None else np.full(n, kind)
        return [replace(e, labels=int(label)) for e, label in zip(documents(rng, words, y * CLIENTS + k, SHARE), y,
                                                                  strict=True)]

    shards = {f"client-{k}": Shard(rows(80, k)) for k in range(CLIENTS)}
    return Federation(shards, rows(600), "classification", CLASSES[:COARSE], rows(PUBLIC))


def _labels(seed: int) -> Federation:
    """The topics' federation under label skew, of whose test rows half are public."""
    fed = topic_federation(seed)
    return replace(fed, test=fed.test[PUBLIC:], public=fed.test[:PUBLIC])


RIGS = {"designs": designs}
