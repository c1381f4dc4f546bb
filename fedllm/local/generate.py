"""Greedy and sampled continuation for many clients in one decoding loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import RecipeError
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.local.forward import Lane, lanes_of, lots_of_lanes
from fedllm.local.requests import Embed, Generate, Limits
from fedllm.models.batch import Batch, collate
from fedllm.models.decode import Continuation
from fedllm.models.kernels import fast
from fedllm.models.model import Model
from fedllm.models.sealed import opened

STAY = 0.75
"""Rows that have said all they have to say are dropped once no more than this share of them goes on."""


def run_generates(requests: Sequence[Generate], limits: Limits) -> list[list[list[int]]]:
    """Token ids that follow each prompt, without the end token."""
    out: list[list[list[int]]] = [[[] for _ in r.prompts] for r in requests]
    first = requests[0]
    room = opened(first.model).room - first.max_new_tokens
    if room < 1:
        raise RecipeError(f"max_new_tokens = {first.max_new_tokens} leaves no room for a prompt: the model has "
                          f"{opened(first.model).positions} positions")
    asked = [Embed(r.client, r.model, r.theta, r.base, [Encoded(p[-room:], p[-room:], 0) for p in r.prompts])
             for r in requests]
    most, new = limits.kept(first.model), first.max_new_tokens
    lots = (lot for lanes in _for_one_batch(lanes_of(asked)) for lot in lots_of_lanes(lanes, limits, most, new))
    for lot in lots:
        at, model = 0, opened(first.model)
        while lanes := [lane for lane in lot if len(lane.rows) > at]:
            longest = max(len(lane.rows[at][2].ids) for lane in lanes) + new
            b = max(1, most // (longest * len(lanes)))
            part = [lane.rows[at : at + b] for lane in lanes]
            wide = max(map(len, part))
            full = [[row[2] for row in rows] + [rows[0][2]] * (wide - len(rows)) for rows in part]  # a rectangle
            batch = collate(full, model.pad, model.device, left=True)
            seats = [_seat(requests, rows[j]) if j < len(rows) else None for rows in part for j in range(wide)]
            with torch.no_grad(), model.using([lane.request.theta for lane in lanes], first.base):
                got = decode(model, batch, first, seats)
            for k, rows in enumerate(part):
                for j, (i, row, _) in enumerate(rows):
                    out[i][row] = got[k * batch.rows + j]
            at += b
    return out


def _for_one_batch(lanes: list[Lane]) -> Iterator[list[Lane]]:
    """All lanes, or where the model cannot pad the rows of one length after the other."""
    if not lanes or opened(lanes[0].request.model).ways.padded:
        yield lanes
        return
    for length in sorted({len(e.ids) for lane in lanes for *_, e in lane.rows}, reverse=True):
        cut = [Lane(lane.request, [row for row in lane.rows if len(row[2].ids) == length]) for lane in lanes]
        yield sorted((lane for lane in cut if lane.rows), key=lambda lane: -len(lane.rows))


def _seat(requests: Sequence[Generate], row: tuple[int, int, Encoded]) -> np.random.Generator:
    """Each row draws from a stream of its own, so that sampling does not depend on who shares the batch."""
    return numpy_stream(requests[row[0]].seed, row[1])


def decode(model: Model, batch: Batch, how: Generate, seats: Sequence[np.random.Generator | None]) -> list[list[int]]:
    """Continue left-padded rows [N, T] until each has said its end token or `max_new_tokens` are out.

    `seats` holds one random stream a row, None for rows that only fill the rectangle.
    """
    def quick() -> AbstractContextManager[None]:
        """For one token, so that other threads come in between (`core.switches`)."""
        return fast(model.device, batch.ids.shape[1], model.fast_kernels)

    with quick():
        text, ends = Continuation(model, batch, how.max_new_tokens), model.ends
    said: list[list[int]] = [[] for _ in seats]
    talking = {i for i, seat in enumerate(seats) if seat is not None}
    here = list(range(len(seats)))  # whose row each is
    for _ in range(how.max_new_tokens):
        with quick():
            logits = text.logits()
        token = _pick(logits, how.temperature, [seats[i] for i in here])
        for i, word in zip(here, token.tolist(), strict=True):
            if i in talking and word in ends:
                talking.remove(i)
            elif i in talking:
                said[i].append(word)
        if not talking:
            break
        if text.drops and (stay := _staying([i in talking for i in here], batch.k)):
            here, token = [here[j] for j in stay], token[stay]
            text.keep(stay)
        text.add(token)
    return said


def _staying(talks: Sequence[bool], k: int) -> list[int]:
    """Rows to go on with, as many in each of `k` lanes; none where too few would leave to be worth a copy."""
    wide = len(talks) // k
    lanes = [sorted(range(j * wide, (j + 1) * wide), key=lambda i: not talks[i]) for j in range(k)]
    need = max(sum(talks[i] for i in lane) for lane in lanes)
    return [i for lane in lanes for i in lane[:need]] if need <= STAY * wide else []


def _pick(z: Tensor, temperature: float, seats: Sequence[np.random.Generator | None]) -> Tensor:
    if temperature == 0:
        return z.argmax(-1)
    p = torch.softmax(z.double() / temperature, -1).cpu().numpy()
    picks = [seat.choice(len(q), p=q / q.sum()) if seat else 0 for seat, q in zip(seats, p, strict=True)]
    return torch.tensor(picks, device=z.device)


def prompt_ids(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[np.ndarray]:
    """Texts as a model reads them before it answers: with the beginning token, without the end token."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    special = not start  # encoders have their own frame instead
    ids = tokenizer(list(texts), add_special_tokens=special, truncation=special, max_length=max_length)["input_ids"]
    return [np.array(start + row[-(max_length - len(start)) :] if start else row, np.int32) for row in ids]
