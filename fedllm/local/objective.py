"""What a client descends: row losses for stacked lanes, with whatever goes beside each row."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.knobs import Knobs
from fedllm.data.encode import Encoded
from fedllm.models.batch import Batch, collate
from fedllm.models.kernels import fast
from fedllm.models.model import Model

Side = Mapping[str, Sequence[Any]]
"""What goes beside each row, by name: another tokenized row (`Encoded`), a tensor, a vector or a number."""


@dataclass(frozen=True)
class Objective(Knobs):
    """Row losses; a frozen dataclass whose fields are its knobs. Lanes with equal `key` run in one step.

    A row's loss depends on the row and on its side alone: that is what lets DP-SGD clip it example by example.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """The names that `side` must have, and all that it may have."""

    @property
    def key(self) -> Hashable:
        """Equal for objectives that are the same function."""
        return (type(self), *(getattr(self, f.name) for f in fields(self)))

    @property
    def name(self) -> str:
        """As errors call it: the stem of its file, and its class where it lives beside a method."""
        stem = type(self).__module__.rpartition(".")[2]
        return stem if ".objectives." in type(self).__module__ else f"{stem}.{type(self).__name__}"

    def losses(self, model: Model, batch: Batch, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(summed loss, how many targets it sums over) of each row [N], within `model.using`.

        `side` holds a Batch of the same lanes and rows, or a tensor [N, ...], by name.
        """
        raise NotImplementedError


def check_side(objective: Objective, side: Side, rows: int) -> None:
    """CompositionError for a side that lacks a name or has one too many, DataError for one of another length."""
    needs = ", ".join(objective.needs) or "nothing"
    if missing := [n for n in objective.needs if n not in side]:
        raise CompositionError(f"objective '{objective.name}' lacks side '{missing[0]}': give one for each row; it "
                               f"needs {needs}, and side has {', '.join(side) or 'nothing'}")
    if odd := [n for n in side if n not in objective.needs]:
        raise CompositionError(f"objective '{objective.name}' has no use for side '{odd[0]}'; allowed is {needs}")
    for name, values in side.items():
        if len(values) != rows:
            raise DataError(f"objective '{objective.name}': side '{name}' has {len(values)} entries and there are "
                            f"{rows} rows; allowed is one for each row, in their order")


def taken(side: Side, at: Sequence[int]) -> dict[str, list[Any]]:
    """The side of these rows."""
    return {name: [values[i] for i in at] for name, values in side.items()}


def lane_losses(objective: Objective, model: Model, rows: Sequence[Sequence[Encoded]],
                sides: Sequence[Side]) -> Tensor:
    """Mean loss per target of each lane [K]; `rows` and `sides` hold each lane's batch. Runs within `model.using`."""
    total, count = lane_sums(objective, model, rows, sides)
    return total / count.clamp(min=1)


def lane_sums(objective: Objective, model: Model, rows: Sequence[Sequence[Encoded]],
              sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """The same as summed loss and number of targets, [K] each."""
    batch = collate(rows, model.pad, model.device)
    model.stack.rows = len(batch.ids)
    side = {n: beside([s[n] for s in sides], model) for n in objective.needs}
    with fast(model.device, batch.ids.shape[1], model.fast_kernels):
        total, count = (x.view(batch.k, -1) for x in objective.losses(model, batch, side))
    if any(len(lane) < batch.rows for lane in rows):  # rows that fill up short lanes count nothing
        real = torch.tensor([[j < len(lane) for j in range(batch.rows)] for lane in rows], device=total.device)
        total, count = torch.where(real, total, 0.0), count * real
    return total.sum(1), count.sum(1)


def beside(lanes: Sequence[Sequence[Any]], model: Model) -> Any:
    """One kind of side of K lanes: rows as a Batch, tensors and numbers as [K * B, ...], padded with zeros."""
    some = next(lane[0] for lane in lanes if len(lane))  # of a step in parts, short lanes have none in the last
    if isinstance(some, Encoded):
        return collate(lanes, model.pad, model.device)
    made = [[_tensor(v) for v in lane] for lane in lanes]
    first, b = _tensor(some), max(map(len, made))
    shape = [max(sizes) for sizes in zip(*(v.shape for lane in made for v in lane), strict=True)]
    out = first.new_zeros((len(made) * b, *shape))
    for k, lane in enumerate(made):
        for j, v in enumerate(lane, k * b):
            out[(j, *(slice(s) for s in v.shape))] = v
    return out.to(model.device)


def _tensor(value: Any) -> Tensor:
    """Numbers in fp64: the objective rounds them to its own type."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)
