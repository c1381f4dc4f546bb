"""Cross-entropy through a head that is trained, capped or scaled, a few positions at a time.

Logits of a large vocabulary would be most of a step's memory. Each piece's are made, read and forgotten, and made again
in the backward pass; of small vocabularies all are made at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedllm.models.batch import Batch
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.kernels import frozen_head_loss
from fedllm.spaces.twice import wanted
from fedllm.tasks.row import IGNORE
from fedllm.tasks.task import wide

PIECE = 1 << 24
"""Logits that exist at once: 64 MB of them in fp32."""


def word_losses(model: Any, h: Tensor, rows: Tensor, cols: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy [M] of the words `y` [M] through the model's head at h[rows, cols], in the quickest way it has."""
    if model.head is not None and model.head.trained(model.stack.tensors):  # a stacked head wants all rows together
        return piecewise_losses(model, h, rows, cols, y)
    if model.head is not None and model.head.plain and model.ways.fused and not wanted():
        head = model.net.get_output_embeddings()
        return frozen_head_loss(h[rows, cols], head.weight, head.bias, y)
    at = torch.arange(len(y), device=y.device)
    return piecewise_losses(model, h[rows, cols][None], torch.zeros_like(at), at, y)


def target_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """See `Model.target_logits`."""
    model.stack.rows = batch.ids.shape[0]
    if isinstance(model.net, HeadedEncoder):
        rows = (batch.labels != IGNORE).nonzero()[:, 0]
        return rows, model.class_logits(batch)[rows], batch.labels[rows]
    rows, cols = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    z = model.logits_of(model.hidden(batch)[:, :-1])[rows, cols]  # a stacked head wants all lanes' rows together
    return rows, wide(z), batch.labels[:, 1:][rows, cols]


def piecewise_losses(model: Any, h: Tensor, rows: Tensor, cols: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy [M] of the words `y` [M] through the model's own head at h[rows, cols]; h [N, T, d]."""
    words = model.net.get_output_embeddings().weight.shape[0] if model.head is not None else 1
    span = max(1, PIECE // (words * h.shape[0]))
    again = h.requires_grad or torch.is_grad_enabled()
    if span >= h.shape[1] or (again and not model.ways.sites):  # weights that lie in the network only now
        return _losses(model, h, rows, cols, y)
    parts, order = [], []
    state = _state(model.stack)
    for at in range(0, h.shape[1], span):
        here = ((cols >= at) & (cols < at + span)).nonzero()[:, 0]
        if not len(here):
            continue
        args = (h[:, at : at + span], rows[here], cols[here] - at, y[here])

        def piece(*args: Tensor) -> Tensor:
            with _under(model.stack, state):
                return _losses(model, *args)

        parts.append(checkpoint(piece, *args, use_reentrant=False) if again else _losses(model, *args))
        order.append(here)
    return torch.cat(parts)[torch.cat(order).argsort()] if parts else _losses(model, h[:, :1], rows, cols, y)


def _losses(model: Any, h: Tensor, rows: Tensor, cols: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(wide(model.logits_of(h)[rows, cols]), y, reduction="none")


def _state(stack: Any) -> dict[str, Any]:
    return dict(vars(stack))


@contextlib.contextmanager
def _under(stack: Any, state: dict[str, Any]) -> Iterator[None]:
    """With the trainables of the forward, which a backward pass comes after."""
    now = dict(vars(stack))
    vars(stack).update(state)
    try:
        yield
    finally:
        vars(stack).update(now)
