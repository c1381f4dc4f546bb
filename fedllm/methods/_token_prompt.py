"""What a prompt of tokens crosses the wire as: short ids, and a few ids with coefficients that tell how it moved."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedllm.core.client import Client
from fedllm.core.errors import PayloadError, QuorumError, Withheld
from fedllm.core.payload import Payload, digest

log = logging.getLogger(__name__)
NAME = "prompt_embeddings"
SHORTLIST = 500
"""Tokens that the LASSO may use for a position: those that correlate most with what is to be told."""


def nearest(p: Tensor, table: Tensor, usual: Tensor) -> Tensor:
    """For each position the id of the nearest token that is not special, [n]."""
    return usual[torch.cdist(p[None].double(), table[usual][None].double())[0].argmin(1)]


def stamp(p: Tensor) -> str:
    """A short hash of a prompt, bit for bit."""
    return digest({NAME: p})[:16]


def held(msg: Payload, client: Client) -> Tensor:
    """The server's prompt [n, d] from a client's own copy and the news of it, kept in the client's memory.

    Raises Withheld when its copy is another than the server's; the server then sends the whole one.
    """
    mine, p = client.memory, client.memory.get("prompt", client.model.initial()[NAME].float())
    if "prompt" in msg:
        p = msg["prompt"]
    elif "ids" in msg and mine.get("version", 0) == msg["version"] - 1:
        table = client.model.words
        p = moved(p, whole(msg["ids"], len(p), len(table)), msg["w"], table)
    if stamp(p) != msg["hash"]:
        raise Withheld(f"its copy of the prompt is not version {msg['version']} of the server's")
    mine.update(prompt=p, version=msg["version"])
    return p


def moved(p: Tensor, ids: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """p + sum_phi w E[ids] at each position; in fp64 and then rounded, so that every machine gets the same bits."""
    return (p.double() + (w.double()[..., None] * table[ids].double()).sum(1)).float()


def short(ids: Tensor, size: int) -> Tensor:
    """Ids of a vocabulary of this size as 16 bits where they fit (as signed ones: the wire has no others)."""
    return ids.int() if size > 1 << 16 else torch.from_numpy(ids.numpy().astype(np.uint16).view(np.int16))


def whole(ids: Tensor, places: int, size: int) -> Tensor:
    """What `short` was given: for so many places ids of a vocabulary of this size, or PayloadError."""
    out = ids.long() & 0xFFFF if ids.dtype == torch.int16 else ids.long()
    if len(out) != places or (out.numel() and not 0 <= int(out.min()) <= int(out.max()) < size):
        raise PayloadError(f"'ids' are {out.tolist()[:8]}, {len(out)} in all; allowed are {places}, each below {size}")
    return out


def readable(told: Mapping[str, Tensor], places: int, size: int) -> dict[str, Tensor]:
    """The ids of those who told ids of this vocabulary; who did not is named, and left out."""
    out = {}
    for client, ids in told.items():
        try:
            out[client] = whole(ids, places, size)
        except PayloadError as error:
            log.warning("client '%s' is left out of this round: %s", client, error)
    if not out:
        raise QuorumError("FedGFPT.local: no client told ids of the vocabulary")
    return out


def sparse(r: Tensor, table: Tensor, phi: int, alpha: float) -> tuple[Tensor, Tensor]:
    """The phi largest of w that minimizes ||r - E^T w||^2 + alpha u ||w||_1 with u = mean ||E_j||^2: ids, fp16 w."""
    from sklearn.linear_model import Lasso

    e, y = table.double(), r.double()
    unit = float(e.pow(2).sum(1).mean())
    some = (e @ y).abs().topk(min(SHORTLIST, len(e))).indices
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # alpha = 0 is allowed: plain least squares
        lasso = Lasso(alpha * unit / (2 * len(y)), fit_intercept=False, max_iter=2000)
        w = torch.from_numpy(lasso.fit(e[some].T.numpy(), y.numpy()).coef_)
    kept = w.abs().topk(phi).indices
    return some[kept], w[kept].half()
