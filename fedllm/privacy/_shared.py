"""One noisy sum of clipped gradients a round: both halves of `dp_sgd` with `noise: shared` or `central`.

What leaves a client is a vector of whole numbers, G_k = sum over its rows of trunc(s g_i min(1, C / ||g_i||)), and
under `shared` its share of discrete noise beside it, mod 2^32. A row moves the sum by at most s C, rounding included;
weights and the learning rate come after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import digest
from fedllm.core.reduce import Lifted, Mean
from fedllm.core.sums import EVALUATION, LEAST, WHOLE, must_lift, without
from fedllm.local.requests import Fit
from fedllm.local.summed import Clipped, Summed
from fedllm.privacy._discrete import Coins, discrete_gaussian
from fedllm.privacy.accountant import Ledger, Release, check_delta

OWN = "_step/"
RATE = 1e9
"""Learning rates are added up as whole billionths."""
RING = 2.0**31
FAR = 16
"""Standard deviations of noise that the ring has room for beside the clipped sum: more never happens (1e-56)."""
FINEST = 8.0
"""Quanta of a share's standard deviation below which a sum of shares would no longer be as good as a Gaussian."""
MORE = "a round under noise: {} is one step of gradient descent on all rows of each client"


@dataclass(frozen=True)
class Terms:
    """What a round's clients are told, and what follows from it."""

    least: int
    """Clients whose noise is in every sum that is opened."""
    scale: float
    """Quanta per 1."""
    share: float
    """Standard deviation of one client's noise, in quanta; under `central` of all of it."""


def check_method(layer: Any, method: Any, reducers: Mapping[str, Any]) -> None:
    """CompositionError unless what the method sends is the change of what it trained, weighed by rows."""
    for name, reducer in reducers.items():
        marks = getattr(getattr(type(method), name, None), "__dict__", {})
        form = marks.get("form")
        if marks.get("test") or name in EVALUATION:
            continue
        trees = [] if form is None else [p for p, kind in form.parts.items() if kind in ("tree", "tensors", "some")]
        rest = set() if form is None else set(form.parts) - {*trees, "n", "loss"}
        if reducer != Mean() or len(trees) != 1 or rest:
            raise CompositionError(
                f"layer 'DPSGD' with noise: {layer.noise} sends the clipped sum of gradients in the place of a mean "
                f"change weighed by rows, and '{type(method).__name__}.{name}' sends something else; fedavg, fedavgm, "
                "fedadam, fedit and ffa_lora work, or noise: local")


def check_facts(layer: Any, facts: Facts) -> None:
    """RecipeError for training that is more than one step on all rows, for too many colluders, or too large a delta."""
    local, why = facts.local, MORE.format(layer.noise)
    if local is not None:
        plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None}
        for key, only in plain.items():
            if getattr(local, key) != only:
                raise RecipeError(f"local.{key} = {getattr(local, key)!r} is not allowed: {why}; allowed is {only!r} "
                                  "(fedavgm and fedadam have momentum at the server)")
        most = max(facts.rows.values(), default=1)
        if local.lot < most and not facts.guessed:
            raise RecipeError(f"local.batch_size = {local.batch_size} is not allowed: a client has {most} rows, a part "
                              f"of them would be a sampling that the accountant of discrete noise does not cover, and "
                              f"{why}; set it to {most} or more (memory does not depend on it)")
        if (steps := local.count(most)) != 1 and not facts.guessed:
            raise RecipeError(f"local.steps or local.epochs, {steps} steps a round, is not allowed: {why}; set steps: "
                              "1 and take more rounds")
    if layer.delta is not None and not facts.guessed:
        check_delta(layer.delta, sum(facts.rows.values()))
    if layer.colluding and layer.noise != "shared":
        raise RecipeError(f"DPSGD.colluding = {layer.colluding} is for noise: shared, where clients know their share")
    if layer.noise == "shared":
        terms(layer, facts, largest(facts))


def largest(facts: Facts) -> list[str]:
    """The cohort with the most rows, for which the ring is narrowest."""
    return sorted(facts.rows, key=lambda c: -facts.rows[c])[: facts.cohort or len(facts.rows)]


