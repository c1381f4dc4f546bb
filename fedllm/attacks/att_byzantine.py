"""Untargeted model poisoning: zero, random and sign-flipped updates, ALIE, and the inner-product attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import Any, Literal

import torch

from fedllm.attacks._malicious import Malicious, change_of, start_of, with_change
from fedllm.core.ask import Ask, Program
from fedllm.core.card import Card, Claim
from fedllm.core.knobs import knob
from fedllm.core.payload import Payload, Tree, norm, scale
from fedllm.core.program import Fold
from fedllm.core.rng import torch_stream
from fedllm.defenses._robust import Every

COLLUDE = ("alie", "ipm")


@dataclass(frozen=True)
class AttByzantine(Malicious):
    """Sign flip, random and zero (FedSecurity, Han et al., arXiv 2306.04959), ALIE (Baruch et al., NeurIPS 2019), IPM
    (Xie et al., UAI 2019).

    ALIE and IPM need what others send. Colluders' honest replies meet in the server half, which stands for their own
    channel, and are replaced there before any defense that is listed above sees them; so list the attack below a
    defense, and above codecs. All send one update, which FoolsGold sees at once; `apart` is the "intelligent
    perturbation" of its own paper (Fung et al., RAID 2020). The noise stays the same over the rounds, since FoolsGold
    compares sums of updates.
    """

    card = Card(
        title="Byzantine clients: sign flip, random, zero, ALIE, inner product",
        paper="Han et al., FedSecurity, KDD 2024, arXiv 2306.04959; Baruch et al., NeurIPS 2019; Xie et al., UAI 2019",
        topic="attacks",
        sends="nothing new: forged updates in the honest form",
        needs="any method whose clients send changes or weights; ALIE and IPM a simulation or a drill",
        claim=Claim("sign flip, ten times as long, by 30 % of the clients costs the mean at least 20 points",
                    rig="arena", metric="lost", holds=">=", threshold=0.2, seeds=3,
                    options={"knobs": {"clients": 0.3, "scale": 10.0}}),
    )

    kind: Literal["zero", "erase", "random", "sign_flip", "alie", "ipm"] = knob(
        "sign_flip", "zero: no change; erase: weights of 0; random: noise; sign_flip: -scale u; alie: mean - z std; "
        "ipm: -scale mean", options=("zero", "erase", "random", "sign_flip", "alie", "ipm"))
    scale: float = knob(1.0, "gamma of sign_flip, epsilon of ipm, noise over the honest rms of random", gt=0)
    z: float | None = knob(None, "ALIE's z_max; None: the paper's formula", gt=0, le=4)
    honest_norm: bool = knob(False, "ALIE and IPM: as long as the median update that they know, so that no bound on "
                                    "lengths sees them")
    knowledge: Literal["colluders", "all"] = knob("all", "whose honest updates ALIE and IPM know",
                                                  options=("colluders", "all"))

    apart: float = knob(0.0, "ALIE and IPM: colluders add noise of so many rms of their update, each two of them the "
                             "same with opposite signs, so that their sum is as it was and none is like another", ge=0)

    def forge(self, msg: Payload, client: Any, call: Callable[[Payload], Payload], marked: Payload) -> Payload:
        reply = call(msg)
        if self.kind in COLLUDE:
            return reply
        return with_change(msg, reply, self.changed(change_of(msg, reply), msg, reply, client))

    def changed(self, u: Tree, msg: Payload, reply: Payload, client: Any) -> Tree:
        """What is sent in the place of the honest change u."""
        if self.kind == "sign_flip":
            return scale(u, -self.scale)
        if self.kind == "random":
            rms = norm(u) / math.sqrt(max(1, sum(t.numel() for t in u.values())))
            rng = client.rng("att_byzantine")
            return {k: torch.from_numpy(rng.normal(0, self.scale * rms, t.shape)).to(t.dtype) for k, t in u.items()}
        if self.kind == "erase":
            begun = {k: start_of(k, reply, msg) for k in u}
            return {k: torch.zeros_like(t) if begun[k] is None else -begun[k].to(t.dtype)  # type: ignore[union-attr]
                    for k, t in u.items()}
        return scale(u, 0.0)

    def attacked(self, ask: Ask, mine: Sequence[str]) -> Program:
        if self.kind not in COLLUDE:
            return (yield ask)
        out = yield replace(ask, reduce=Every())
        replies = dict(zip(out.answered, out.value["replies"] if out.value else [], strict=True))
        known = [c for c in replies if self.knowledge == "all" or c in mine]
        # an attacker knows what honest ones send only where it is not one of those whom it replaces
        seen = [change_of(ask.msgs[c], replies[c]) for c in known if self.knowledge == "colluders" or c not in mine]
        fold = Fold(ask)
        for c, why in out.missing.items():
            fold.miss(c, why)
        for c, reply in replies.items():
            if c in mine and seen:
                made = self.perturbed(self.together(seen, len(ask.msgs), len(mine)), self.ids().index(c))
                reply = with_change(ask.msgs[c], reply, made)
            fold.take(c, reply)
        return fold.done()

    def together(self, seen: Sequence[Tree], n: int, f: int) -> Tree:
        """The one update that all colluders send, from those that they know."""
        stacked = {k: torch.stack([u[k] for u in seen]) for k in seen[0]}
        if self.kind == "ipm":
            made = {k: -self.scale * x.mean(0) for k, x in stacked.items()}
        else:
            z = self.z or z_max(n, f)
            made = {k: x.mean(0) - z * x.std(0, correction=0) for k, x in stacked.items()}
        if not self.honest_norm:
            return made
        return scale(made, median(norm(u) for u in seen) / max(norm(made), 1e-30))

    def perturbed(self, made: Tree, i: int) -> Tree:
        """What colluder i sends of their one update: it plus or minus the noise of its pair; an odd one has none."""
        if not self.apart or (i == len(self.ids()) - 1 and i % 2 == 0):
            return made
        rng = torch_stream(self.pick, "apart", i // 2)
        size = (1 - 2 * (i % 2)) * self.apart * norm(made) / math.sqrt(max(1, sum(t.numel() for t in made.values())))
        return {k: t + size * torch.randn(t.shape, generator=rng).to(t.dtype) for k, t in made.items()}


def z_max(n: int, f: int) -> float:
    """Phi^-1((n - f - s) / (n - f)) with s = floor(n / 2) + 1 - f supporters; 1.5 where that is not above 0."""
    s = n // 2 + 1 - f
    share = (n - f - s) / max(1, n - f)
    z = NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0
    return z if z > 0 else 1.5
