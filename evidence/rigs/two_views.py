"""Rows of two views, a noisy picture and a text that tells more: a split model of both, and the same model unsplit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evidence.rigs.pictures import CLASSES, END, NAMES, pictures, prompts, small_clip, world_of
from evidence.rigs.topology import gap
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods._towers import BOTH, head_of, shared
from fedllm.models.batch import collate
from fedllm.models.dual import DualEncoder
from fedllm.models.fusion import fuse, head_says
from fedllm.models.model import Model
from fedllm.models.towers import PATHS
from fedllm.spaces import make_space

KINDS, CLIENTS, ROWS = 4, 4, 32


def rows(rng: np.random.Generator, kinds: np.ndarray, count: int, noise: float) -> list[Encoded]:
    """Pictures of one of four classes under much noise, each with three words, one of them mostly its own."""
    y = rng.integers(0, KINDS, count)
    x = pictures(rng, kinds, y, "photo") + rng.normal(0, noise, (count, 3, 16, 16)).astype(np.float32)
    said = np.where(rng.random(count) < 0.9, y, rng.integers(0, KINDS, count))
    return [Encoded(np.zeros(1, np.int32), int(c), 1, {
        "pixels": p, "words": np.array([0, rng.integers(1, 4), 5 + w, rng.integers(1, 4), END])}, {"words": -1.0})
        for c, w, p in zip(y, said, x.astype(np.float32), strict=True)]


def view_world(seed: int, noise: float, local: Mapping[str, Any]) -> World:
    """Four clients of 32 such rows; a small CLIP that has seen clean photos of the classes."""
    kinds, weights = world_of(seed)
    rng, clip = numpy_stream(seed, "two views"), small_clip(seed)
    clip.load_state_dict(weights, strict=False)
    fed = Federation({f"client-{k}": Shard(rows(rng, kinds, ROWS, noise)) for k in range(CLIENTS)},  # type: ignore[arg-type]
                     rows(rng, kinds, 200, noise), "image_text", NAMES[:KINDS])  # type: ignore[arg-type]
    assert CLASSES > KINDS
    model = Model(DualEncoder(clip, prompts()[:KINDS], cached=False), None, "image_text",
                  make_space("split_adapter", size=16), labels=NAMES[:KINDS], seed=seed)
    return World(model, fed, LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": 4, "batch_size": 16, **local}), seed)


def two_views(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 24, noise: float = 2.0,
              whole: bool = False, local: Mapping[str, Any] | None = None) -> Metrics:
    """`image_accuracy` and `text_accuracy` of the heads and `accuracy` of the fusion on held-out rows; the fusion
    teaches from round 12 on. `whole`: `off_unsplit`, by how much two rounds of a step differ from the unsplit model's.
    """
    torch.set_num_threads(1)
    if whole:
        world = view_world(seed, noise, {"batch_size": ROWS, "steps": 1})
        run = Trial(method, world, {"steps": 1, "hidden": 16, "heads": 2}).rounds(2)
        return {"off_unsplit": gap(run.method.served(run.state)[0], unsplit(world, run.method, 2))}
    run = Trial(method, view_world(seed, noise, local or {}),
                {"hidden": 32, "heads": 4, "fuse_window": 10, "fuse_below": 1e9, **(knobs or {})}).rounds(rounds)
    score = dict(next(iter(run.scores("global").values())))
    return {**{m: float(score[m]) for m in ("loss", "accuracy", "image_accuracy", "text_accuracy")}, **run.work()}


def unsplit(world: World, method: Any, rounds: int) -> dict[str, Tensor]:
    """Descent of one whole model along the mean of the clients' gradients, both modalities' losses added."""
    model, state = world.model, method.init(world.model)
    theta, fusion = {**state["ends"], **state["tasks"]}, state["fusion"]
    net, held, lr = method.fusion(model), set(model.initial()), world.local.lr
    for _ in range(rounds):
        leaves = {n: t.clone().requires_grad_() for n, t in {**theta, **fusion}.items()}
        total = torch.zeros(())
        for c in world.federation.clients:
            batch = collate([world.encoded(c, "train")], model.pad, torch.device("cpu"))
            with model.using([{}], stacked={n: leaves[n][None] for n in held}):
                model.stack.rows = len(batch.ids)
                image = model.net.get_submodule(PATHS["image"])(pixel_values=batch.parts["pixels"]).pooler_output
                text = model.net.get_submodule(PATHS["text"])(
                    input_ids=batch.parts["words"]).pooler_output
            f = {"image": image, "text": text}
            own = sum(F.cross_entropy(head_says(head_of({n: leaves[n] for n in theta}, m), f[m])[1], batch.labels)
                      for m in BOTH)
            joint = fuse(net, {n: leaves[n] for n in fusion}, {m: t.detach() for m, t in f.items()})[1]
            total = total + (own + F.cross_entropy(joint, batch.labels)) / len(world.federation.clients)
        slopes = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
        theta = {n: t - lr * slopes[n] for n, t in theta.items()}
        fusion = {n: t - method.fusion_lr * slopes[n] for n, t in fusion.items()}
        theta |= shared({n: theta[n] for n in state["tasks"]})
    return {**theta, **{f"fusion.{n}": t for n, t in fusion.items()}}


RIGS = {"two_views": two_views}