def terms(layer: Any, facts: Facts, asked: Sequence[str]) -> Terms:
    """How this round's noise is shared out, and how fine the grid is: the finest on which the sum cannot overflow.

    Each of `least` - t clients that do not collude adds N_Z(0, (z C s)^2 / (least - t)).
    """
    ring = next((x for x in facts.below if x.algebra.ring), None)
    count = len(asked)
    least = ring.needed(count) if layer.noise == "shared" and ring is not None else 1  # type: ignore[attr-defined]
    if layer.noise == "shared" and layer.colluding >= least:
        raise RecipeError(f"DPSGD.colluding = {layer.colluding} is not allowed: a sum opens when {least} of {count} "
                          f"clients have answered, and of these one at least must not collude; allowed is {least - 1} "
                          "at most, or raise the threshold of the secure sum, or ask more clients")
    honest = max(1, least - layer.colluding)
    z = layer.noise_multiplier or 1.0
    spread = z * layer.clip_norm * (math.sqrt(count / honest) if layer.noise == "shared" else 1.0)
    rows = sum(facts.rows.get(c, 0) for c in asked) or 1
    scale = 2.0 ** math.floor(math.log2((RING - 1) / (rows * layer.clip_norm + FAR * spread)))
    share = z * layer.clip_norm * scale / math.sqrt(honest)
    if share < FINEST and layer.noise_multiplier is not None:
        raise RecipeError(f"DPSGD.noise_multiplier = {z:g} is not allowed over {rows} rows: their sum leaves the ring "
                          f"of 2^32 a grid on which a client's noise is {share:.3g} quanta wide, and the accountant "
                          f"wants {FINEST:g}; take more noise or fewer clients a round")
    return Terms(least, scale, share)


def release(layer: Any) -> Release:
    """One round, to one row."""
    return Release(layer.noise_multiplier, law="discrete")


def server(layer: Any, ask: Any, state: Any) -> Any:
    """Pay, ask for sums, and make the mean step of them."""
    facts, asked = layer._facts, list(ask.msgs)
    must_lift(ask, layer)
    if layer.noise_multiplier is None or not facts.rows:
        raise RecipeError("DPSGD.noise_multiplier or the clients' rows are unknown: bind the layer first")
    t = terms(layer, facts, asked)
    for c in asked:
        pay(layer, c, state)
    state["asked"] = state.get("asked", 0) + 1
    tell = {OWN + "scale": t.scale, OWN + "noise": float(layer.noise_multiplier), LEAST: t.least}
    out = yield replace(ask, msgs={c: {**m, **tell} for c, m in ask.msgs.items()}, reduce=Lifted(), form=ask.lifted())
    total = dict(out.value)
    rate = total.pop(OWN + "rate") / RATE / len(out.answered)
    if layer.noise == "central":
        secret = state["secret"] if layer.seed is None else layer.seed
        coins = Coins.of(secret, ask.phase, state["asked"], digest(total))
        total = {k: v.long() + torch.from_numpy(discrete_gaussian(coins, v.shape, t.share)) for k, v in total.items()}
    rows = sum(facts.rows[c] for c in out.answered)  # public: the divisor says nothing about any row
    like = {k.rpartition("/")[2]: v.dtype for m in ask.msgs.values() for k, v in m.items() if isinstance(v, Tensor)}
    value: dict[str, Any] = {"n": float(rows)}
    for key, v in total.items():  # Delta = -eta G / (s N)
        kind = like.get(key.rpartition("/")[2], torch.float32)
        value[key.removeprefix(WHOLE)] = (v.double() * (-rate / (t.scale * rows))).to(kind)
    return replace(out, value=value)


def pay(layer: Any, client: str, state: Any) -> None:
    """Book one release for the rows of this client, before it is asked: paid even if the round fails."""
    book = {"releases": [list(r) for r in state["clients"].get(client, [])]}
    ledger = Ledger(book)
    ledger.afford(release(layer), layer.epsilon, layer.delta)
    ledger.book(release(layer))
    state["clients"][client] = ledger.rows


def client(layer: Any, msg: Any, client: Any, call: Any, closed: str) -> dict[str, Any]:
    """The clipped sum of this client's rows, and its share of the noise, mod 2^32."""
    if OWN + "scale" not in msg:
        raise PayloadError(f"client '{client.id}' was asked outside of a round of dp_sgd, where nothing hides its rows")
    scale, least = float(msg[OWN + "scale"]), int(msg[LEAST])
    z = float(msg[OWN + "noise"])
    if layer.noise_multiplier is not None and z < layer.noise_multiplier * (1 - 1e-9):
        raise PayloadError(f"client '{client.id}' was told noise_multiplier = {z:g}, and the run that it joined has "
                           f"{layer.noise_multiplier:g}")
    share = z * layer.clip_norm * scale / math.sqrt(max(1, least - layer.colluding))
    if not (math.isfinite(share) and 0 < scale <= RING) or (layer.noise == "shared" and (
            share < FINEST or least <= layer.colluding)):
        raise PayloadError(f"client '{client.id}' was told scale = {scale:g} and least = {least}, with which its noise "
                           "hides nothing")
    heard: list[Clipped] = []
    with client.through(lambda request: one_step(layer, request, client, scale), closed, heard.append):
        reply = dict(call(without(without(msg, OWN), LEAST)))
    if len(heard) != 1:
        raise CompositionError(f"layer 'DPSGD' with noise: {layer.noise} releases one gradient for each question, and "
                               f"this client function trained {len(heard)} times; use noise: local")
    client.spend(Release(z, law="discrete"))
    ints = placed(reply, heard[0], client)
    if layer.noise == "shared":
        coins = layer.coins(client)
        ints = {k: v + torch.from_numpy(discrete_gaussian(coins, v.shape, share)) for k, v in ints.items()}
    ring = {k: torch.from_numpy(v.numpy().astype(np.int64).astype(np.int32)) for k, v in ints.items()}
    return {**ring, OWN + "rate": float(round(heard[0].lr_sum * RATE))}


