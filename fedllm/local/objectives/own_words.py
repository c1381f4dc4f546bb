"""The task's own loss among some words alone: a silo whose model has no others (DEPT, Iacob et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.local.objective import Objective
from fedllm.models.batch import Batch
from fedllm.models.model import Model


@dataclass(frozen=True)
class OwnWords(Objective):
    """-log p of a row's targets, next words, with a softmax over `words` ([V] bool, beside each row)."""

    needs: ClassVar[tuple[str, ...]] = ("words",)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, z, y = model.target_logits(batch)  # [M], [M, V], [M]
        known = side["words"][rows]
        here = known.gather(1, y[:, None])[:, 0]  # what the model has no word for is no target
        ce = F.cross_entropy(z.masked_fill(~known, -torch.inf), torch.where(here, y, known.int().argmax(1)),
                             reduction="none") * here
        n = len(batch.ids)
        return ce.new_zeros(n).index_add(0, rows, ce), ce.new_zeros(n).index_add(0, rows, here.to(ce.dtype))


def among(known: Tensor) -> Callable[[Model, Batch], Tensor]:
    """For `client.measure`: each row's summed loss among these words ([V] bool), and how many targets it has [N, 2]; a
    target that is none of them costs log V."""

    def losses(model: Model, batch: Batch) -> Tensor:
        rows, z, y = model.target_logits(batch)
        here = known.to(y.device)
        ce = F.cross_entropy(z.masked_fill(~here, -torch.inf), y, reduction="none").double()
        ce = torch.where(here[y], ce, float(np.log(z.shape[1])))
        return ce.new_zeros(len(batch.ids), 2).index_add(0, rows, torch.stack([ce, torch.ones_like(ce)], 1))

    return losses


def targets(client: Any) -> Tensor:
    """[V or C] bool: the words, or the classes, that a client's training rows have as targets."""
    seen = np.unique(np.concatenate([np.atleast_1d(row.labels) for row in client.tokens]))
    size = len(client.model.labels) or len(client.model.words)
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.from_numpy(seen[seen >= 0].astype(np.int64)), True)
