"""One noisy sum of clipped gradients a round, for `dp_sgd` with `noise: shared` or `central` and for `dp_ftrl` with
`unit: example`: the server's half. The client's is `_share`.

What leaves a client is a vector of whole numbers, G_k = sum over its rows of trunc(s g_i min(1, C / ||g_i||)), and
under `shared` its share of discrete noise beside it, mod 2^32. A row moves the sum by at most s C, rounding included;
weights and the learning rate come after. Which rows, and how one round's noise hangs together with another's: `_turns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import Facts, name_of
from fedllm.core.payload import digest
from fedllm.core.reduce import Lifted, Mean
from fedllm.core.sums import EVALUATION, LEAST, SMALLEST, WHOLE, must_lift
from fedllm.privacy._discrete import Coins, discrete_gaussian
from fedllm.privacy.accountant import Ledger, check_delta, check_reach, noise_for, rounds_for

OWN = "_step/"
RATE = 1e9
"""Learning rates are added up as whole billionths."""
RING = 2.0**31
FAR = 16
"""Standard deviations of noise that the ring has room for beside the clipped sum: more never happens (1e-56)."""
MORE = "a round under {} is one step of gradient descent on {} of each client"
CLOSED = ("layer '{}' lets a client function learn from its rows through client.fit only, and this one reads the "
          "rows or their losses, so they do not fit together; use dp_fedavg, or a method that only trains (fedavg)")


@dataclass(frozen=True)
class Terms:
    """What a round's clients are told, and what follows from it."""

    least: int
    """Clients whose noise is in every sum that is opened."""
    scale: float
    """Quanta per 1."""
    share: float
    """Standard deviation of one client's noise, in quanta; under `central` of all of it."""


def need_company(layer: Any, count: int) -> None:
    """CompositionError for a sum over so few clients that it hides nobody."""
    if count < SMALLEST:
        raise CompositionError(f"{name_of(layer)} hides a client among at least {SMALLEST} and {count} take part; ask "
                               "more clients (clients.per_round), or use dp_fedavg alone")


def whole(layer: Any) -> str:
    """What a round is under this layer, in words."""
    rows = "all rows" if layer.turns.parts == 1 else f"one in {layer.turns.parts} of the rows"
    return MORE.format(f"{name_of(layer)} with noise: {layer.noise}", rows)


def check_fits(layer: Any, method: Any) -> None:
    """CompositionError for a method that reads rows beside training on them."""
    if not method.only_fits:
        raise CompositionError(f"{CLOSED.format(name_of(layer))}; method '{name_of(method)}' does so")


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
                f"layer '{name_of(layer)}' with noise: {layer.noise} sends the clipped sum of gradients in the place "
                f"of a mean change weighed by rows, and '{type(method).__name__}.{name}' sends something else; fedavg, "
                "fedavgm, fedadam, fedit and ffa_lora work, or dp_sgd with noise: local")


def bind(layer: Any, facts: Facts) -> Any:
    """The layer with noise from its budget, and refused where the run is not what it can protect."""
    bound = replace(layer, delta=layer.delta or 1e-5)
    object.__setattr__(bound, "_facts", facts)
    turns = bound.turns
    if bound.noise_multiplier is None:
        times = math.ceil(max(1, facts.rounds) / turns.parts)
        z = noise_for(bound.epsilon, bound.delta, times, law="discrete") * turns.sensitivity
        bound = replace(bound, noise_multiplier=z)
        object.__setattr__(bound, "_facts", facts)
    check_facts(bound, facts)
    check_reach(bound, turns.release(bound.noise_multiplier), bound.delta)
    return bound


def free(layer: Any) -> Any:
    """The bound layer without its budget, for a plan's trial of rounds that may have more steps than the run's."""
    out = replace(layer, epsilon=None)
    object.__setattr__(out, "_facts", layer._facts)
    object.__setattr__(out, "_trial", True)
    return out


