"""Sparse secure aggregation: clients agree on the entries that matter this round, and mask all of those."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.card import Card, Claim
from fedllm.core.errors import PayloadError
from fedllm.core.form import Form
from fedllm.core.knobs import knob
from fedllm.core.layer import Algebra, Facts
from fedllm.core.payload import Payload, alike
from fedllm.core.reduce import Lifted, Mean, wide
from fedllm.core.sums import is_control, must_lift, without
from fedllm.privacy._secagg_server import OWN, Server
from fedllm.privacy.secagg import SecAgg
from fedllm.spaces.layers import block_of

TH = "_thgs/"
SUPPORT = Form.of("names: layout, bits: whole")
"""Of which entries a client would send."""


class Union:
    """Which entries anybody wants to send, folded as a bitmap; all clients must mean the same tensors."""

    ragged = staticmethod(lambda reply: frozenset({("names", repr(reply["names"]))}))

    def zero(self) -> dict[str, Any]:
        return {}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        shapes = [[str(name), *(int(n) for n in shape)] for name, *shape in reply["names"]]
        if any(n < 0 for _, *shape in shapes for n in shape):
            raise PayloadError("a sparse reply names a tensor of negative size")
        bits = reply["bits"].numpy()
        if acc and (acc["names"] != shapes or len(acc["bits"]) != len(bits)):
            raise PayloadError("the tensors of a sparse reply are not those of the replies before it")
        if bits.dtype != np.uint8 or len(bits) != -(-_size(shapes) // 8):
            raise PayloadError(f"a support of {len(bits)} bytes does not go with {_size(shapes)} entries")
        return {"names": shapes, "bits": bits | acc["bits"] if acc else bits.copy()}

    def done(self, acc: dict[str, Any]) -> Payload:
        return {"names": acc["names"], "bits": torch.from_numpy(acc["bits"])}


@dataclass(frozen=True)
class THGSSecAgg(SecAgg):
    """Top-k with error feedback under secure aggregation, in two questions (after Liu et al. 2023).

    First every client says which entries of its update and residue are its largest: per tensor, fewer in deeper blocks
    and in later rounds. Then all send their values at the union of those places, masked as in `secagg`, and keep the
    rest for later. The server learns the sum there, and each client's places, which tell which entries moved (of a
    trained embedding: which tokens). In the paper pairs mask a random share m of the entries, so that a share of
    (1 - m) ** (n - 1) of what a client sends is in the clear; here nothing is.
    """

    card = Card(
        title="THGS: time-varying hierarchical sparsification under secure aggregation",
        paper="Liu et al., Efficient and Secure Federated Learning for Financial Applications, Applied Sciences "
              "13(10), 2023, arXiv 2303.08355",
        topic="privacy",
        sends="up: one bit an entry for the places, then four bytes for each entry of the union; keys and shares",
        needs="a method that is a Sum; three clients; memory for a residue",
        claim=Claim("fedavg with 1 % of the entries uploads at most 25 % of what it does under secagg, at a loss that "
                    "is at most 5 % above",
                    rig="sparse_sums", metric="worst", holds="<=", threshold=1.0, seeds=5, wins=4),
        evidence="No code is public and the schedules are reconstructed by the dossier: density * (floor + (1 - floor) "
                 "(1 - t/T)) * depth_decay ** block. The places are agreed openly instead of the paper's sparse masks.",
    )

    asks = 2
    names = (TH + "values",)
    session = (TH + "density", OWN + "sid")

    density: float = knob(0.1, "share of entries that each client asks for, in block 0 of the first round", gt=0, le=1)
    density_min: float = knob(0.01, "share that no block and no round falls below", gt=0, le=1)
    depth_decay: float = knob(1.0, "factor on the share from block to block", gt=0, le=1)
    time_floor: float = knob(1.0, "share of the density that is left in the last round", ge=0, le=1)
    error_feedback: bool = knob(True, "keep what was not sent; False: it is lost")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_rounds", 0)

    @property
    def algebra(self) -> Algebra:  # type: ignore[override]
        return Algebra("secagg", needs="sum", reveals="sum", contracts=not self.error_feedback, compresses=True,
                       instead="secagg, which sends every entry")

    def init(self) -> dict[str, Any]:
        return {"taken": {}, "asked": {}}

    def bind(self, facts: Facts) -> THGSSecAgg:
        super().bind(facts)
        object.__setattr__(self, "_rounds", facts.rounds)
        return self

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift, phase = must_lift(ask, self), ask.phase
        common = alike(ask.msgs) if isinstance(ask.reducer, Mean) else {}
        taken, t = state["taken"].setdefault(phase, []), state["asked"].get(phase, 0)
        state["asked"][phase] = t + 1
        told = {TH + "lift": lift, TH + "change": sorted(common), TH + "density": self.at(t)}
        msgs = {c: {**m, **told, TH + "taken": c in taken} for c, m in ask.msgs.items()}
        first = yield replace(ask, msgs=msgs, reduce=Union(), form=SUPPORT,
                              quorum=self.needed(len(ask.msgs)))
        names, bits = first.value["names"], first.value["bits"]
        then = replace(ask, msgs={c: {TH + "bits": bits} for c in first.answered}, reduce=Lifted())
        out = yield from Server(self, then, state, False, self.fraction(len(first.answered))).run()
        state["taken"][phase] = sorted({*taken, *out.answered} - {c for c in ask.msgs if c not in out.answered})
        total = dict(out.value)
        flat = torch.zeros(_size(names), dtype=total[TH + "values"].dtype)
        flat[_places(bits, len(flat))] = total.pop(TH + "values")
        total |= _split(flat, names)
        value = {k: v + common[k].to(v.dtype) if k in common else v for k, v in ask.reducer.done(total).items()}
        return replace(out, value=value, missing={**first.missing, **out.missing})

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if TH + "density" not in msg:
            return super().client(fn, msg, client, call)
        plain = without(msg, TH)
        reply = dict(call(plain))
        for k in msg[TH + "change"]:
            if k in reply:
                reply[k] = wide(reply[k]) - wide(plain[k])
        lifted = fn.__dict__["reduce"].lift(reply) if msg[TH + "lift"] else reply
        d = {k: wide(v) for k, v in lifted.items() if isinstance(v, Tensor) and v.is_floating_point()}
        u = torch.cat([x.reshape(-1) for x in d.values()]) if d else torch.zeros(0)
        key = TH + f"{type(fn.__self__).__name__}.{fn.__name__}"
        kept = client.memory.get(key)
        if self.error_feedback and kept and len(kept["u"]) == len(u):
            # u = D + e, where e is all that was not sent, or all if what was sent got lost
            e = kept["u"].index_fill(0, kept["at"].long(), 0.0) if msg[TH + "taken"] else kept["u"]
            u = u + e
        names = [[k, *x.shape] for k, x in d.items()]
        client.memory[key] = {"u": u, "at": torch.zeros(0, dtype=torch.int32),
                              "rest": {k: v for k, v in lifted.items() if k not in d}}
        on = np.zeros(len(u), bool)
        on[self.largest(u, names, msg[TH + "density"]).numpy()] = True
        return {"names": names, "bits": torch.from_numpy(np.packbits(on))}

    def _lifted(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        """The values at the agreed places, and all that is no tensor of reals."""
        key = TH + f"{type(fn.__self__).__name__}.{fn.__name__}"
        kept = client.memory[key]
        at = _places(msg[TH + "bits"], len(kept["u"]))
        client.memory[key] = {**kept, "at": at.int(), "rest": {}}
        return {TH + "values": kept["u"][at], **kept["rest"]}

    def at(self, t: int) -> float:
        """s_t = s_0 (a + (1 - a)(1 - t / T)), the share of block 0 in the t-th question from 0."""
        left = 1 - t / max(1, self.__dict__["_rounds"] - 1) if self.__dict__["_rounds"] else 1.0
        return self.density * (self.time_floor + (1 - self.time_floor) * max(0.0, left))

    def largest(self, u: Tensor, names: Sequence[Sequence[Any]], density: float) -> Tensor:
        """Places of each tensor's largest entries: a share of max(s_min, s_t * a ** block)."""
        parts, start = [], 0
        for name, *shape in names:
            n = math.prod(shape)
            share = max(self.density_min, density * self.depth_decay ** (block_of(name.split("/")[-1]) or 0))
            k = math.ceil(min(1.0, share) * n)
            parts.append(start + u[start : start + n].abs().topk(k, sorted=False).indices)
            start += n
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def statement(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().statement(state), "in_the_clear": "no value; the places of each client's largest entries"}


def _size(names: Sequence[Sequence[Any]]) -> int:
    return sum(math.prod(shape) for _, *shape in names)


def _places(bits: Tensor, size: int) -> Tensor:
    """Sorted positions of a bitmap."""
    return torch.from_numpy(np.flatnonzero(np.unpackbits(bits.numpy(), count=size)))


def _split(flat: Tensor, names: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """The vector as its tensors again."""
    sizes = [math.prod(shape) for _, *shape in names]
    return {k: x.view(shape) for (k, *shape), x in zip(names, flat.split(sizes), strict=True)}
