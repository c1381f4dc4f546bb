"""Encoders that may stop after any block: what each block makes of a text, and a forward that ends where it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.models.batch import Batch
from fedllm.models.emulator import blocks_of
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model


class _Stopped(Exception):
    """The blocks after this one do not run."""


def depth_of(model: Model) -> int:
    """How many blocks it has; ModelError for a network that is no encoder with pooled states."""
    if not isinstance(model.net, HeadedEncoder) or model.net.pooling == "each":
        raise ModelError(f"model {model.name or type(model.net).__name__!r} and data.task = {model.task!r}: early "
                         "exits read pooled states of an encoder; data.task = 'classification' works")
    return len(blocks_of(model.net))


def walk(model: Model, ids: Tensor, mask: Tensor, look: Callable[[Tensor], bool]) -> int:
    """Run block after block, `look` at the pooled states [N, d] after each, and stop once it says False.

    Comes back with the number of blocks that ran. Padding lies on the right. To be called without a gradient.
    """
    net, ran = model.net, 0

    def after(module: Any, args: Any, out: Any) -> None:
        nonlocal ran
        ran += 1
        if not look(net.pool(out[0] if isinstance(out, tuple) else out, mask)):
            raise _Stopped

    hooks = [block.register_forward_hook(after) for block in blocks_of(net)]
    try:
        model.hidden(Batch(1, ids, mask, torch.zeros(len(ids), dtype=torch.long)))
    except _Stopped:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def states(model: Model, batch: Batch, depth: int) -> Tensor:
    """Pooled states after each of the first `depth` blocks [N, depth * d]; those behind it do not run.

    Rows of one length go together where padding matters to the network, as ever.
    """
    lengths = batch.mask.sum(1)
    groups = [torch.ones_like(lengths, dtype=torch.bool)] if model.ways.uneven else [lengths == n for n in
                                                                                    lengths.unique()]
    out: Tensor | None = None
    for rows in groups:
        seen: list[Tensor] = []

        def look(x: Tensor, seen: list[Tensor] = seen) -> bool:
            seen.append(x)
            return len(seen) < depth

        long = batch.mask.shape[1] if model.ways.uneven else int(lengths[rows][0])
        walk(model, batch.ids[rows, :long], batch.mask[rows, :long], look)
        got = torch.cat(seen, 1)
        out = got.new_zeros(len(lengths), got.shape[1]) if out is None else out
        out[rows] = got
    assert out is not None
    return out
