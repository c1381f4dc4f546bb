"""Vetting: a client looks at what the server sends before it trains on it, and if need be does not answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import Withheld
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload, part
from fedllm.models.known_by import base_digest

MEMORY = "vetting"


@dataclass(frozen=True)
class Vetting(Knobs, Layer):
    """Against forged parameters (Decepticons: Fowl et al., ICLR 2023, arXiv 2201.12675) and a model that is not the
    one agreed on. The checks are choices of ours.

    Names and shapes of the weights told must be those of the client's own model and space; no matrix may have mostly
    equal rows or be of tiny rank; no bias may be out of proportion; and no round may move the weights further from
    those of the round before than `jump` times their norm. With `base_hash` the frozen model is the one signed.
    A matrix that is all zero (LoRA's B at the start) is as it should be. The reason is told, no more.
    """

    base_hash: str | None = knob(None, "sha256 (or its first 12 digits or more) of the frozen model, as `base_digest` "
                                       "gives it; None: not checked")
    equal_rows: float = knob(0.5, "largest share of a matrix's rows that may be the same up to scale", gt=0, le=1)
    least_rank: float = knob(0.1, "least effective rank of a matrix, over its smaller side", ge=0, lt=1)
    most_bias: float = knob(1e4, "largest entry of a bias or norm weight, over its median", gt=1)
    jump: float = knob(10.0, "longest way from the weights told before, over their norm; a first message has none",
                       gt=0)
    smallest: int = knob(16, "matrices with a side below this are not looked into", ge=2)

    def client(self, fn: Any, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        theta = {k: v for k, v in part(msg, "theta").items() if isinstance(v, Tensor)}
        if not theta or isinstance(fn.__self__, Layer):
            return call(msg)
        if why := self.objection(theta, client):
            raise Withheld(f"vetting: {why}")
        client.memory[MEMORY] = theta
        return call(msg)

    def objection(self, theta: Mapping[str, Tensor], client: Any) -> str | None:
        """Why these weights are not trained on, or None."""
        if self.base_hash is not None:
            found = client.once(base_digest, client.model)
            if len(self.base_hash) < 12 or not found.startswith(self.base_hash):
                return f"the frozen model is {found[:12]}, and {self.base_hash[:12]} was agreed on"
        if why := unlike(theta, client.model.initial()):
            return why
        before = client.memory.get(MEMORY)
        if before is not None and (why := self.jumped(theta, before)):
            return why
        limits = [self.equal_rows, self.least_rank, self.most_bias, self.smallest]
        return client.once(oddity, dict(theta), limits) or None

    def jumped(self, theta: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> str | None:
        """Whether the weights moved further than training does."""
        shared = [n for n in theta if n in before and before[n].shape == theta[n].shape]
        way = sum(float((theta[n].double() - before[n].double()).pow(2).sum()) for n in shared) ** 0.5
        length = sum(float(before[n].double().pow(2).sum()) for n in shared) ** 0.5
        far = bool(length) and way > self.jump * length
        return f"the weights moved by {way / length:.1f} times their norm" if far else None


def oddity(theta: Mapping[str, Tensor], limits: list[float]) -> str:
    """What in these weights is not as training leaves it; empty when nothing is."""
    equal, rank, bias, smallest = limits
    for name, t in theta.items():
        x = t.detach().double()
        if not bool(torch.isfinite(x).all()):
            return f"'{name}' holds NaN or infinity"
        if x.numel() == 0 or float(x.abs().max()) == 0:
            continue
        if x.dim() == 1 and len(x) >= smallest and (top := standing_out(x)) > bias:
            return f"'{name}' has an entry {top:.1e} times the median"
        if x.dim() != 2 or min(x.shape) < smallest:
            continue
        # Conv1D keeps its weights the other way round
        if (share := max(equal_rows(x), equal_rows(x.T))) > equal:
            return f"'{name}' has {share:.0%} equal rows"
        if (full := effective_rank(x) / min(x.shape)) < rank:
            return f"'{name}' has an effective rank of {full:.1%}"
    return ""


def standing_out(x: Tensor) -> float:
    """The largest entry over the median of those that are not 0."""
    size = x.abs()
    return float(size.max() / size[size > 0].median())


def unlike(theta: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What in these weights does not fit the client's own model and space; a smaller rank fits."""
    if odd := theta.keys() - own.keys():
        return f"the model has no trainable '{min(odd)}'"
    for name, t in theta.items():
        mine = own[name]
        inside = t.dim() == mine.dim() and all(a <= b for a, b in zip(t.shape, mine.shape, strict=True))
        if not (t.shape == mine.shape or ("lora_" in name and inside)):
            return f"'{name}' has shape {tuple(t.shape)} and the model's is {tuple(mine.shape)}"
    return None


def equal_rows(x: Tensor) -> float:
    """Share of rows [n, d] that are, up to scale and sign, the same as the row that most others equal.

    A row is told by its direction; rows of zeros count as equal to each other.
    """
    unit = torch.nn.functional.normalize(x, dim=1)
    if len(unit) > 512:
        unit = unit[:: -(-len(unit) // 512)]
    return float(((unit @ unit.T).abs() > 1 - 1e-9).sum(1).max()) / len(unit)


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values (Roy and Vetterli 2007)."""
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))
