"""Rigs of vision-language methods on colored shapes: what a federation's prompts or adapters are worth, and cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evidence.rigs.shapes import COLORS, PAIRS, SEEN, SHAPES, Some, shapes_world, small_clip
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.layer import Layer
from fedllm.core.rng import numpy_stream
from fedllm.engines.world import World
from fedllm.local.forward import run_losses, run_measures
from fedllm.local.requests import Limits, Losses, Measure
from fedllm.spaces.domain_prompt import KEYS, DomainPrompt, likeliest
from fedllm.spaces.dual_prompt import DualPrompt, looked_at
from fedllm.spaces.prompt_generator import NET

Knobs = Mapping[str, Any] | None


def frozen(world: World) -> dict[str, float]:
    """The model's figures on the common test before anybody trains, with its own sentence for each class."""
    rows = world.tokenized(world.federation.test)
    got = run_losses([Losses("", world.model, {}, None, rows, tested=True)], Limits())[0]
    return {"loss": got.mean, **world.model.measured(got.figures)}


def trained(method: str, world: World, knobs: Knobs, rounds: int) -> tuple[Trial, Metrics]:
    """The method after its rounds; what it sent, and its seconds of this core without the drawing and the test."""
    world.encoded("__global__", "test")
    began = time.process_time()
    run = Trial(method, world, dict(knobs or {})).rounds(rounds)
    spent, wire = time.process_time() - began, run.engine.record.totals()
    return run, {"up": wire["up"] / rounds, "down": wire["down"] / rounds, "seconds": spent, **run.work()}


def means(run: Trial, on: str) -> Metrics:
    """Mean accuracy and loss of what each client would use."""
    scores = run.scores(on).values()
    return {m: float(np.mean([s[m] for s in scores])) for m in ("accuracy", "loss")}


def disjoint(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None, local: Knobs = None,
             rounds: int = 10, look: str = "faded", shots: int = 2, cached: bool = True) -> Metrics:
    """Eight clients of six of the 48 classes each, in one look; tested on all 48 in it."""
    torch.set_num_threads(1)
    order = [PAIRS[i] for i in numpy_stream(seed, "whose classes").permutation(len(PAIRS))]
    clients = {f"client-{k}": (Some(tuple(order[6 * k : 6 * k + 6]), look, shots), None) for k in range(8)}
    world = shapes_world(seed, PAIRS, clients, [Some(PAIRS, look, 6)], space, local, cached)
    run, cost = trained(method, world, knobs, rounds)
    got, was = means(run, "global"), frozen(world)
    return {**got, "over_zero_shot": got["accuracy"] - was["accuracy"], **cost}


