"""Gradient checkpointing: each layer keeps its input alone, and runs again when its gradient is wanted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedllm.core.errors import CompositionError
from fedllm.core.switches import PLAIN_ATTENTION, on, on_now
from fedllm.models.model import Model
from fedllm.spaces.space import Stack

SEEN = ("k", "rows", "tensors", "base", "extra", "mask", "past", "noise")
"""What a layer's modules read of the stack: a later forward of the same step may have changed it."""


def layers_of(model: Model) -> list[nn.Module]:
    """The layers that transformers says may run again; none for a network of another kind."""
    return [m for m in model.net.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def checkpointed(model: Model, on: bool) -> Iterator[None]:
    """Forward and backward in this block keep the layers' inputs alone; the backward must be in it too."""
    layers = layers_of(model) if on else []
    if on and not layers:
        raise CompositionError(f"local.checkpointing = true: model {model.name or type(model.net).__name__!r} has no "
                               "layers of which transformers says that they may run again; leave it out")
    before = [m.__dict__.get("forward") for m in layers]
    try:
        for m in layers:
            m.__dict__["forward"] = _again(m.forward, model.stack)
        yield
    finally:
        for m, own in zip(layers, before, strict=True):
            m.__dict__.pop("forward", None)
            if own is not None:
                m.__dict__["forward"] = own


def _again(plain: Callable[..., Any], stack: Stack) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        seen = {n: getattr(stack, n) for n in SEEN}
        visits = copy.copy(seen["noise"].visits) if seen["noise"] else None
        ran, plainly = False, on_now(PLAIN_ATTENTION)

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return plain(*args, **kwargs)
            again = plainly and not on_now(PLAIN_ATTENTION)  # on a card this is a thread of autograd's
            with _as_seen(stack, seen, visits), on(PLAIN_ATTENTION) if again else contextlib.nullcontext():
                return plain(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward


@contextlib.contextmanager
def _as_seen(stack: Stack, seen: dict[str, Any], visits: Any) -> Iterator[None]:
    """The stack as the layer saw it, and its draws again."""
    now = {n: getattr(stack, n) for n in SEEN}
    counted = seen["noise"].visits if seen["noise"] else None
    vars(stack).update(seen)
    if seen["noise"]:
        seen["noise"].visits = copy.copy(visits)
    try:
        yield
    finally:
        vars(stack).update(now)
        if seen["noise"]:
            seen["noise"].visits = counted
