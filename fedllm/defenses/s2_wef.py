"""S2-WEF: simulate what a free rider could send, and vote on who resembles that more than the others do."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program
from fedllm.core.card import Card, Claim
from fedllm.core.errors import CompositionError
from fedllm.core.knobs import knob
from fedllm.core.payload import part
from fedllm.core.rng import torch_stream
from fedllm.defenses._robust import Robust, Rows, Verdict

RIDERS = {"attack": {"name": "att_free_rider", "kind": "delta", "start": 10, "clients": 0.25}, "clients": 12,
          "rounds": 20}
HEADS = ("classifier", "lm_head", "score", "embed_out")


@dataclass(frozen=True)
class S2WEF(Robust):
    """Nakamura, Dynamic Free-Rider Detection in FL via Simulated Attack Patterns, arXiv 2604.04611; WEF: Chen et al.,
    arXiv 2206.05406. Rebuilt from the abstracts: formulas and the gate are choices of ours.

    WEF: the weights of one tensor that moved more than the mean. The server computes it from what it gets, compares it
    with that of the global model's own past steps (with and without noise), and with the other clients'.
    """

    card = Card(
        title="S2-WEF: free riders by simulated patterns",
        paper="Nakamura, Dynamic Free-Rider Detection in FL via Simulated Attack Patterns, arXiv 2604.04611",
        topic="defenses",
        sends="nothing new; the server sees every reply",
        needs="honest majority; a method whose replies are the change of the weights told",
        claim=Claim("finds riders that turn in the tenth round and replay the global step, with F1 of 0.9 or more",
                    rig="arena", metric="f1", holds=">=", threshold=0.9, seeds=3, options=RIDERS),
        also={"false_positives": Claim("condemns honest clients in at most 5 % of their rounds", rig="arena",
                                       metric="false_positives", holds="<=", threshold=0.05, seeds=3, options=RIDERS)},
        evidence="Abstract of the paper; formulas and the gate are ours. Riders that add noise as large as the step "
                 "are not found (F1 0.06 on the same rig, seed 0): their likeness to the simulated ones stands out "
                 "over all matrices (0.57 to 0.61 against 0.52), their deviation does not, and one vote is not two. "
                 "Measuring the gate along the line between the centers finds them (F1 0.56 to 0.81) and condemns "
                 "honest clients in 6 to 21 % of their rounds, so it is not done.",
    )
    names_clients = True

    tensor: str | None = knob(None, "pattern of the tensor looked at; None: the last matrix that is no output head, or "
                                    "the head where nothing else is trained")
    window: int = knob(3, "past global steps that are simulated", ge=1, le=10)
    votes: int = knob(2, "votes of three that condemn", ge=1, le=3)
    gate: float = knob(3.0, "a vote is void when its two centers are closer than this many deviations", ge=0, le=6)
    grace: int = knob(2, "first rounds without a verdict", ge=1)
    seed: int = knob(0, "seed of the simulated noise", ge=0)

    def decide(self, ask: Ask, rows: Rows, state: MutableMapping[str, Any]) -> Program:
        theta = rows.like(part(next(iter(ask.msgs.values())), "theta"), self)[self.columns(rows)]
        state["globals"] = [*state.get("globals", []), theta][-self.window - 1 :]
        yield from ()
        return self.rule(rows, state)

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        t = state["round"] = state.get("round", -1) + 1
        kept, steps = torch.ones(len(rows.x), dtype=torch.bool), state["globals"]
        if t >= self.grace and len(steps) > 1:
            own = wef(rows.x[:, self.columns(rows)])
            moved = torch.stack([b - a for a, b in itertools.pairwise(steps)])
            rng = torch_stream(self.seed, "s2_wef", t)
            noise = torch.randn(moved.shape, generator=rng, dtype=moved.dtype) * moved.pow(2).mean(1, True).sqrt()
            kept = ~condemned(own, torch.cat([wef(moved), wef(moved + noise)]), self.votes, self.gate)
        return Verdict(rows.x[kept].mean(0), kept.double() / kept.sum())

    def columns(self, rows: Rows) -> Tensor:
        """Where in a row the tensor lies."""
        found: dict[str, tuple[int, int]] = {}
        at = 0
        for key, shape in rows.form:
            size = int(torch.Size(shape).numel())
            if fnmatch.fnmatch(key, self.tensor) if self.tensor else len(shape) > 1:
                found[key] = (at, at + size)
            at += size
        if not found:
            raise CompositionError(f"layer 's2_wef': no tensor of the replies matches {self.tensor or 'a matrix'}; "
                                   f"they hold {', '.join(k for k, _ in rows.form[:6])}")
        inner = [k for k in found if not any(h in k for h in HEADS)] or list(found)
        return torch.arange(*found[inner[-1]])


def wef(u: Tensor) -> Tensor:
    """[K, d] -> 0/1 [K, d]: which entries moved by more than the row's mean."""
    return (u.abs() > u.abs().mean(1, keepdim=True)).double()


