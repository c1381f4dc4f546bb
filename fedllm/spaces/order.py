"""Neurons and heads of a transformer in the order of their weight, while it computes what it did (RaFFM's SPP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.spaces.layers import block_of
from fedllm.spaces.slices import blocks

ATTENTION = ("attention", "attn", "q_proj", "k_proj", "v_proj", "o_proj")


def units_of(net: nn.Module, theta: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What must move together: of each block's attention, and of its feed-forward part, the trainables with the axis
    along which a unit's entries lie, and how many units there are.

    Attention moves by whole heads with their key-value group: rows within a head are tied to positions by rotary
    embeddings, and stay as they are. ModelError where part of a unit is not among the trainables.
    """
    whole, mine = blocks(net, dict(net.named_parameters()), 1)[0], blocks(net, theta, 1)[0]
    config: Any = net.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    groups: dict[tuple[int | None, bool], list[str]] = {}
    for name in {**whole.rows, **whole.columns}:
        inside = any(word in name.rpartition(".")[0] for word in ATTENTION)
        groups.setdefault((block_of(name), inside), []).append(name)
    found = []
    for (block, inside), names in groups.items():
        if not (held := [n for n in names if n in mine.rows or n in mine.columns]):
            continue
        if torn := sorted(set(names) - set(held)):
            raise ModelError(f"'{torn[0]}' is not among the trainables and belongs to units of block {block} that are; "
                             "use the space 'full', or 'layers' with whole blocks")
        axes = {n: 0 if n in mine.rows else 1 for n in names}
        found.append({"axes": axes, "units": heads if inside else theta[names[0]].shape[axes[names[0]]]})
    return found


def ordered(theta: Mapping[str, Tensor], units: Sequence[Mapping[str, Any]]) -> Tree:
    """The trainables with each group's units largest (L1) first; rows into a unit and columns out of it move together,
    so that every layer computes what it did."""
    out = dict(theta)
    for group in units:
        parts = {n: theta[n].unflatten(axis, (group["units"], -1)) for n, axis in group["axes"].items()}
        size = torch.stack([t.movedim(group["axes"][n], 0).abs().double().flatten(1).sum(1)
                            for n, t in parts.items()]).sum(0)
        order = size.argsort(descending=True, stable=True)
        for n, axis in group["axes"].items():
            out[n] = parts[n].index_select(axis, order).flatten(axis, axis + 1)
    return out
