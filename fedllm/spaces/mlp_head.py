"""A head with a hidden layer on frozen features: what the layer says of a row is the row's representation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack, patch

INNER, OUTER = "classifier.inner", "classifier.outer"


@dataclass(frozen=True)
class MLPHead(Space):
    """z = relu(P r + b) of `size`, and class logits W z + c, over a row's pooled state r; it begins at random."""

    stays = "it is two maps where the network has one"

    size: int = knob(64, "width of the hidden layer", ge=2)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        head = classifier_of(net)
        sizes = {INNER: (self.size, head.in_features), OUTER: (head.out_features, self.size)}
        return {f"{name}.{leaf}": x for name, (o, i) in sizes.items() for leaf, x in (
            ("weight", (torch.rand(o, i, generator=rng) * 2 - 1) / math.sqrt(i)), ("bias", torch.zeros(o)))}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        patch(classifier_of(net), lambda frozen: lambda r: frozen(r) if f"{INNER}.weight" not in stack.tensors
              else mapped(F.relu(mapped(r, INNER, stack)), OUTER, stack))
        return True

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return False


def classifier_of(net: Any) -> nn.Linear:
    """The linear head over pooled states; ModelError where there is none."""
    head = getattr(net, "classifier", None)
    if not isinstance(head, nn.Linear) or getattr(net, "pooling", "each") == "each":
        raise ModelError("space 'mlp_head' is a classifier's; with this model 'lora' works (data.task = "
                         "'classification' makes models with a classifier)")
    return head


def mapped(x: Tensor, name: str, stack: Stack) -> Tensor:
    """W x + b with each lane's own W and b: x [K*B, i] -> [K*B, o]."""
    w, b = (stack.tensors[f"{name}.{leaf}"].to(x.dtype) for leaf in ("weight", "bias"))
    return torch.baddbmm(b[:, None], stack.lanes(x), w.mT).flatten(0, 1)