def condemned(own: Tensor, simulated: Tensor, votes: int, gate: float) -> Tensor:
    """bool [K] from the clients' [K, d] and the simulated [S, d] matrices."""
    s, d = (v.numpy() for v in scores(own, simulated))
    both = np.stack([_standard(s), _standard(d)], 1)
    cast = [two_means(both, gate), two_means(s[:, None], gate), two_means(d[:, None], gate)]
    return torch.from_numpy(np.sum(cast, 0) >= votes)


def scores(own: Tensor, simulated: Tensor) -> tuple[Tensor, Tensor]:
    """Likeness to a simulated rider s [K], and deviation from the other clients d [K]."""
    unit = torch.nn.functional.normalize(own, dim=1)
    s = (unit @ torch.nn.functional.normalize(simulated, dim=1).T).max(1).values
    k = len(own)
    gap = torch.cdist(own, own).sum(1) / (k - 1)
    unlike = 1 - ((unit @ unit.T).sum(1) - (unit * unit).sum(1)) / (k - 1)
    share = own.mean(1)
    return s, _spread(gap) + _spread(unlike) + _spread((share - share.median()).abs())


def _spread(v: Tensor) -> Tensor:
    low, high = v.min(), v.max()
    return (v - low) / (high - low) if high > low else torch.zeros_like(v)


def _standard(v: np.ndarray) -> np.ndarray:
    return (v - v.mean()) / v.std() if v.std() > 0 else v * 0


def two_means(points: np.ndarray, gate: float) -> np.ndarray:
    """bool [K]: the cluster with the larger center (by the sum of coordinates); nobody where it is the majority, or
    where the centers are closer than `gate` deviations within clusters."""
    high = best_split(points)
    if not 0 < high.sum() <= len(points) / 2:
        return np.zeros(len(points), bool)
    centers = [points[high].mean(0), points[~high].mean(0)]
    within = sum(float(((points[m] - c) ** 2).sum()) for m, c in zip((high, ~high), centers, strict=True))
    deviation = (within / max(1, len(points) - 2)) ** 0.5
    apart = float(np.linalg.norm(centers[0] - centers[1]))
    return high if apart >= gate * deviation and apart > 1e-9 else np.zeros(len(points), bool)


def best_split(points: np.ndarray) -> np.ndarray:
    """The exact 2-means split along one axis; in two dimensions, the best along each and along their sum."""
    axes: Sequence[np.ndarray] = [*points.T, points.sum(1)] if points.shape[1] > 1 else [points[:, 0]]
    best, least = np.zeros(len(points), bool), np.inf
    for axis in axes:
        order = np.argsort(axis)
        for cut in range(1, len(points)):
            high = np.zeros(len(points), bool)
            high[order[cut:]] = True
            cost = sum(float(((points[m] - points[m].mean(0)) ** 2).sum()) for m in (high, ~high))
            if cost < least - 1e-12:
                best, least = high, cost
    if best.any() and points[best].mean(0).sum() < points[~best].mean(0).sum():
        best = ~best
    return best
