"""CRFL: clip the global model and add noise in every round, then let noisy copies vote (Xie et al., ICML 2021)."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program
from fedllm.core.knobs import knob
from fedllm.core.layer import Facts
from fedllm.core.payload import Tree, norm, part
from fedllm.core.rng import torch_stream
from fedllm.data.encode import Encoded
from fedllm.defenses._robust import Robust, Rows, Verdict
from fedllm.defenses.median import median
from fedllm.local.forward import sweep
from fedllm.local.requests import Limits, Losses
from fedllm.models.model import Model


@dataclass(frozen=True)
class CRFL(Robust):
    """Xie, Chen, Chen, Li, CRFL: Certifiably Robust Federated Learning against Backdoor Attacks, arXiv 2106.08283.

    Acts on what is trained (the adapter, the head), never on a whole pre-trained network. The last round's model is
    clipped and gets no noise: the votes of `smoothed` bring it. Without a fixed `rho` the bound is 1.5 times the
    median norm of the models that this round's clients would each have, which is a choice of ours.
    """

    rho: float | None = knob(None, "largest norm of the model; None: 1.5 times the round's median", gt=0)
    sigma: float = knob(0.01, "standard deviation of the noise on the model", ge=0)
    rounds: int = knob(0, "rounds of the run; found out by the run", ge=0)
    seed: int = knob(0, "seed of the noise", ge=0)

    def bind(self, facts: Facts) -> Robust:
        return replace(self.enough(facts), rounds=facts.rounds)  # type: ignore[type-var]

    def short(self, n: int) -> tuple[str, str] | None:
        return self.below(n, self.fewest, "rho = null", "a rho") if self.rho is None else None

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        theta, t = state["told"], state.get("round", 0)
        state["round"] = t + 1
        w = theta + rows.x.mean(0)
        bound = self.rho or 1.5 * float(median((theta + rows.x).norm(dim=1).double()))
        w = w * min(1.0, bound / max(float(w.norm()), 1e-12))
        if t + 1 < self.rounds and self.sigma:
            rng = torch_stream(self.seed, "crfl", t)
            w = w + self.sigma * torch.randn(w.shape, generator=rng, dtype=w.dtype)
        return Verdict(w - theta)

    def decide(self, ask: Ask, rows: Rows, state: MutableMapping[str, Any]) -> Program:
        state["told"] = rows.like(part(next(iter(ask.msgs.values())), "theta"), self)
        yield from ()
        return self.rule(rows, state)


def smoothed(model: Model, theta: Tree, rows: Sequence[Encoded], *, sigma: float, samples: int = 50, seed: int = 0,
             rho: float | None = None) -> Tensor:
    """Votes [rows, classes] of `samples` noisy copies of the model, which is clipped to `rho` before noise is added."""
    votes = torch.zeros(len(rows), len(model.labels), dtype=torch.long)
    rng = torch_stream(seed, "smoothed")
    clipped = theta if rho is None else {n: t * min(1.0, rho / max(norm(theta), 1e-12)) for n, t in theta.items()}
    for _ in range(samples):
        noisy = {n: t + sigma * torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in clipped.items()}
        z = sweep([Losses("server", model, noisy, None, rows)], Limits(), lambda m, batch: m.class_logits(batch))[0]
        votes[torch.arange(len(rows)), torch.from_numpy(z).argmax(1)] += 1
    return votes


def certified(votes: Tensor, alpha: float = 0.001) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's class (-1: abstains), and Hoeffding bounds on the two likeliest classes' probabilities, at 1 - alpha.

    p_A - eps and p_B + eps with eps = sqrt(ln(2 / alpha) / (2 M)); it abstains where they meet. The paper's radius
    follows from these and from constants of training that no server can check, so it is not computed.
    """
    m = int(votes[0].sum())
    eps = math.sqrt(math.log(2 / alpha) / (2 * m))
    top = (votes.double() / m).topk(2, dim=1)
    low, high = (top.values[:, 0] - eps).clamp(min=0), (top.values[:, 1] + eps).clamp(max=1)
    return torch.where(low > high, top.indices[:, 0], -torch.ones_like(top.indices[:, 0])), low, high
