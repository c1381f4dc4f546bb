"""Rows that a model is examined on, made up for the kind of network it is, and the number that each of them gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedllm.data.encode import Encoded
from fedllm.models.batch import Batch
from fedllm.models.dual import DualEncoder
from fedllm.models.kernels import fast
from fedllm.models.model import HeadedEncoder, Model
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import IGNORE

LENGTHS = ((9, 5, 2), (6, 3))
"""Tokens of each client's rows."""


def rows_of(model: Model, rng: torch.Generator) -> list[list[Encoded]]:
    """Random rows of both clients, of unequal lengths."""
    make = _picture if isinstance(model.net, DualEncoder) else _text
    return [[make(model, i, length, rng) for i, length in enumerate(lengths)] for lengths in LENGTHS]


def _text(model: Model, i: int, length: int, rng: torch.Generator) -> Encoded:
    """Of a text that is learned word by word, the longer ones have the padding token in the middle."""
    words = model.net.get_input_embeddings().weight.shape[0]
    ids = torch.randint(min(5, words - 1), words, (length,), generator=rng).numpy().astype(np.int32)
    if isinstance(model.net, HeadedEncoder):
        return Encoded(ids, i % len(model.net.classifier.weight), 1)
    if model.rules.net == "masked":
        labels = np.where(np.arange(length) % 2 == 0, ids, IGNORE).astype(np.int64)
        hidden = torch.randint(min(5, words - 1), words, (length,), generator=rng).numpy().astype(np.int32)
        return Encoded(np.where(np.arange(length) % 4 == 0, hidden, ids), labels, int((labels != IGNORE).sum()))
    if length > 6:
        ids[length // 2] = model.pad
    return Encoded(ids, np.r_[IGNORE, ids[1:]].astype(np.int64), length - 1)


def _picture(model: Model, i: int, length: int, rng: torch.Generator) -> Encoded:
    side = model.net.config.vision_config.image_size
    pixels = torch.randn(3, side, side, generator=rng).numpy().astype(np.float32)
    return Encoded(np.zeros(1, np.int32), i % len(model.net.prompts), 1, {"pixels": pixels})


def told(model: Model, batch: Batch) -> Tensor:
    """A number for each row [N] that all of the network makes: its loss, whatever rows the model's own task has."""
    if model.rules.net in ("causal", "masked"):
        task = task_of("generation") if model.rules.net == "causal" else model.rules
        with fast(batch.ids.device, batch.ids.shape[1], model.fast_kernels):
            return task.row_losses(model, batch)[0]
    z = model.class_logits(batch)
    z = z if z.dim() == 2 else (z * batch.mask[..., None]).sum(1)
    return (z * torch.linspace(-1, 2, z.shape[-1]).to(z)).sum(-1) + z.pow(2).sum(-1)


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether both have one shape and differ by no more than this share of the larger's largest entry."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return False
    size = float(want.abs().max().clamp(min=1e-30))
    return float((got - want).abs().max()) <= tolerance * max(size, 1e-3)
