"""A client's half of one noisy sum of clipped gradients a round: what it sends, and its share of the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.layer import Layer, name_of
from fedllm.core.sums import LEAST, WHOLE, without
from fedllm.local.objective import taken
from fedllm.local.requests import Fit
from fedllm.local.summed import Clipped, Summed
from fedllm.privacy._discrete import Coins, discrete_gaussian
from fedllm.privacy._shared import CLOSED, OWN, RATE, RING, whole


def client(layer: Any, fn: Any, msg: Any, client: Any, call: Any) -> Any:
    """The clipped sum of this client's rows, and its share of the noise, mod 2^32."""
    if not fn.__dict__.get("runs_on_client") or isinstance(fn.__self__, Layer):
        return call(msg)
    scale, z, share = _heard(layer, msg, client)
    turns, at, book = layer.turns, int(msg[OWN + "round"]), client.memory.setdefault(layer.book, {})
    if turns.begin(book, at):
        client.spend(turns.release(z))
    rows = turns.rows(client.id, client.n, at)
    heard: list[Clipped] = []
    with client.through(lambda request: one_step(layer, request, client, scale, rows),
                        CLOSED.format(name_of(layer)), heard.append):
        reply = dict(call(without(without(msg, OWN), LEAST)))
    if len(heard) != 1:
        raise CompositionError(f"layer '{name_of(layer)}' with noise: {layer.noise} releases one gradient for each "
                               f"question, and this client function trained {len(heard)} times; use dp_sgd with noise: "
                               "local")
    ints = placed(layer, reply, heard[0], client)
    if layer.noise == "shared":
        coins = layer.coins(client)
        drawn = {k: torch.from_numpy(discrete_gaussian(coins, v.shape, share)) for k, v in ints.items()}
        noise = turns.noise(book, at, int(msg.get(OWN + "last", 0)), drawn)
        ints = {k: v + noise[k] for k, v in ints.items()}
    ring = {k: torch.from_numpy(v.numpy().astype(np.int64).astype(np.int32)) for k, v in ints.items()}
    return {**ring, OWN + "rate": float(round(heard[0].lr_sum * RATE))}


def _heard(layer: Any, msg: Any, client: Any) -> tuple[float, float, float]:
    """Scale, noise multiplier and share that the client was told; PayloadError where they would hide nothing."""
    if OWN + "scale" not in msg:
        raise PayloadError(f"client '{client.id}' was asked outside of a round of {layer.book}, where nothing hides "
                           "its rows")
    scale, least, z = float(msg[OWN + "scale"]), int(msg[LEAST]), float(msg[OWN + "noise"])
    if layer.noise_multiplier is not None and z < layer.noise_multiplier * (1 - 1e-9):
        raise PayloadError(f"client '{client.id}' was told noise_multiplier = {z:g}, and the run that it joined has "
                           f"{layer.noise_multiplier:g}")
    share = z * layer.clip_norm * scale / math.sqrt(max(1, least - layer.colluding))
    if not (math.isfinite(share) and 0 < scale * layer.clip_norm <= RING) or (layer.noise == "shared" and (
            share < layer.turns.finest or least <= layer.colluding)):
        raise PayloadError(f"client '{client.id}' was told scale = {scale:g} and least = {least}, with which its noise "
                           "hides nothing")
    return scale, z, share


def coins(layer: Any, client: Any) -> Coins:
    """What this client's next noise is drawn from."""
    book = client.memory.setdefault(layer.book, {})
    book["fits"] = book.get("fits", 0) + 1
    return Coins() if layer.seed is None else Coins.of(layer.seed, client.id, book["fits"])


def one_step(layer: Any, request: Any, client: Any, scale: float, rows: np.ndarray) -> Summed:
    """The same training as one sum over these rows; CompositionError for what is more than that."""
    if not isinstance(request, Fit):
        raise CompositionError(f"layer '{name_of(layer)}' with noise: {layer.noise} lets a client function train once "
                               f"and ask for nothing else, and this one asks for {type(request).__name__}")
    steps = 1 if layer._trial else len(request.plan)
    if steps != 1 or request.terms or request.moments is not False or len(request.rows) != client.n:
        raise CompositionError(f"{whole(layer)}, without penalties, other rows or an optimizer's state, "
                               f"and this method asks for {len(request.plan)} steps on {len(request.rows)} of "
                               f"{client.n} rows, {len(request.terms)} penalties; set local.steps: 1, "
                               f"local.batch_size to {client.n} or more, and use fedavg or fedavgm")
    own = {f.name: getattr(request, f.name) for f in fields(Fit)}
    if len(rows) < client.n:
        some = rows.tolist()
        own |= {"rows": [request.rows[i] for i in some], "side": taken(request.side, some)}
    return Summed(**{**own, "plan": [np.arange(len(rows))]}, clip_norm=layer.clip_norm, scale=scale)


def placed(layer: Any, reply: Mapping[str, Any], got: Clipped, client: Any) -> dict[str, Tensor]:
    """The sums under the keys of the reply; CompositionError where the reply is not the change that was trained."""
    tree = {k: v for k, v in reply.items() if k not in ("n", "loss") and not k.startswith("note/")}
    out: dict[str, Tensor] = {}
    for key, v in tree.items():
        name = key.partition("/")[2]
        if not isinstance(v, Tensor) or name not in got.sums or not _is_change(v, got, name):
            raise CompositionError(f"layer '{name_of(layer)}' sends the clipped sum of gradients in the place of "
                                   f"the change of what was trained, and '{key}' is something else; use noise: local")
        out[WHOLE + key] = got.sums[name]
    if len(out) != len(got.sums):
        raise CompositionError(f"layer '{name_of(layer)}': {len(got.sums)} tensors were trained and {len(out)} of "
                               "them are sent; what is trained must be sent once, or use noise: local")
    if reply.get("n", client.n) != client.n:
        raise CompositionError(f"layer '{name_of(layer)}' weighs every row alike, and this method weighs its "
                               f"{client.n} rows as {reply['n']}; set method.weighting: n, or noise: local")
    return out


def _is_change(v: Tensor, got: Clipped, name: str) -> bool:
    change = got.theta[name] - got.start[name]
    return v.shape == change.shape and torch.allclose(v, change.to(v.dtype), rtol=1e-4, atol=1e-7)
