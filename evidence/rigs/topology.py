"""Small experiments on topologies: clients without a server, trees of servers, streams of groups, lossy links."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Metrics, Trial, _tiny_llama, above_least, quadratic_world
from fedllm.core.errors import PayloadError
from fedllm.core.layer import Layer
from fedllm.core.payload import norm, sub
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.wire._chunk_ring import Faults, Receiver, Ring, Sent, send
from fedllm.wire.fedrdma import chunked_share, seconds, tuned


def peers(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 300, clients: int = 8,
          d: int = 10, lr: float = 0.05, steps: int = 5) -> Metrics:
    """Quadratic losses, and every client's own w: `worst` is how far above the minimum of the mean the mean's value is
    at the worst client's w, `apart` the root mean square distance of the clients from their mean."""
    run, a, c = quadratic_world(method, seed, knobs, rounds, clients, d, {"lr": lr, "steps": steps})
    w = torch.stack([run.engine.memory[f"client-{k}"]["theta"]["w.weight"][0] for k in range(clients)])  # [clients, d]
    apart = (w - w.mean(0)).pow(2).sum(1).mean().sqrt()
    return {"worst": max(above_least(a, c, x) for x in w), "apart": float(apart)}


TREES = {"balanced": {"fan_out": (2,)}, "deep": {"fan_out": (2, 2), "deal": "turns"},
         "unbalanced": {"tree": (("client-0", ("client-1", "client-2", "client-3")), "client-4",
                                 (("client-5",), ("client-6", "client-7"), ()))}}


def trees(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 3) -> Metrics:
    """Eight clients with label skew: the method on several trees (the last one with an empty edge) beside flat FedAvg.

    `off_flat` is the largest relative difference of the trainables; `off_fan_out` by which share the star's bytes over
    those between root and two edges differ from 4, in the worse direction, framing included.
    """
    torch.set_num_threads(1)
    flat, off = topic_trial("fedavg", seed).rounds(rounds), 0.0
    for tree in TREES.values():
        run = topic_trial(method, seed, knobs={**tree, **(knobs or {})}).rounds(rounds)
        off = max(off, gap(run.state["theta"], flat.state["theta"]))
    pairs = topic_trial(method, seed, knobs={**TREES["balanced"], **(knobs or {})}).rounds(rounds)
    star, between = flat.engine.record.totals(), pairs.state["wide_area"]
    return {"off_flat": off, "off_fan_out": max(abs(star[way] / between[way] / 4 - 1) for way in ("up", "down"))}


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative L2 difference of two trees."""
    return norm(sub(a, b)) / norm(b)


def topic_trial(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, alpha: float = 0.1,
                regions: bool = False, layers: Sequence[Layer] = ()) -> Trial:
    """A method on the topics of rig A; with `regions` clients stand in the order of their commonest label."""
    space = make_space("lora", rank=4, alpha=8.0, targets=("query", "value"))
    fed = topic_federation(seed, alpha=alpha)
    if regions:
        kind = {c: int(np.bincount([int(e.labels) for e in s.train]).argmax()) for c, s in fed.clients.items()}  # type: ignore[attr-defined]
        fed = replace(fed, clients={c: fed.clients[c] for c in sorted(fed.clients, key=lambda c: (kind[c], c))})
    model = Model(pretrained(seed), None, "classification", space, labels=CLASSES, seed=seed)
    spec = LocalSpec(optimizer="adamw", lr=3e-3, steps=10, batch_size=16)
    return Trial(method, World(model, fed, spec, seed), dict(knobs or {}), layers=layers)


def edges(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, client_rounds: int = 15,
          regions: bool = False) -> Metrics:
    """`loss` on the IID test after so many rounds of every client; edges alike (IID clients), or regions in which
    labels differ (Dirichlet 0.1, clients sorted by their commonest label)."""
    torch.set_num_threads(1)
    knobs = dict(knobs or ({"fan_out": (2,)} if method == "hierarchical" else {}))
    run = topic_trial(method, seed, knobs=knobs, alpha=0.1 if regions else 100.0, regions=regions)
    run.rounds(client_rounds // int(knobs.get("kappa_2", 1)))
    return {"loss": float(np.mean([s["loss"] for s in run.scores("global").values()]))}


def groups(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 30, clients: int = 12,
           tau: int = 8, new: int = 12) -> Metrics:
    """A small Llama from scratch on groups, each with a bigram law of its own beside one of all: `loss` on rows held
    back by groups that did not train, and `tuned_loss` there after one epoch on the group's other rows."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "groups")
    common = rng.integers(0, 64, (64, 4))
    laws = rng.integers(0, 64, (clients + new, 64, 4))
    shards = {f"group-{k:02d}": _bigrams(rng, common, own, 64, 32) for k, own in enumerate(laws)}
    fed = Federation(shards, [], "generation")
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=0.3, steps=tau, batch_size=8), seed, exact_match=False)
    run = Trial(method, world, {"server_lr": 3e-3, **(knobs or {})})
    trained = world.infos()[:clients]
    for t in range(rounds):
        run.engine.begin(t)
        run.state = drive(run.method.round(run.state, trained), run.engine)
        run.engine.commit()
    others, out = world.infos()[clients:], {}
    for name, steps in (("loss", 0), ("tuned_loss", 8)):
        run.engine.begin(rounds)
        scores = drive(replace(run.method, tune_steps=steps).evaluate(run.state, others, "local"), run.engine)
        out[name] = float(np.mean([s["loss"] for s in scores.values()]))
    return out


