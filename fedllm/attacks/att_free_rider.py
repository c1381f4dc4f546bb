"""Free riders: clients that want the model and do not train, and make up what they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.attacks._malicious import Malicious, change_of, start_of, with_change
from fedllm.core.ask import Ask
from fedllm.core.knobs import knob
from fedllm.core.payload import Payload, Tree
from fedllm.local.requests import Fit

MEMORY = "att_free_rider"


@dataclass(frozen=True)
class AttFreeRider(Malicious):
    """Lin, Du, Liu, Free-riders in FL, arXiv 1911.12560; Fraboni, Vidal, Lorenzi, AISTATS 2021, arXiv 2006.11901.

    The method's client function runs with training of no steps, so the reply has its form and cost the rider nothing.
    With `start` it is a dynamic rider: honest up to there. A rider knows the weights that it was told.
    """

    kind: Literal["plain", "disguised", "delta", "delta_noise"] = knob(
        "plain", "plain: no change; disguised: noise that fades; delta: the global model's own last step; delta_noise: "
                 "that with noise", options=("plain", "disguised", "delta", "delta_noise"))
    sigma: float | None = knob(None, "noise of disguised in its first round; None: the rms of the global model's last "
                                     "step", gt=0)
    noise: float = knob(1.0, "noise of delta_noise, over the rms of the global model's last step: with little it "
                             "is a replay", gt=0, le=100)
    decay: float = knob(1.0, "gamma: that noise falls with round ** -gamma", ge=0)

    def active(self, t: int) -> bool:
        """They are marked in every round, since they take note of the weights told; `acts` says when they ride."""
        return True

    def tells(self, ask: Ask, mine: Sequence[str], t: int) -> dict[str, Any]:
        first = self.start or 0
        return {self.mark: t - first + 1, self.mark + "/acts": int(super().active(t))}

    def forge(self, msg: Payload, client: Any, call: Callable[[Payload], Payload], marked: Payload) -> Payload:
        before = client.memory.get(MEMORY, {})
        client.memory[MEMORY] = {k: v for k, v in msg.items() if isinstance(v, Tensor)}
        if not marked[self.mark + "/acts"]:
            return call(msg)
        with client.through(idle):
            reply = call(msg)
        u = change_of(msg, reply)
        last = {k: moved(k, reply, msg, before) for k in u}
        return with_change(msg, reply, self.made_up(last, max(1, marked[self.mark]), client.rng(MEMORY)))

    def made_up(self, last: Tree, age: int, rng: Any) -> Tree:
        """What is sent, from the global model's last step; `age` counts the rounds of riding from 1."""
        if self.kind == "plain":
            return {k: torch.zeros_like(t) for k, t in last.items()}
        if self.kind == "delta":
            return last
        count = max(1, sum(t.numel() for t in last.values()))
        rms = (sum(float(t.double().pow(2).sum()) for t in last.values()) / count) ** 0.5
        if self.kind == "disguised":  # 0 + N(0, (sigma t^-gamma)^2)
            sigma = (self.sigma or rms) * age**-self.decay
            last = {k: torch.zeros_like(t) for k, t in last.items()}
        else:
            sigma = self.noise * rms
        return {k: t + torch.from_numpy(rng.normal(0, sigma, t.shape)).to(t.dtype) for k, t in last.items()}


def idle(request: Any) -> Any:
    """The same training with no step in it."""
    return replace(request, plan=[]) if isinstance(request, Fit) else request


def moved(key: str, reply: Payload, msg: Payload, before: Payload) -> Tensor:
    """w^t - w^(t-1) of the weights that this entry is about; zero where they, or the time before, are not known."""
    now, then = start_of(key, reply, msg), start_of(key, reply, before)
    return torch.zeros_like(reply[key]) if now is None or then is None else now - then.to(now.dtype)
