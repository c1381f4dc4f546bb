"""Reducers fold replies one at a time, so the server never holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.form import MOST
from fedllm.core.payload import Payload


class Reducer(Protocol):
    """Folds replies: `zero`, then `add` one at a time, then `done`. `add` raises before it changes `acc`, or not at
    all: what it raises for is left out, and the fold goes on.

    Where replies differ in names or shapes, those that most clients share count, and never those of who came first; a
    reducer that takes such replies together says so by `ragged = True`, or by `ragged(reply)`, what of a reply must be
    as in the others: (name, value) each."""

    def zero(self) -> Any: ...
    def add(self, acc: Any, reply: Payload) -> Any: ...
    def done(self, acc: Any) -> Payload: ...


class Sum:
    """A reducer that is a sum of lifted replies.

    `lift` may run on the client: secure aggregation, homomorphic encryption, trees of servers and asynchronous
    buffers can compute any `Sum`, because all that they need is `lift` there, `+` here, and `done` at the end.
    """

    ragged: ClassVar[bool | Callable[[Payload], frozenset[tuple[str, str]]]] = False
    divides: ClassVar[bool] = False
    """Whether `done` divides one entry of the sum by another: noise or a dropped entry then does more than blur it."""

    def lift(self, reply: Payload) -> Payload:
        """What this reply contributes to the sum; tensors and numbers only."""
        raise NotImplementedError

    def done(self, total: Payload) -> Payload:
        """The result, from the sum of all lifted replies."""
        raise NotImplementedError

    def zero(self) -> dict[str, Any]:
        return {}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        return self.plus(acc, self.lift(reply))

    def plus(self, acc: dict[str, Any], lifted: Payload) -> dict[str, Any]:
        """Add one lifted reply in place; the first one is copied, since replies are not ours to change."""
        if not acc:
            return {k: v.clone() if isinstance(v, Tensor) else v for k, v in lifted.items()}
        check_same(acc, lifted)
        for key, v in lifted.items():
            acc[key] = acc[key].add_(v) if isinstance(v, Tensor) else acc[key] + v
        return acc


class Lifted(Sum):
    """The sum of replies that a layer above has lifted on the client already."""

    def lift(self, reply: Payload) -> Payload:
        return reply

    def done(self, total: Payload) -> Payload:
        return total


@dataclass(frozen=True)
class Mean(Sum):
    """Weighted mean of every tensor and number in the reply; the weight is the reply's `n`, or 1 (`by="uniform"`).

    Low-precision tensors are summed in fp32. The result keeps the total weight under `n`.
    """

    by: Literal["n", "uniform"] = "n"

    def weight(self, reply: Payload) -> float:
        if self.by == "uniform":
            return 1.0
        n = reply.get("n")
        if isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n <= MOST:
            raise PayloadError(f"its weight n is {str(n)[:40]}; allowed is a number from 0 to {MOST:g}")
        return float(n)

    def lift(self, reply: Payload) -> Payload:
        w = self.weight(reply)
        return {"n": w} | {k: wide(v) * w for k, v in reply.items() if k != "n"}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        if not acc:
            return dict(self.lift(reply))
        check_same(acc, reply, unless="n")
        w = self.weight(reply)
        for key, v in reply.items():
            if isinstance(v, Tensor):
                acc[key].add_(v, alpha=w)  # one pass over memory: acc += n_k * v_k
            elif key != "n":
                acc[key] += v * w
        acc["n"] += w
        return acc

    def done(self, total: Payload) -> Payload:
        n = total["n"]
        if n <= 0:
            raise PayloadError(f"the replies' weights 'n' add up to {n}; a mean needs a sum above 0")
        return {k: v / n if k != "n" else n for k, v in total.items()}


def wide(v: Any) -> Any:
    """fp32 for the half-precision types, anything else as it is."""
    return v.float() if isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) else v


def check_same(acc: Payload, reply: Payload, unless: str | None = None) -> None:
    """Refuse a reply whose names or shapes are not those of the replies before it."""
    if acc.keys() != reply.keys() and (odd := (acc.keys() ^ reply.keys()) - {unless}):
        raise PayloadError(f"a reply's names differ from the others', for example {sorted(odd)[:3]}")
    for key, v in reply.items():
        if key != unless and isinstance(v, Tensor) != isinstance(acc[key], Tensor):
            raise PayloadError(f"'{key}' is {type(v).__name__}, in the replies before it {type(acc[key]).__name__}")
        if not isinstance(v, Tensor | int | float | list):
            raise PayloadError(f"'{key}' is {type(v).__name__}, which cannot be added up")
        if isinstance(v, Tensor) and v.shape != acc[key].shape:
            raise PayloadError(f"'{key}' has shape {tuple(v.shape)}, the replies before it {tuple(acc[key].shape)}")


@dataclass(frozen=True)
class Total(Sum):
    """The plain sum of every tensor and number in the replies: statistics that say all they have to as a sum."""

    def lift(self, reply: Payload) -> Payload:
        return {k: wide(v) for k, v in reply.items()}

    def done(self, total: Payload) -> Payload:
        return total
