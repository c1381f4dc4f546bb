"""Forward-only work for many clients: losses on rows, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError
from fedllm.data.encode import Encoded
from fedllm.local.requests import Embed, Limits, Logits, Losses, Measure, Outputs, Probe, Request, RowLosses, same
from fedllm.models.batch import Batch, collate
from fedllm.models.kernels import fast
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.space import stack_lanes, tree_to


@dataclass
class Lane:
    """Rows that run under one tree of trainables, longest first, and where each one's answer belongs."""

    request: Request
    rows: list[tuple[int, int, Encoded]]  # (request, row, what)


def lanes_of(requests: Sequence[Losses | Embed]) -> list[Lane]:
    """One lane a distinct tree: clients that hold the very same trainables share a lane instead of stacking copies."""
    by_tree: dict[tuple[int, ...], Lane] = {}
    for i, r in enumerate(requests):
        lane = by_tree.setdefault(same(r.theta), Lane(r, []))
        lane.rows += [(i, j, e) for j, e in enumerate(r.rows)]
    for lane in by_tree.values():
        lane.rows.sort(key=lambda row: -len(row[2].ids))
    return sorted((lane for lane in by_tree.values() if lane.rows), key=lambda lane: -len(lane.rows))


def sweep(requests: Sequence[Losses | Embed], limits: Limits,
          work: Callable[[Model, Batch], Tensor]) -> list[np.ndarray]:
    """`work(model, batch)` gives one vector a row; returns them in each request's row order: [rows, width]."""
    return [np.stack(rows) if rows else np.zeros((0, 3)) for rows in swept(requests, limits, work)]


def swept(requests: Sequence[Losses | Embed], limits: Limits,
          work: Callable[[Model, Batch], Tensor]) -> list[list[np.ndarray]]:
    """`work(model, batch)` gives something for each row; returns it in each request's row order."""
    out: list[list[np.ndarray | None]] = [[None] * len(r.rows) for r in requests]
    most = limits.read(requests[0].model) if requests else 0
    for lot in lots_of_lanes(lanes_of(requests), limits, most):
        model, base = lot[0].request.model, lot[0].request.base
        trees = [lane.request.theta for lane in lot]
        stacked, base = tree_to(stack_lanes(trees), model.device), base and tree_to(base, model.device)
        for live, part in _chunks(lot, most):
            batch = collate([[row[2] for row in rows] for rows in part], model.pad, model.device)
            lanes = {n: t[:live] for n, t in stacked.items()}
            with torch.no_grad(), model.using(trees[:live], base, lanes):
                got = work(model, batch).cpu().numpy()
            for k, rows in enumerate(part):
                for j, (i, row, _) in enumerate(rows):
                    out[i][row] = got[k * batch.rows + j]
    return out  # type: ignore[return-value]


def lots_of_lanes(lanes: Sequence[Lane], limits: Limits, most: int, more: int = 0) -> Iterator[list[Lane]]:
    """Cut lanes into lots whose stacked trainables fit into memory, and of which a row each is at most `most` tokens;
    `more` tokens will follow each row."""
    lot: list[Lane] = []
    size = longest = 0
    for lane in lanes:
        held, length = sum(t.numel() * t.element_size() for t in lane.request.theta.values()), len(lane.rows[0][2].ids)
        full = len(lot) >= 64 or (len(lot) + 1) * (max(longest, length) + more) > most
        if lot and (full or size + held > limits.lane_bytes or not lane.request.model.stackable):
            yield lot
            lot, size, longest = [], 0, 0
        lot.append(lane)
        size, longest = size + held, max(longest, length)
    if lot:
        yield lot


def _chunks(lot: Sequence[Lane], batch_tokens: int) -> Iterator[tuple[int, list[list[tuple[int, int, Encoded]]]]]:
    """Rectangles of at most `batch_tokens`, the longest rows first; lanes that run out drop off the end."""
    at, live = 0, len(lot)
    while live:
        longest = max(len(lane.rows[at][2].ids) for lane in lot[:live])
        b = max(1, batch_tokens // (longest * live))
        yield live, [lane.rows[at : at + b] for lane in lot[:live]]
        at += b
        while live and len(lot[live - 1].rows) <= at:
            live -= 1


def run_losses(requests: Sequence[Losses], limits: Limits) -> list[RowLosses]:
    """Row losses of every request."""

    def work(model: Model, batch: Batch) -> Tensor:
        if requests[0].tested:
            return model.figures(batch)
        return torch.stack([x.double() for x in model.row_losses(batch)], 1)

    return [RowLosses(g[:, 0], g[:, 1], g[:, 2], g) for g in sweep(requests, limits, work)]


def run_logits(requests: Sequence[Logits], limits: Limits) -> list[list[np.ndarray]]:
    """Logits of every request's rows, each as long as its row."""
    got = swept(requests, limits, lambda model, batch: model.class_logits(batch))
    return [[z[: len(row.ids)] if z.ndim > 1 else z for z, row in zip(zs, r.rows, strict=True)]
            for zs, r in zip(got, requests, strict=True)]


def run_probes(requests: Sequence[Probe], limits: Limits) -> list[list[RowLosses]]:
    """Row losses of every request under each of its trainables: all of them are lanes of the same forwards."""
    each = [Losses(r.client, r.model, theta, r.base, r.rows) for r in requests for theta in r.thetas]
    got = iter(run_losses(each, limits))
    return [[next(got) for _ in r.thetas] for r in requests]


def run_measures(requests: Sequence[Measure], limits: Limits) -> list[np.ndarray]:
    """`fn(model, batch)`, a vector for each row, of every request [rows, width]; CompositionError for another shape."""
    fn = requests[0].fn

    def work(model: Model, batch: Batch) -> Tensor:
        with fast(model.device, batch.ids.shape[1], model.fast_kernels):
            got = fn(model, batch)
        if got.dim() != 2 or len(got) != len(batch.ids):
            raise CompositionError(f"client.measure: {fn.__qualname__} gave shape {tuple(got.shape)} for "
                                   f"{len(batch.ids)} rows; allowed is one vector a row, [{len(batch.ids)}, width]")
        return got

    return sweep(requests, limits, work)


def run_embeds(requests: Sequence[Embed], limits: Limits) -> list[np.ndarray]:
    """Mean-pooled last hidden states, fp32 [rows, hidden]."""

    def work(model: Model, batch: Batch) -> Tensor:
        h = model.hidden(batch)
        if isinstance(model.net, HeadedEncoder) and model.net.pooling != "each":
            return model.net.pool(h, batch.mask).float()
        m = batch.mask.to(h.dtype)[..., None]
        return ((h * m).sum(1) / m.sum(1)).float()

    return sweep(requests, limits, work)


def run_outputs(requests: Sequence[Outputs], limits: Limits) -> list[Tensor]:
    """Class logits [rows, classes] of every request, in the order of its rows."""
    model, rows = requests[0].model, [x for r in requests for x in r.rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # stable: the same for the same lengths
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    while order:
        lot = order[: max(1, limits.read(model) // len(rows[order[0]]))]
        order = order[len(lot) :]
        x = torch.nn.utils.rnn.pad_sequence([rows[i] for i in lot], batch_first=True).to(model.device)
        sizes = torch.tensor([len(rows[i]) for i in lot], device=model.device)
        mask = torch.arange(x.shape[1], device=model.device) < sizes[:, None]
        with torch.no_grad(), model.using([{}]):
            got = model.outputs(x, mask).cpu()
        for i, z in zip(lot, got, strict=True):
            out[i] = z
    at = iter(out)
    return [torch.stack([next(at) for _ in r.rows]) for r in requests]