def looks_world(seed: int, space: Mapping[str, Any], local: Knobs, clients: Sequence[str], classes: int, own: int,
                shots: int, cached: bool = True) -> World:
    """Clients with a look each and `own` of the classes, drawn anew for each; the common test is all classes in all
    their looks, look by look."""
    rng = numpy_stream(seed, "whose classes")
    labels = tuple(PAIRS[i] for i in sorted(rng.permutation(len(PAIRS))[:classes]))
    shards = {}
    for look in clients:
        mine = tuple(labels[i] for i in rng.permutation(classes)[:own])
        shards[f"client-{look}"] = (Some(mine, look, shots), Some(mine, look, max(4, 48 // own)))
    test = [Some(labels, look, max(1, 96 // classes)) for look in clients]
    return shapes_world(seed, labels, shards, test, space, local, cached)


def looks(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None, local: Knobs = None,
          rounds: int = 10, clients: Sequence[str] = SEEN, classes: int = 48, own: int = 12, shots: int = 4) -> Metrics:
    """Each client tested on its own classes in its look."""
    torch.set_num_threads(1)
    world = looks_world(seed, space, local, clients, classes, own, shots)
    run, cost = trained(method, world, knobs, rounds)
    return {**means(run, "local"), **cost}


def routed(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None, local: Knobs = None,
           rounds: int = 10, clients: Sequence[str] = ("photo", "sketch", "neon"), classes: int = 16,
           shots: int = 4) -> Metrics:
    """Three clients with a look each and the same classes, tested on all looks: `common_accuracy`; of methods that
    tell looks `domain_accuracy`, and `below_oracle`, what the true look's key would be worth."""
    torch.set_num_threads(1)
    world = looks_world(seed, space, local, clients, classes, classes, shots)
    run, cost = trained(method, world, knobs, rounds)
    out = {**{f"common_{m}": v for m, v in means(run, "global").items()}, **cost}
    if (told := TOLD.get(type(world.model.space))) is None or "places" not in run.state:
        return out
    rows, theta = world.encoded("__global__", "test"), run.method.served(run.state)[0]
    each = len(rows) // len(clients)
    true = np.repeat([run.state["places"][f"client-{look}"] for look in clients], each)
    said = run_measures([Measure("", world.model, theta, None, rows, fn=told)], Limits())[0].argmax(1)
    out["domain_accuracy"] = float((said == true).mean())
    if "keys" in run.state:
        right = [run_losses([Losses("", world.model, {**theta, KEYS: theta[KEYS][int(true[i * each])][None]}, None,
                                    rows[i * each : (i + 1) * each])], Limits())[0].correct.mean()
                 for i in range(len(clients))]
        out["below_oracle"] = float(np.mean(right)) - out["common_accuracy"]
    return out


TOLD = {DomainPrompt: likeliest, DualPrompt: looked_at}
"""What says of which look a picture is, by space."""


def named(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None, local: Knobs = None,
          rounds: int = 10, look: str = "faded", shots: int = 8) -> Metrics:
    """Two clients tell four shapes of any color and two tell three colors of any shape; half of each is new to all.

    `base` and `new` are the accuracies over both tasks, each picture told among the base (or new) names of its task.
    """
    torch.set_num_threads(1)
    rng, labels = numpy_stream(seed, "whose classes"), (*SHAPES, *COLORS)
    halves = {}
    for task, names in (("shapes", SHAPES), ("colors", tuple(COLORS))):
        order = tuple(names[i] for i in rng.permutation(len(names)))
        halves[task] = order[: len(order) // 2], order[len(order) // 2 :]
    shards = {f"{task}-{i}": (Some(base, look, shots, base), None) for task, (base, _) in halves.items()
              for i in range(2)}
    tests = {kind: [Some(some[i], look, 96 // len(some[i]), some[i]) for some in halves.values()]
             for i, kind in enumerate(("base", "new"))}
    world = shapes_world(seed, labels, shards, [*tests["base"], *tests["new"]], space, local)
    run, cost = trained(method, world, knobs, rounds)
    rows, theta = world.encoded("__global__", "test"), run.method.served(run.state)[0]
    told = [run_losses([Losses("", world.model, t, None, rows, tested=True)], Limits())[0].correct for t in (theta, {})]
    half = len(rows) // 2
    got, was = ({"base": float(c[:half].mean()), "new": float(c[half:].mean())} for c in told)
    return {**got, **{f"{k}_over_zero_shot": got[k] - was[k] for k in got}, **cost}


class Seen(Layer):
    """Notes the shape of every tensor that a client sends."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        reply = call(msg)
        self.shapes += [tuple(t.shape) for t in reply.values() if isinstance(t, torch.Tensor)]
        return reply


def sent(method: str, seed: int, *, space: Mapping[str, Any], knobs: Knobs = None) -> Metrics:
    """What one client sends in a round beside the context's m d numbers, over two widths of the picture's tower, and
    how many of its tensors have a row for each of its pictures."""
    torch.set_num_threads(1)
    beside, leaked = 0, 0
    for width in (32, 64):
        seen = Seen()
        world = shapes_world(seed, PAIRS[:6], {"client": (Some(PAIRS[:6], "photo", 5), None)}, [], space, {"steps": 1},
                             clip=small_clip(width))
        Trial(method, world, dict(knobs or {}), layers=[seen]).rounds(1)
        m = len(world.model.net.names.before) if space.get("start_from") == "template" else space["length"]
        beside = max(beside, abs(sum(math.prod(s) for s in seen.shapes) - m * 64))
        leaked += sum(len(s) > 0 and s[0] == 30 for s in seen.shapes)
    return {"numbers_beside": float(beside), "rows_sent": float(leaked)}


def prompts(method: str, seed: int, *, space: Mapping[str, Any] | None = None) -> Metrics:
    """By how much a prompt generator's prompt differs, relatively, when the names come in another order."""
    world = shapes_world(seed, PAIRS[:6], {"client": (Some(PAIRS[:2], "photo", 1), None)}, [],
                         space or {"name": "prompt_generator"})
    net, theta = world.model.net, {n.removeprefix(NET): t[None] for n, t in world.model.initial().items()}
    order = torch.from_numpy(numpy_stream(seed, "order").permutation(6))
    every = torch.ones(1, 6, dtype=torch.bool)
    one, other = (world.model.space.prompts(theta, net.bare()[at], every) for at in (torch.arange(6), order))
    return {"off_by_order": float((one - other).norm() / one.norm())}


RIGS = {"shapes_disjoint": disjoint, "shapes_looks": looks, "shapes_routed": routed,
        "shapes_named": named, "shapes_sent": sent, "shapes_prompts": prompts}
