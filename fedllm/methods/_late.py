"""Answers to older questions: how much they count, how old they were, and under which layers they may come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Replies
from fedllm.core.client import ClientInfo
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.layer import name_of
from fedllm.core.method import State
from fedllm.core.payload import Payload
from fedllm.core.reduce import Sum, wide
from fedllm.core.rng import numpy_stream

REAL = ("In virtual time the seed says who answers first; in a real federation the sites do, so that two runs of "
        "it are alike only with one client at work at a time.")


@dataclass(frozen=True)
class Late(Sum):
    """sum_k w(s_k) n_k x_k / sum_k n_k of every tensor x, where s_k is how many versions ago k was asked, and
    w(s) = (1 + s)^-a. Replies carry `version` and `n`; `weight` is the sum of w(s_k) n_k / sum n_k, `ages` lists s_k.
    """

    now: int
    a: float
    most: int | None

    def lift(self, reply: Payload) -> Payload:
        s = self.now - int(reply["version"])
        if s < 0 or (self.most is not None and s > self.most):
            raise PayloadError(f"it is {s} versions old, allowed are 0 to {self.most}")
        n, w = float(reply["n"]), (1.0 + s) ** -self.a
        out = {k: wide(v) * (w * n) for k, v in reply.items() if k not in ("n", "version", "loss")}
        return {**out, "n": n, "weight": w * n, "ages": [s], "loss": float(reply["loss"]) * n}

    def done(self, total: Payload) -> Payload:
        n = total["n"]
        return {k: v if k in ("n", "ages") else v / n for k, v in total.items()}


def starters(clients: Sequence[ClientInfo], seed: int, version: int) -> list[ClientInfo]:
    """The clients in the order in which they may begin, drawn anew for each version."""
    order = numpy_stream(seed, version, "who begins").permutation(len(clients))
    return [clients[i] for i in order]


def crowded(concurrency: int, clients: int, buffer_size: int = 1) -> list[str]:
    """What to say of so many answers to a step and clients at work, where a round may ask so many clients."""
    out = []
    if buffer_size > concurrency:
        out.append(f"method.buffer_size = {buffer_size} is more than method.concurrency = {concurrency}: no step ends "
                   "before clients have begun again from the same model; the paper has it below")
    if buffer_size > clients:
        out.append(f"method.buffer_size = {buffer_size} is more than the {clients} clients of a round: some give "
                   f"several answers to one step; with {clients} or less none need")
    if concurrency > clients:
        out.append(f"method.concurrency = {concurrency} is more than the {clients} clients of a round: no more than "
                   f"{clients} are at work at a time")
    return out


def booked(state: State, out: Replies) -> dict[str, Any]:
    """How old answers were, and who gave how many; what `report` shows."""
    assert out.value is not None
    ages = Counter(state["ages"]) + Counter(f"{s:04d}" for s in out.value["ages"])
    return {"ages": dict(sorted(ages.items())), "given": dict(sorted((Counter(state["given"]) + Counter(out.answered))
                                                                     .items()))}


def staleness(state: State) -> dict[str, Any]:
    """Staleness of all answers that counted (`histogram`, `mean`) and answers by client: quick ones give more."""
    ages = {int(s): n for s, n in state["ages"].items()}
    count = max(1, sum(ages.values()))
    return {"staleness": {"histogram": {str(s): n for s, n in ages.items()},
                          "mean": sum(s * n for s, n in ages.items()) / count}, "answers": dict(state["given"])}


def refuse_rounds(method: Any, layers: Sequence[Any]) -> None:
    """CompositionError for a layer that needs question and answer in one round."""
    for layer in layers:
        whole = layer.algebra.kind in ("dp", "secagg", "he", "robust")
        if whole or (layer.algebra.kind == "codec" and layer.init()):
            use = "fedavg" if whole else "codec_quant, which keeps nothing between them"
            raise CompositionError(f"layer '{name_of(layer)}' needs a question and its answers in one round, and "
                                   f"'{name_of(method)}' takes answers to earlier ones, so they do not fit "
                                   f"together; use {use}")


def begin(theta: Mapping[str, Any]) -> dict[str, Any]:
    """The server's state before the first answer."""
    return {"theta": dict(theta), "version": 0, "ages": {}, "given": {}}
