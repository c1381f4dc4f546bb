"""Clients that leave, and clients that are worth nothing: a federation of six with one that is unlike the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from evidence.rigs.topics import CLASSES, documents, pretrained, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.canaries import exposures
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

CLIENTS, ROWS, LEAVES = 6, 60, "client-0"
ROUNDS, OTHERS = 8, 400
BOUND = float(np.log(len(CLASSES)))


def world_of(seed: int, odd: str, local: Mapping[str, Any] | None, canaries: Sequence[Encoded] = ()
             ) -> tuple[World, list[Encoded]]:
    """Six clients with 60 documents each. `odd` of the first: `labels` of its own (it calls each topic the next), or
    `noise`, labels drawn by lot. `canaries` are among its rows as well. Beside the world as many fresh documents like
    the first client's."""
    rng = numpy_stream(seed, "leaving")
    words, kinds = topics(rng, len(CLASSES)), len(CLASSES)
    shards, fresh = {}, []
    for k in range(CLIENTS):
        said = documents(rng, words, rng.integers(0, kinds, ROWS), 0.35)
        if k == 0 and odd == "noise":
            said = [Encoded(e.ids, int(rng.integers(kinds)), 1) for e in said]
        if k == 0 and odd == "labels":  # its own way: what the others call a topic it calls the next one
            fresh = [Encoded(e.ids, (int(e.labels) + 1) % kinds, 1)
                     for e in documents(rng, words, rng.integers(0, kinds, ROWS), 0.35)]
            said = [Encoded(e.ids, (int(e.labels) + 1) % kinds, 1) for e in said]
        shards[f"client-{k}"] = Shard([*said, *(canaries if k == 0 else ())])
    test = documents(rng, words, rng.integers(0, kinds, 400), 0.35)
    fed = Federation(shards, test, "classification", CLASSES,  # type: ignore[arg-type]
                     documents(rng, words, rng.integers(0, kinds, 120), 0.35))  # type: ignore[arg-type]
    space = make_space("lora", rank=8, alpha=16.0, targets="all-linear")
    model = Model(pretrained(seed), None, "classification", space, labels=CLASSES, seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, **(local or {})})
    return World(model, fed, spec, seed), fresh


def leaving(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None,
            local: Mapping[str, Any] | None = None, canaries: int = 0) -> Metrics:
    """Eight rounds with a client that labels in a way of its own, then eight without it, against retraining.

    `loss_off`: how far the loss on its rows is from the retrained model's; `auc_off`: how far the AUC by which its rows
    are told from fresh ones is from the retrained model's; `accuracy_off`: the accuracy on the IID test minus that.
    With `canaries`, random documents with labels drawn by lot among its rows, `exposure_off`: how far theirs is.
    """
    torch.set_num_threads(1)
    got, ref = ({**_after(method, seed, {"forget": LEAVES, "at": ROUNDS, "bound": BOUND, **k}, local, canaries)}
                for k in (knobs or {}, {"grade": "retrain"}))
    shown = {"exposure_off": abs(got["exposure"] - ref["exposure"]), "exposure": got["exposure"],
             "retrained_exposure": ref["exposure"]} if canaries else {}
    return {"loss_off": abs(got["loss"] - ref["loss"]), "auc_off": abs(got["auc"] - ref["auc"]), **shown,
            "accuracy_off": got["accuracy"] - ref["accuracy"], "loss": got["loss"], "retrained_loss": ref["loss"],
            "bytes": got["bytes"], "work_rounds": got["work_rounds"]}


def drawn(seed: int, count: int) -> list[Encoded]:
    """Documents of any words, each with a label drawn by lot: nothing but rote tells them."""
    rng = numpy_stream(seed, "leaving canaries")
    words = topics(numpy_stream(seed, "leaving"), len(CLASSES))
    said = documents(rng, words, rng.integers(0, len(CLASSES), count), 0.0)
    return [Encoded(e.ids, int(rng.integers(len(CLASSES))), 1) for e in said]


def _after(method: str, seed: int, knobs: Mapping[str, Any], local: Mapping[str, Any] | None,
           canaries: int = 0) -> Metrics:
    birds = drawn(seed, canaries + OTHERS) if canaries else []
    world, fresh = world_of(seed, "labels", local, birds[:canaries])
    run = Trial(method, world, dict(knobs)).rounds(2 * ROUNDS)
    theta, model = run.method.served(run.state)[0], world.model
    mine, other = (run_losses([Losses("x", model, theta, None, rows)], Limits())[0].total
                   for rows in (world.encoded(LEAVES, "train"), fresh))
    auc = stats.mannwhitneyu(other, mine).statistic / (len(mine) * len(other))  # members have the lower loss
    score = next(iter(run.scores("global").values()))
    seen = run_losses([Losses("x", model, theta, None, birds)], Limits())[0].total if birds else None
    shown = {} if seen is None else {"exposure": float(exposures(seen[:canaries], seen[canaries:]).mean())}
    wire = run.engine.record.totals()
    return {"loss": float(mine.mean()), "auc": float(auc), "accuracy": score["accuracy"], **run.work(), **shown,
            "bytes": float(wire["up"] + wire["down"])}


def worth(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 4,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """Four rounds in which one client's labels are noise. `behind`: what the least of the others is worth above it;
    `rank_correlation` (Spearman) with the exact values of the same rounds, `evaluations_share` of their number."""
    torch.set_num_threads(1)
    runs = {}
    for game in ("gtg", "exact"):
        world, _ = world_of(seed, "noise", local)
        runs[game] = Trial(method, world, {"game": game, **(knobs or {})}).rounds(rounds)
    mine, all_ = (runs[g].state["worth"] for g in ("gtg", "exact"))
    ids = sorted(mine)
    return {"behind": min(v for c, v in mine.items() if c != LEAVES) - mine[LEAVES],
            "rank_correlation": float(stats.spearmanr([mine[c] for c in ids], [all_[c] for c in ids]).statistic),
            "evaluations_share": runs["gtg"].state["evaluations"] / runs["exact"].state["evaluations"],
            **runs["gtg"].work()}


RIGS = {"leaving": leaving, "worth": worth}
