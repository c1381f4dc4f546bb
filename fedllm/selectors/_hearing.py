"""Selectors that hear of clients' losses: what a client tells beside its reply, and how the server keeps it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedllm.core.ask import Ask, Program
from fedllm.core.form import KINDS
from fedllm.core.knobs import knob
from fedllm.core.layer import Algebra
from fedllm.core.payload import Payload
from fedllm.core.select import Selector
from fedllm.local.requests import Fit


@dataclass(frozen=True)
class Hearing(Selector):
    """Each reply also tells the mean and the root mean square of the losses with which the client began its round.

    The server keeps, for each client (an *arm*): `mean`, `rms`, `rows` (|B_k|, trained on), `seconds` (the answer
    took), `last` (round) and `times` (answers). 24 bytes and their names on the wire.
    """

    hears: ClassVar[bool] = True
    algebra: ClassVar[Algebra] = Algebra(reads=True, instead="select: uniform or by_size")

    sample: int = knob(32, "training rows whose loss is told, at most", ge=1)
    noise: float = knob(0.0, "standard deviation of the noise on what is told, as a share of it", ge=0)

    def init(self) -> dict[str, Any]:
        return {"arms": {}, "round": 0}

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        weight = msg.get("note/weight")
        fits: list[Fit] = []

        def watch(request: Any) -> Any:
            if isinstance(request, Fit) and not fits:
                fits.append(request)
            return request

        with client.through(watch):
            reply = call({k: v for k, v in msg.items() if k != "note/weight"})
        if weight is not None and "n" in reply:
            reply = {**reply, "n": float(reply["n"]) * weight}  # inverse probability of being asked
        told = self.told(fits, reply, client)
        return {**reply, **{f"note/{k}": v for k, v in told.items()}} if told else reply

    def told(self, fits: list[Fit], reply: Payload, client: Any) -> dict[str, float]:
        """Losses of the rows that it trained on, under the model that it was sent; without training, the reply's."""
        if not fits:
            loss = reply.get("loss")
            return {"mean": loss, "rms": loss, "rows": float(client.n)} if isinstance(loss, float) else {}
        fit, rng = fits[0], client.rng("select")
        rows = np.unique(np.concatenate(fit.plan))
        some = np.sort(rng.choice(rows, min(self.sample, len(rows)), replace=False)) if len(rows) else rows
        losses = client.losses(fit.theta, some, base=fit.base) if len(some) else np.zeros(1)
        wobble = 1 + self.noise * rng.standard_normal() if self.noise else 1.0
        return {"mean": float(losses.mean()) * wobble, "rms": float(np.sqrt((losses**2).mean())) * wobble,
                "rows": float(len(rows))}

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        if weights := state.get("weights"):
            ask = replace(ask, msgs={c: {**m, "note/weight": float(weights[c])} if c in weights else m
                                     for c, m in ask.msgs.items()})
        out = yield ask
        for client, told in out.notes.items():
            arm = state["arms"].get(client, {"times": 0})
            heard = {k: v for k, v in told.items() if k in ("mean", "rms", "rows")}
            if len(heard) < 3 or not all(KINDS["count"][1](v) for v in heard.values()):
                continue  # what a stranger says of itself is no reason to end a round
            arm |= {k: float(v) for k, v in heard.items()}
            arm |= {"seconds": float(out.seconds.get(client, 1.0)), "last": state["round"], "times": arm["times"] + 1}
            state["arms"][client] = arm
        return out
