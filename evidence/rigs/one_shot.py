"""Clients whose labels differ train once; the server has their models, and no row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import CLASSES, documents, pretrained, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import Profile
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.batch import collate
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

CLIENTS, KINDS, EACH, STEPS = 5, 5, 80, 40


def federation(seed: int) -> Federation:
    """Five clients with 80 documents of five topics by Dirichlet(0.3), at least one of two topics; 400 to test."""
    rng = numpy_stream(seed, "one shot")
    words, shards = topics(rng, KINDS), {}
    for k in range(CLIENTS):
        y = rng.choice(KINDS, EACH, p=rng.dirichlet([0.3] * KINDS))
        y[:2] = [k, (k + 1) % KINDS]
        shards[f"client-{k}"] = Shard(documents(rng, words, y, 0.4))  # type: ignore[arg-type]
    return Federation(shards, documents(rng, words, np.arange(400) % KINDS, 0.4), "classification", CLASSES[:KINDS])  # type: ignore[arg-type]


def net(seed: int, blocks: int) -> Model:
    """The pre-trained encoder with so many of its blocks, all of it trained."""
    made = pretrained(seed)
    made.body.encoder.layer = made.body.encoder.layer[:blocks]
    made.body.config.num_hidden_layers = blocks
    made.classifier = torch.nn.Linear(made.body.config.hidden_size, KINDS)
    return Model(made, None, "classification", make_space("full"), labels=CLASSES[:KINDS], seed=seed)


def one_shot(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, mixed: bool = False,
             local: Mapping[str, Any] | None = None) -> Metrics:
    """`accuracy` of what is served on 400 documents (the clients' mean where nothing is), and by how much the student's
    is above that of the ensemble of the clients' models (`to_ensemble`). With `mixed` every other client's model has
    one block in the place of two."""
    torch.set_num_threads(1)
    fed, whole, half = federation(seed), net(seed, 2), net(seed, 1)
    profiles = {c: Profile(model="half") for c in list(fed.clients)[::2]} if mixed else {}
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-3, "batch_size": 16, "steps": STEPS, **(local or {})})
    world = World(whole, fed, spec, seed, profiles, models=(held := Shelf({"half": lambda: half})), held=held)
    ours = {"epochs": 8, "g_steps": 5, "distill_steps": 25, "batch": 40, "words": 236, "length": 20}
    run = Trial(method, world, {**(ours if method == "dense" else {}), **(knobs or {})})
    sent: list[Any] = []
    if method == "dense":
        cross = run.engine.cross

        def heard(way: str, job: Any, payload: Any) -> Any:
            if way == "up" and "mean" in payload:
                sent.append((job.client, {k[6:]: v for k, v in payload.items() if k.startswith("theta/")}))
            return cross(way, job, payload)

        run.engine.cross = heard
    run.rounds(1)
    out = {"accuracy": float(np.mean([s["accuracy"] for s in run.scores("global").values()])), **run.work()}
    if sent:
        batch = collate([list(fed.test)], 0, torch.device("cpu"))
        z = []
        for c, theta in sent:
            model = half if c in profiles else whole
            with torch.no_grad(), model.using([theta]):
                z.append(model.class_logits(batch))
        y = np.array([int(r.labels) for r in fed.test])  # type: ignore[attr-defined]
        told = float((torch.stack(z).mean(0).argmax(1).numpy() == y).mean())
        out |= {"ensemble": told, "to_ensemble": out["accuracy"] - told}
    return out


RIGS = {"one_shot": one_shot}
