"""Rigs for black boxes with something before and behind them: clients with label skew, and the gradient of a code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from evidence.rigs.blackbox import scattered, trained
from evidence.rigs.topics import CLASSES
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses, run_outputs
from fedllm.local.requests import Losses, Outputs
from fedllm.local.spec import LocalSpec
from fedllm.methods._surgery import directions, embedded, exact, row_losses, slopes, surgery
from fedllm.models.model import Model
from fedllm.spaces import make_space


def surgery_world(seed: int, clients: int = 8, rows: int = 48, alpha: float = 0.1) -> World:
    """The black-box rig's topics with each client's own label mix, also in its 100 test rows."""
    net, words = trained(seed)
    head = {n: t.clone() for n, t in net.classifier.state_dict().items()}
    rng = numpy_stream(seed, "surgery")
    mix = rng.dirichlet([alpha] * len(CLASSES), clients)
    made = {f"client-{k}": [scattered(rng, words, rng.choice(len(CLASSES), n, p=mix[k])) for n in (rows, 100)]
            for k in range(clients)}
    model = Model(net, None, "classification", make_space("soft_prompt", length=1), labels=CLASSES, seed=seed)
    net.classifier.load_state_dict(head)  # a model starts its head afresh
    shards = {c: Shard(train, test) for c, (train, test) in made.items()}  # type: ignore[arg-type]
    return World(model, Federation(shards, [], "classification", CLASSES), LocalSpec(), seed)


def local_accuracy(run: Trial) -> float:
    """Mean over clients, each on its own rows."""
    return float(np.mean([s["accuracy"] for s in run.scores("local").values()]))


def off(run: Trial) -> float:
    """Mean squared error of the decoded token embeddings of the first client's test rows."""
    theta, words = exact(run.state["theta"]), run.world.model.words
    x = torch.cat(embedded(run.world.encoded("client-0", "test"), words))
    zero = torch.zeros(run.method.dim).double()
    return float((x - surgery([x], theta, zero[: run.method.embed_dim], zero)[0]).pow(2).sum(1).mean())


def around(method: str, seed: int, *, rounds: int = 12, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """ZooPFL on eight clients of 48 rows, own test rows: `accuracy`, `over_shared` (e and H averaged too, as many
    queries), `over_none` (the model as it is), and `left`, the share of the decoding error after the first rounds."""
    torch.set_num_threads(1)
    world = surgery_world(seed)
    run, shared = (Trial(method, world, {**(knobs or {}), "personal": own}) for own in (True, False))
    before = off(run)
    left = off(run.rounds(run.method.pretrain_rounds)) / before
    mine, theirs = (local_accuracy(r.rounds(run.method.pretrain_rounds + rounds - r.t)) for r in (run, shared))
    assert run.state["queries"] == shared.state["queries"]
    asked = [Losses(c, world.model, {}, None, world.encoded(c, "test")) for c in world.federation.clients]
    none = float(np.mean([g.correct.sum() / g.count.sum() for g in run_losses(asked, world.limits)]))
    return {"accuracy": mine, "shared": theirs, "none": none, "over_shared": mine - theirs, "over_none": mine - none,
            "left": left, "calls": float(run.state["queries"]["calls"])}


def code_gradient(method: str, seed: int, *, rows: int = 16) -> Metrics:
    """Cosine of differences and the true gradient of each row's code, the mean over rows: `coordinates`,
    `random` (as many Gaussian directions), and `nearer`, by how much the former is higher."""
    torch.set_num_threads(1)
    world = surgery_world(seed)
    run = Trial(method, world, {}).rounds(1)
    theta, model, own = exact(run.state["theta"]), world.model, run.method.own(run.state["theta"], _Fresh(world.model))
    batch = world.encoded("client-0", "train")[:rows]
    x, y = embedded(batch, model.words), torch.tensor([r.labels for r in batch])
    u = torch.zeros(rows, run.method.dim, dtype=torch.float64, requires_grad=True)
    text = torch.stack([surgery([r], theta, own["e"], move)[0] for r, move in zip(x, u, strict=True)])
    with model.using([{}]):
        z = model.outputs(text.to(model.device), torch.ones(text.shape[:2], dtype=torch.bool, device=model.device))
        loss = F.cross_entropy(z.cpu(), y, reduction="sum")
    (true,) = torch.autograd.grad(loss, u)
    found: dict[str, float] = {}
    for how in ("cge", "rge"):
        v = directions(how, run.method.dim, numpy_stream(seed, "directions"))  # type: ignore[arg-type]
        moved = [t for m in torch.cat([run.method.h * v, -run.method.h * v]) for t in surgery(x, theta, own["e"], m)]
        [said] = run_outputs([Outputs("test", model, {}, None, moved)], world.limits)
        losses = torch.stack([row_losses(z, y, own) for z in said.view(2 * len(v), rows, -1)])
        g = slopes(how, losses, v, run.method.h)  # type: ignore[arg-type]
        found[how] = float(F.cosine_similarity(g, true, dim=1).mean())
    return {"coordinates": found["cge"], "random": found["rge"], "nearer": found["cge"] - found["rge"]}


class _Fresh:
    """A client that has learned nothing yet."""

    def __init__(self, model: Model) -> None:
        self.model, self.memory = model, {}  # type: ignore[var-annotated]


RIGS: dict[str, Callable[..., Metrics]] = {"surgery": around, "code_gradient": code_gradient}
