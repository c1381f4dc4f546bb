"""A client's features of public rows against everybody's: of the same row, and of the other modality's (CreamFL)."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.core.payload import digest
from fedllm.local.objective import Objective
from fedllm.models.batch import IGNORE, Batch
from fedllm.models.model import Model
from fedllm.models.pairs import MODALITIES

OTHER = {"image": "text", "text": "image"}


@dataclass(frozen=True)
class Contrast(Objective):
    """For each modality of a row: -log softmax of [z . same, z . old] / tau at the first, and of z . bank / tau at the
    row's own place. Side: `image` and `text` [d], everybody's features of this row; `old_image` and `old_text`, this
    model's before; `place`, the row's number in the banks."""

    needs: ClassVar[tuple[str, ...]] = ("image", "text", "old_image", "old_text", "place")
    modalities: tuple[str, ...] = knob(("image", "text"), "those that this client has")
    temperature: float = knob(0.5, "tau", gt=0)
    weight: float = knob(0.5, "of both losses", ge=0)
    banks: Any = None
    """Modality -> everybody's features of all public rows [N, d]."""

    @functools.cached_property
    def key(self) -> Hashable:  # type: ignore[override]
        """Banks are compared by what they hold: clients are told copies of one, or one."""
        return Contrast, tuple(self.modalities), self.temperature, self.weight, digest(self.banks or {})

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        net: Any = model.net
        z, total = net.features(only(batch, self.modalities)), torch.zeros(len(batch.ids), device=batch.ids.device)
        good = batch.labels != IGNORE
        for m in self.modalities:
            same, old = ((z[m] * side[n].to(z[m])).sum(-1) for n in (m, f"old_{m}"))
            intra = -(torch.stack([same, old], -1) / self.temperature).log_softmax(-1)[:, 0]
            near = z[m] @ self.banks[OTHER[m]].to(z[m]).T / self.temperature  # [N, bank]
            inter = -near.log_softmax(-1).gather(1, side["place"].long()[:, None])[:, 0]
            total = total + self.weight * (intra + inter)
        return total * good, good.to(total.dtype)


def only(batch: Batch, modalities: tuple[str, ...]) -> Batch:
    """The batch without what a client does not have."""
    kept = {"image": "pixels", "text": "words"}
    return Batch(batch.k, batch.ids, batch.mask, batch.labels, {kept[m]: batch.parts[kept[m]] for m in modalities})


def features(model: Model, batch: Batch) -> Tensor:
    """Both modalities' features side by side [N, 2 d], for `client.measure`."""
    net: Any = model.net
    model.stack.rows = len(batch.ids)
    z = net.features(batch)
    return F.normalize(torch.cat([z[m] for m in MODALITIES], 1).unflatten(1, (2, -1)), dim=-1).flatten(1)
