"""A chain of blocks trained window by window: a loss where the window ends, and one through the adapters beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.emulator import blocks_of
from fedllm.models.model import Model
from fedllm.models.segments import Segment, run
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.layers import block_of


@dataclass(frozen=True)
class Chain(Objective):
    """CE(head(norm(h_{j+Q}))) + lam CE(head(norm(A_L(.. A_{j+Q}(h_{j+Q}))))) (ChainFed, arXiv 2604.06819).

    Blocks before `start` run without a graph, blocks from `start + width` on do not run at all: of these only the
    adapters A_l do. At the last window the second loss is the first and is left out.
    """

    start: int = knob(0, "first block of the window, j", ge=0)
    width: int = knob(2, "blocks of the window, Q", ge=1)
    lam: float = knob(0.2, "weight of the loss through the adapters beyond", ge=0)

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        of = len(blocks_of(model.net))
        end, x = min(of, self.start + self.width), batch.ids
        if self.start:
            with torch.no_grad():
                x = run(model, Segment(0, self.start, of, True, False), x, batch.mask)
        h = run(model, Segment(self.start, end, of, not self.start, False), x, batch.mask)
        loss, count = words(model, h, batch, of)
        if self.lam and end < of:
            assert isinstance(model.space, Adapter)
            for path in sites(model)[end:]:
                h = model.space.alone(h, path, model.stack)
            loss = loss + self.lam * words(model, h, batch, of)[0]
        return loss, count


def words(model: Model, h: Tensor, batch: Batch, of: int) -> tuple[Tensor, Tensor]:
    """(summed loss, targets) of each row [N], from states h [N, T, d] that have not passed the last norm."""
    y = run(model, Segment(of, of, of, False, True), h, batch.mask)
    rows, cols = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    z = model.logits_of(y[:, :-1])[rows, cols]
    ce = F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), batch.labels[:, 1:][rows, cols],
                         reduction="none")
    n = len(batch.ids)
    return ce.new_zeros(n).index_add(0, rows, ce), torch.bincount(rows, minlength=n).to(ce.dtype)


def sites(model: Model) -> list[str]:
    """The path of each block's adapter, in the order of the blocks."""
    found = {block_of(n): n.partition(".adapter_")[0] for n in model.initial() if ".adapter_down.weight" in n}
    return [found[b] for b in sorted(b for b in found if b is not None)]


def states(model: Model, batch: Batch) -> Tensor:
    """For `client.measure`: each row's mean state after the embeddings and after each block [N, (L + 1) d]."""
    of, m = len(blocks_of(model.net)), batch.mask[..., None].to(torch.float32)
    x, seen = run(model, Segment(0, 0, of, True, False), batch.ids, batch.mask), []
    for b in range(of + 1):
        seen.append((x.float() * m).sum(1) / m.sum(1).clamp(min=1))
        if b < of:
            x = run(model, Segment(b, b + 1, of, False, False), x, batch.mask)
    return torch.cat(seen, 1)