def one_step(layer: Any, request: Any, client: Any, scale: float) -> Summed:
    """The same training as one sum over all rows; CompositionError for what is more than that."""
    if not isinstance(request, Fit):
        raise CompositionError(f"layer 'DPSGD' with noise: {layer.noise} lets a client function train once and ask "
                               f"for nothing else, and this one asks for {type(request).__name__}")
    steps = 1 if layer._trial else len(request.plan)
    if steps != 1 or request.terms or request.moments is not False or len(request.rows) != client.n:
        raise CompositionError(f"{MORE.format(layer.noise)}, without penalties, other rows or an optimizer's state, "
                               f"and this method asks for {len(request.plan)} steps on {len(request.rows)} of "
                               f"{client.n} rows, {len(request.terms)} penalties; set local.steps: 1, "
                               f"local.batch_size to {client.n} or more, and use fedavg or fedavgm")
    own = {f.name: getattr(request, f.name) for f in fields(Fit)}
    return Summed(**{**own, "plan": [np.arange(client.n)]}, clip_norm=layer.clip_norm, scale=scale)


def placed(reply: Mapping[str, Any], got: Clipped, client: Any) -> dict[str, Tensor]:
    """The sums under the keys of the reply; CompositionError where the reply is not the change that was trained."""
    tree = {k: v for k, v in reply.items() if k not in ("n", "loss") and not k.startswith("note/")}
    out: dict[str, Tensor] = {}
    for key, v in tree.items():
        name = key.partition("/")[2]
        if not isinstance(v, Tensor) or name not in got.sums or not _is_change(v, got, name):
            raise CompositionError(f"layer 'DPSGD' sends the clipped sum of gradients in the place of the change of "
                                   f"what was trained, and '{key}' is something else; use noise: local")
        out[WHOLE + key] = got.sums[name]
    if len(out) != len(got.sums):
        raise CompositionError(f"layer 'DPSGD': {len(got.sums)} tensors were trained and {len(out)} of them are sent; "
                               "what is trained must be sent once, or use noise: local")
    if reply.get("n", client.n) != client.n:
        raise CompositionError(f"layer 'DPSGD' weighs every row alike, and this method weighs its {client.n} rows as "
                               f"{reply['n']}; set method.weighting: n, or noise: local")
    return out


def _is_change(v: Tensor, got: Clipped, name: str) -> bool:
    change = got.theta[name] - got.start[name]
    return v.shape == change.shape and torch.allclose(v, change.to(v.dtype), rtol=1e-4, atol=1e-7)


def sees(layer: Any, delta: float, count: int) -> dict[str, float]:
    """Epsilon after so many rounds against the server and this many colluding clients, with the fewest answers."""
    facts = layer._facts
    if not count or not facts.rows:
        return {}
    least = terms(layer, facts, largest(facts)).least
    out = {}
    for t in sorted({0, layer.colluding, min(layer.colluding + 1, least - 1), least - 1}):
        z = layer.noise_multiplier * math.sqrt((least - t) / (least - layer.colluding))
        ledger = Ledger({})
        ledger.book(Release(z, law="discrete"), count)
        out[str(t)] = ledger.epsilon(delta)
    return out


def noise_share(layer: Any, size: int) -> float:
    """The noise of a run's mean steps by the longest that these could be together: sqrt(d) z / (N sqrt(T)), in clips.

    Above about 0.3, what is learned is noise. It falls with more rows and fewer trainables, and hardly with rounds,
    since z grows as sqrt(T) does.
    """
    facts = layer._facts
    asked = largest(facts)
    t, rows = terms(layer, facts, asked), sum(facts.rows[c] for c in asked)
    spread = t.share / t.scale * math.sqrt(len(asked) if layer.noise == "shared" else 1)
    return math.sqrt(size) * spread / (layer.clip_norm * rows * math.sqrt(max(1, facts.rounds)))


def says(layer: Any, state: Mapping[str, Any], delta: float) -> dict[str, Any]:
    """What the statement adds: whom the noise holds against, and what it does not."""
    out: dict[str, Any] = {"sampling": "none", "noise": layer.noise, "releases": state.get("asked", 0),
                           "not_covered": "how many rows a client has and who answered; evaluation on held-out rows; "
                                          "a round that is done again after a crash"}
    if layer.noise == "central":
        return out | {"holds against": "everyone but the server, which sees the sums before the noise"}
    count = max((sum(row[-1] for row in rows) for rows in state["clients"].values()), default=0)
    return out | {"holds against": f"a server that follows the protocol and {layer.colluding} clients that tell it "
                                   "their share of the noise; a client that adds none is one of these",
                  "sees": sees(layer, delta, count)}
