"""Packing: short rows of a step laid end to end in one sequence, each of which sees itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedllm.core.errors import CompositionError
from fedllm.data.encode import IGNORE, Encoded
from fedllm.models.batch import collate
from fedllm.models.hidden import POSITIONS
from fedllm.models.model import Model
from fedllm.tasks.registry import task_of

NEAR = {torch.float64: 1e-9, torch.float32: 1e-4}


def packed(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows in as few sequences as first fit finds, none longer than the longest row; positions begin anew in each
    row. No token is predicted from another row: the first label of a row is never learned."""
    if any(r.parts or isinstance(r.labels, int) for r in rows):
        raise CompositionError("local.packing = true lays rows of text end to end, and these rows have labels or parts "
                               "of their own; leave it out")
    room = max((len(r.ids) for r in rows), default=0)
    bins: list[list[Encoded]] = []
    left: list[int] = []
    for r in sorted(rows, key=lambda r: -len(r.ids)):
        at = next((i for i, free in enumerate(left) if free >= len(r.ids)), len(bins))
        if at == len(bins):
            bins.append([])
            left.append(room)
        bins[at].append(r)
        left[at] -= len(r.ids)
    return [_end_to_end(some) for some in bins]


def _end_to_end(rows: Sequence[Encoded]) -> Encoded:
    labels: list[Any] = [r.labels for r in rows]
    positions = np.concatenate([np.arange(len(r.ids)) for r in rows])
    return Encoded(np.concatenate([r.ids for r in rows]), np.concatenate(labels), sum(r.n_target for r in rows),
                   parts={POSITIONS: positions}, pads={POSITIONS: 0.0})


def check_packing(model: Model) -> None:
    """CompositionError for a model in which packed rows do not stay apart, found by trying it on random rows."""
    what = f"local.packing = true and model {model.name or type(model.net).__name__!r} do not fit together"
    if model.task != "generation" or model.space.virtual or not (model.ways.cut and model.ways.uneven):
        raise CompositionError(f"{what}: it is for causal language models whose padding need not be masked, without "
                               "virtual tokens; leave it out")
    net: Any = model.net
    words = net.get_input_embeddings().weight.shape[0]
    draw = np.random.default_rng(0)
    first, other, last = (_row(draw.integers(words, size=n)) for n in (6, 6, 5))
    theta = model.initial()

    def loss(lane: list[Encoded]) -> torch.Tensor:
        with torch.no_grad(), model.using([theta]):
            return task_of("generation").row_losses(model, collate([lane], model.pad, model.device))[0]

    try:
        alone, beside = loss([first, last]), [loss([_end_to_end([x, last])]) for x in (first, other)]
        only = [loss([_end_to_end([_unlearned(x), last])]) for x in (first, other)]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CompositionError(f"{what}: it takes no positions ({error})") from error
    near = NEAR.get(net.dtype, 2e-2) * float(alone.abs().max())
    if not only[0].equal(only[1]) or float((alone.sum() - beside[0].sum()).abs()) > near:
        raise CompositionError(f"{what}: in {type(model.net).__name__} a row sees those that lie before it in its "
                               "sequence; leave it out")


def _row(ids: np.ndarray) -> Encoded:
    return Encoded(ids.astype(np.int32), np.r_[IGNORE, ids[1:]].astype(np.int64), len(ids) - 1)


def _unlearned(row: Encoded) -> Encoded:
    return Encoded(row.ids, np.full(len(row.ids), IGNORE, np.int64), 0)