def _bigrams(rng: np.random.Generator, common: np.ndarray, own: np.ndarray, train: int, test: int) -> Shard:
    """Rows of 16 tokens; each next one is by the group's law in half of the cases, else by the law of all."""
    rows = []
    for _ in range(train + test):
        ids = [int(rng.integers(64))]
        while len(ids) < 16:
            ids.append(int((own if rng.random() < 0.5 else common)[ids[-1], min(3, rng.geometric(0.6) - 1)]))
        labels = np.array(ids)
        labels[0] = -100
        rows.append(Encoded(np.array(ids, np.int32), labels, 15))
    return Shard(rows[:train], rows[train:])  # type: ignore[arg-type]


LOSSY: dict[str, Any] = {"loss": 1e-4, "packet": 4096, "bandwidth": 1.25e8}


def line(method: str, seed: int, *, megabytes: int = 16) -> Metrics:
    """`wrong` bytes of a message after loopback sockets whose line loses, doubles, swaps and changes a fifth of the
    chunks; `after_cut`: what is sent again after a cut at 60%; and the closed forms of a lossy wide-area line."""
    data = numpy_stream(seed, "line").bytes(megabytes << 20)
    ring = Ring(64 << 10, depth=8, max_retries=40, chunk_timeout=0.2)
    got, sent = carried(data, ring, Faults(0.05, 0.05, 0.05, 0.05, random.Random(seed)))
    half = Receiver()
    with contextlib.suppress(PayloadError):
        carried(data, ring, stop_at=0.6, receiver=half)
    whole, rest = carried(data, ring, receiver=half)
    wrong = sum(a != b for a, b in ((got, data), (whole, data)))
    size, chunk = 100e6, 4 << 20
    return {"wrong": float(wrong), "resent_share": sent.resent / sent.chunks, "after_cut": rest.bytes / len(data),
            "chunked_bytes": chunked_share(chunk, 1e-4, 4096), "whole_bytes": chunked_share(size, 1e-4, 4096),
            "time_ratio": seconds(size, chunk, **LOSSY) / seconds(size, size, **LOSSY),
            "tuned_1500": tuned(size, **{**LOSSY, "packet": 1500}) / 2**20}


def carried(data: bytes, ring: Ring, faults: Faults | None = None, *, stop_at: float | None = None,
            receiver: Receiver | None = None) -> tuple[bytearray, Sent]:
    """One transfer between two threads over a TCP connection of this machine."""
    receiver = receiver or Receiver()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(30)

        def take() -> bytearray:
            sock, _ = server.accept()
            with sock:
                return receiver.take(sock)

        job = pool.submit(take)
        with socket.create_connection(server.getsockname(), timeout=30) as sock:
            sent = send(sock, data, ring, faults=faults, stop_at=stop_at)
        return job.result(timeout=120), sent


RIGS: dict[str, Callable[..., Metrics]] = {
    "peers": peers, "trees": trees, "edges": edges, "groups": groups, "line": line}
