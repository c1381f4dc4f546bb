"""What each block of a network makes of a text, for methods that choose among layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.models.batch import Batch
from fedllm.models.emulator import blocks_of
from fedllm.models.model import Model


@dataclass(frozen=True)
class MeanStates:
    """For `client.measure`: the mean state of each row's text after every block [N, L * d], the first block first."""

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        blocks, seen = blocks_of(model.net), []
        hooks = [b.register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
                 for b in blocks]
        try:
            model.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(blocks):
            raise ModelError(f"{type(model.net).__name__} reads a batch in {len(seen)} passes of blocks and has "
                             f"{len(blocks)}; its layers cannot be told apart by what they make of a text")
        words = batch.mask[..., None]
        text = words.shape[1]  # a prompt of embeddings stands in front
        return torch.cat([(h[:, -text:] * words).sum(1) / words.sum(1).clamp(min=1) for h in seen], 1)


def told_apart(h: np.ndarray) -> float:
    """sum_j (log e_j + 1 / e_j) over the eigenvalues e of the rows' cosines, with 1e-5 added to each; h [rows, d].

    FedPepTAO's score of a layer. A floor of 1e-5 bounds what rows that are alike can add: it wants rows that differ.
    """
    unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    e = np.maximum(np.linalg.eigvalsh(unit @ unit.T), 0.0) + 1e-5
    return float((np.log(e) + 1 / e).sum())