def check_facts(layer: Any, facts: Facts) -> None:
    """RecipeError for training that is more than one step on all rows, for too many colluders, or too large a delta."""
    local, why, parts = facts.local, whole(layer), layer.turns.parts
    if local is not None:
        plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None}
        for key, only in plain.items():
            if getattr(local, key) != only:
                raise RecipeError(f"local.{key} = {getattr(local, key)!r} is not allowed: {why}; allowed is {only!r} "
                                  "(fedavgm and fedadam have momentum at the server)")
        most = max(facts.rows.values(), default=1)
        if local.lot < (least := -(-most // parts)) and not facts.guessed:
            raise RecipeError(f"local.batch_size = {local.batch_size} is not allowed: a client has {most} rows, a part "
                              f"of them would be a sampling that the accountant of discrete noise does not cover, and "
                              f"{why}; set it to {least} or more (memory does not depend on it)")
        if (steps := local.count(most)) != 1 and not facts.guessed:
            raise RecipeError(f"local.steps or local.epochs, {steps} steps a round, is not allowed: {why}; set steps: "
                              "1 and take more rounds")
    if layer.delta is not None and not facts.guessed:
        check_delta(layer.delta, sum(facts.rows.values()), layer)
    if (few := min(facts.rows.values(), default=parts)) < parts:
        raise RecipeError(f"{type(layer).__name__}.restart_every = {parts} is not allowed: a client has {few} rows, "
                          f"and a round reads one in {parts} of them, so that some would read none; set it to {few} or "
                          "less: noise then starts anew more often, at a price that the plan tells")
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
    count, turns = len(asked), layer.turns
    least = ring.needed(count) if layer.noise == "shared" and ring is not None else 1  # type: ignore[attr-defined]
    if layer.noise == "shared" and layer.colluding >= least:
        raise RecipeError(f"{type(layer).__name__}.colluding = {layer.colluding} is not allowed: a sum opens when "
                          f"{least} of {count} clients have answered, and of these one at least must not collude; "
                          f"allowed is {least - 1} at most, or raise the threshold of the secure sum, or ask more "
                          "clients")
    honest = max(1, least - layer.colluding)
    z = layer.noise_multiplier or 1.0
    spread = z * layer.clip_norm * (math.sqrt(count / honest) if layer.noise == "shared" else 1.0)
    rows = sum(turns.count(facts.rows.get(c, 0), 1) for c in asked) or 1
    room = rows * layer.clip_norm + FAR * spread * math.sqrt(turns.draws)
    scale = 2.0 ** math.floor(math.log2((RING - 1) / room))
    share = z * layer.clip_norm * scale / math.sqrt(honest)
    if share < turns.finest and layer.noise_multiplier is not None and not facts.guessed:  # there the client looks
        raise RecipeError(f"{type(layer).__name__}.noise_multiplier = {z:g} is not allowed over {rows} rows: their sum "
                          f"leaves the ring of 2^32 a grid on which a client's noise is {share:.3g} quanta wide, and "
                          f"the accountant wants {turns.finest:.3g}; take more noise or fewer clients a round")
    return Terms(least, scale, share)


def server(layer: Any, ask: Any, state: Any) -> Any:
    """Pay, ask for sums, and make the mean step of them."""
    facts, asked, turns = layer._facts, list(ask.msgs), layer.turns
    must_lift(ask, layer)
    if layer.noise_multiplier is None or not facts.rows:
        raise RecipeError(f"{name_of(layer)}.noise_multiplier or the clients' rows are unknown: bind the layer first")
    t, at = terms(layer, facts, asked), state.get("asked", 0) + 1
    for c in asked:
        if turns.due(state, c, at):
            pay(layer, c, state)
    state["asked"] = at
    tell = {OWN + "scale": t.scale, OWN + "noise": float(layer.noise_multiplier), OWN + "round": at, LEAST: t.least}
    out = yield replace(ask, msgs={c: {**m, **tell, **{OWN + k: v for k, v in turns.told(state, c, at).items()}}
                                   for c, m in ask.msgs.items()}, reduce=Lifted(), form=ask.lifted())
    turns.heard(state, out.answered, at)
    total = dict(out.value)
    rate = total.pop(OWN + "rate") / RATE / len(out.answered)
    if layer.noise == "central":
        secret = state["secret"] if layer.seed is None else layer.seed
        coins = Coins.of(secret, ask.phase, state["asked"], digest(total))
        total = {k: v.long() + torch.from_numpy(discrete_gaussian(coins, v.shape, t.share)) for k, v in total.items()}
    rows = sum(turns.count(facts.rows[c], at) for c in out.answered)  # public: the divisor says nothing about any row
    like = {k.rpartition("/")[2]: v.dtype for m in ask.msgs.values() for k, v in m.items() if isinstance(v, Tensor)}
    value: dict[str, Any] = {"n": float(rows)}
    for key, v in total.items():  # Delta = -eta G / (s N)
        kind = like.get(key.rpartition("/")[2], torch.float32)
        value[key.removeprefix(WHOLE)] = (v.double() * (-rate / (t.scale * rows))).to(kind)
    return replace(out, value=value)


def pay(layer: Any, client: str, state: Any) -> None:
    """Book one release for the rows of this client, before it is asked: paid even if the round fails."""
    book = {"releases": [list(r) for r in state["clients"].get(client, [])]}
    ledger, release = Ledger(book), layer.turns.release(layer.noise_multiplier)
    ledger.afford(release, layer.epsilon, layer.delta)
    ledger.book(release)
    state["clients"][client] = ledger.rows


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
        ledger.book(layer.turns.release(z), count)
        out[str(t)] = ledger.epsilon(delta)
    return out


def noise_share(layer: Any, size: int) -> float:
    """The noise of a run's steps together by the longest that these could be: sqrt(d) z / (N sqrt(T)), in clips, where
    each has noise of its own.

    Above about 0.3, what is learned is noise. It falls with more rows and fewer trainables, and hardly with rounds,
    since z grows as sqrt(T) does.
    """
    facts, turns = layer._facts, layer.turns
    asked, rounds = largest(facts), max(1, facts.rounds)
    t, rows = terms(layer, facts, asked), sum(facts.rows[c] for c in asked) / turns.parts
    spread = t.share / t.scale * math.sqrt(len(asked) if layer.noise == "shared" else 1)
    return math.sqrt(size * turns.left(rounds)) * spread / (layer.clip_norm * rows * rounds)


def foresee(layer: Any, facts: Facts) -> dict[str, Any]:
    """What the bound layer expects of a whole run, to a row of a client that is asked in every round."""
    delta, ledger, turns = layer.delta or 1e-5, Ledger({}), layer.turns
    release, times = turns.release(layer.noise_multiplier), math.ceil(facts.rounds / turns.parts)
    ledger.book(release, times)
    fits = None if layer.epsilon is None else rounds_for(layer.epsilon, delta, release) * turns.parts
    seen = {"sees": sees(layer, delta, times)} if layer.noise == "shared" else {}
    share = {"noise_share": noise_share(layer, facts.size)} if facts.size else {}
    return {"layer": layer.book, "unit": "example", "noise_multiplier": layer.noise_multiplier, "delta": delta,
            "epsilon": ledger.epsilon(delta), "rounds_that_fit": fits, **seen, **share}


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


def statement(layer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the layer says of a run: the largest epsilon of a client's rows, since clients hold different ones."""
    delta = layer.delta or 1e-5
    void = [] if layer.seed is None else [
        f"{name_of(layer)}.seed is set, so whoever knows the recipe can take the noise off"]
    each = {c: Ledger({"releases": [list(r) for r in rows]}).epsilon(delta)
            for c, rows in sorted(state["clients"].items())}
    return {"layer": layer.book, "unit": "example", "delta": delta, "clients": each, "void": void,
            "epsilon": math.inf if void else max(each.values(), default=0.0),
            "adjacency": "one training row more or less", "noise_multiplier": layer.noise_multiplier,
            "clip": layer.clip_norm, **says(layer, state, delta)}
