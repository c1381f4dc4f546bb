"""Example-level DP at the client: DP-SGD under any method that trains by gradients, whoever the server is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.form import MOST, need
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.core.sums import WHOLE, is_control, need_sums
from fedllm.local.private import Private
from fedllm.local.requests import Fit
from fedllm.privacy import _share, _shared
from fedllm.privacy._clip import fresh_secret
from fedllm.privacy._discrete import Coins
from fedllm.privacy._turns import Every
from fedllm.privacy.accountant import (
    Ledger,
    Release,
    check_budget,
    check_delta,
    check_reach,
    noise_for,
    rounds_for,
    usual_delta,
)

BOOK = "dp_sgd"
CLOSED = _shared.CLOSED.format("dp_sgd")
LEAST, LOUDEST = 1e-3, 1e6
"""Noise multipliers that a ledger holds: with less noise an epsilon is a number in the millions, and no promise."""


@dataclass(frozen=True)
class DPSGD(Knobs, Layer):
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133) inside `client.fit`.

    Unit: one training row, against everybody, the server included. Batches are drawn by coins (Poisson, with
    probability batch_size / rows) from the operating system's randomness; the optimizer's step on the noisy gradient,
    penalties on the trainables, and all that the server does later are post-processing. Training losses are not told.
    How many rows a client has is taken as public. Every client keeps its own ledger over the whole run; clients hold
    different rows, so the run's epsilon is the largest of theirs.

    With `noise: shared` (Kairouz, Liu and Steinke 2021, arXiv 2102.06387) a round is one step of gradient descent on
    all rows: under `secagg` or `secagg_plus` each client adds a share of discrete noise to its clipped sum, so that the
    whole of it is in the opened sum when the fewest clients answer whose sum opens, `colluding` of them know their
    shares, and the server follows the protocol. `noise: central` has the server add the same noise by itself
    (`privacy._shared`).
    """

    by_example = True
    secrets = ("secret",)
    book = BOOK
    turns = Every()

    noise_multiplier: float | None = knob(None, "noise / clip; None: from epsilon, the rounds and local steps",
                                         ge=LEAST, le=LOUDEST)
    clip_norm: float = knob(1.0, "largest L2 norm of one example's gradient over all trainables", gt=0)
    epsilon: float | None = knob(None, "budget of every client; the run stops before exceeding it", gt=0)
    delta: float | None = knob(None, "None: 1e-5, or (rows of the largest client) ** -1.1 if less", gt=0, lt=1)
    noise: Literal["local", "shared", "central"] = knob(
        "local", "local: each client's own steps carry all of it; shared: one step a round, each client adds a share "
                 "under a secure sum; central: the server adds it", options=("local", "shared", "central"))
    colluding: int = knob(0, "shared: clients that may tell the server their share of the noise", ge=0)
    seed: int | None = knob(None, "seeds noise and sampling for tests, which voids the claim; None: from the OS")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)
        object.__setattr__(self, "_facts", Facts())
        object.__setattr__(self, "_trial", False)

    @property
    def algebra(self) -> Algebra:  # type: ignore[override]
        instead = "dp_fedavg, which clips and noises what the method sends"
        if self.noise == "local":
            return Algebra("dp", instead=instead)
        return Algebra("dp", needs="sum", whole=True, shares=self.noise == "shared", instead=instead)

    @property
    def session(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.noise == "local" else (_shared.OWN + "scale",)

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.noise == "local" else (WHOLE, _shared.OWN + "rate")

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        _shared.check_fits(self, method)
        if self.noise != "local":
            need_sums(self, method, reducers)
            _shared.check_method(self, method, reducers)

    def init(self) -> dict[str, Any]:
        secret = {"secret": fresh_secret()} if self.noise == "central" else {}
        return {"clients": {}, "open": {}, "trains": {}, **secret}

    def bind(self, facts: Facts) -> DPSGD:
        """Noise from the budget: the client with the fewest rows spends the most, as its rows are drawn most often."""
        if self.noise != "local":
            if self.colluding and self.noise == "central":
                raise RecipeError(f"DPSGD.colluding = {self.colluding} is for noise: shared, where clients know their "
                                  "share")
            return _shared.bind(self, facts)  # type: ignore[no-any-return]
        most = max(facts.rows.values(), default=2)
        if self.delta is not None:
            check_delta(self.delta, most, self)
        bound = replace(self, delta=self.delta or usual_delta(most))
        if bound.noise_multiplier is None:
            assert bound.epsilon is not None and bound.delta is not None
            rows = min(facts.rows.values())
            steps = facts.local.count(rows) * facts.rounds
            z = noise_for(bound.epsilon, bound.delta, steps, "poisson", min(1.0, facts.local.lot / rows))
            bound = replace(bound, noise_multiplier=z)
        object.__setattr__(bound, "_facts", facts)
        if facts.rows and (cost := bound._cost(min(facts.rows, key=lambda c: facts.rows[c]), {})):
            check_reach(bound, cost[0], bound.delta or 1e-5, cost[1])
        return bound

    def foresee(self, facts: Facts) -> dict[str, Any]:
        """Of the client that spends most: the one with the fewest rows, if it is asked in every round."""
        if self.noise != "local":
            return _shared.foresee(self, facts)
        poorest = min(facts.rows, key=lambda c: facts.rows[c])
        release, steps = self._cost(poorest, {}) or (Release(1.0), 0)
        delta, ledger = self.delta or 1e-5, Ledger({})
        ledger.book(release, steps * facts.rounds)
        fits = None if self.epsilon is None else rounds_for(self.epsilon, delta, release) // max(1, steps)
        return {"layer": "dp_sgd", "unit": "example", "noise_multiplier": self.noise_multiplier, "delta": delta,
                "epsilon": ledger.epsilon(delta), "rounds_that_fit": fits}

    def unlimited(self) -> DPSGD:
        return _shared.free(self)  # type: ignore[no-any-return]

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        if self.noise != "local":
            return (yield from _shared.server(self, ask, state))
        known, name = state.setdefault("trains", {}), f"{type(ask.fn.__self__).__name__}.{ask.fn.__name__}"
        for c in ask.msgs:
            if known.get(name) != 0:  # what never trained is foreseen to cost nothing; clients hold to it (_private)
                self._afford(c, state)
            state["open"][c] = state["open"].get(c, 0) + 1  # paid even if the round fails and memories are rolled back
        out = yield ask
        books = yield Ask(self.account, {c: {} for c in out.answered}, quorum=1)
        for c, reply in books.items():
            made = sum(row[-1] for row in reply["rows"]) - sum(row[-1] for row in state["clients"].get(c, []))
            known[name] = max(known.get(name, 0), made)
            state["clients"][c] = [list(row) for row in reply["rows"]]
            state["open"].pop(c, None)
        return out

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if self.noise != "local":
            return _share.client(self, fn, msg, client, call)
        if not fn.__dict__.get("runs_on_client") or isinstance(fn.__self__, Layer):
            return call(msg)
        with client.through(lambda request: self._private(request, client), CLOSED):
            reply = dict(call(msg))
        reply.pop("loss", None)  # the training loss is a release without noise
        return reply

    def fits(self, msg: Any, reply: Any) -> None:
        """Rows of a ledger: [noise_multiplier, sampling, rate, population, count]."""
        for row in reply["rows"]:
            need(isinstance(row, list | tuple) and len(row) == 5 and row[1] in ("none", "poisson", "fixed")
                 and not any(isinstance(x, str | list | tuple) for x in (row[0], *row[2:]))
                 and LEAST <= row[0] <= LOUDEST and 0 < row[2] <= 1 and 0 <= row[3] <= MOST
                 and isinstance(row[4], int) and 0 <= row[4] <= MOST, f"'rows' holds {row!r:.80}, no row of a ledger")

    @on_client(gives="rows: layout", fits=fits)
    def account(self, msg: Any, client: Any) -> dict[str, Any]:
        """What this client has released over the whole run: rates and counts, which say nothing about its rows."""
        return {"rows": [list(row) for row in client.memory.get(BOOK, {}).get("releases", [])]}

    def statement(self, state: Any) -> dict[str, Any]:
        if self.noise != "local":
            return _shared.statement(self, state)
        delta, void = self.delta or 1e-5, []
        if self.seed is not None:
            void.append("DPSGD.seed is set, so whoever knows the recipe can take the noise off")
        each = {}
        for c in sorted({*state["clients"], *state["open"]}):
            ledger = Ledger({"releases": [list(r) for r in state["clients"].get(c, [])]})
            missing = state["open"].get(c, 0)
            if missing and (cost := self._cost(c, state)):
                ledger.book(cost[0], cost[1] * missing)
            elif missing:
                void.append(f"client '{c}' was asked {missing} times without telling what it released")
            each[c] = ledger.epsilon(delta)
        worst = float("inf") if void else max(each.values(), default=0.0)
        return {"layer": "dp_sgd", "unit": "example", "epsilon": worst, "delta": delta,
                "clients": each, "adjacency": "one training row more or less", "sampling": "poisson",
                "noise_multiplier": self.noise_multiplier, "clip": self.clip_norm, "void": void,
                "not_covered": "how many rows a client has; evaluation on held-out rows"}

    def coins(self, client: Any) -> Coins:
        """What this client's next noise is drawn from."""
        return _share.coins(self, client)

    def _private(self, request: Any, client: Any) -> Any:
        """The same training on Poisson batches, clipped and noised, and booked."""
        if not isinstance(request, Fit):
            raise CompositionError(CLOSED)
        if self.noise_multiplier is None:
            raise RecipeError("DPSGD.noise_multiplier is unknown: with epsilon alone, bind the layer first")
        n, steps = len(request.rows), len(request.plan)
        rate = min(1.0, request.spec.lot / n)
        book = client.memory.setdefault(BOOK, {})
        release = Release(self.noise_multiplier, "poisson" if rate < 1 else "none", rate, 0)
        Ledger(book).afford(release, self.epsilon, self.delta or 1e-5, count=steps)
        client.spend(release, steps)
        Ledger(book).book(release, steps)
        book["fits"] = book.get("fits", 0) + 1
        key = (self.seed, client.id, book["fits"])
        coins = np.random.default_rng(secrets.randbits(128)) if self.seed is None else numpy_stream(*key, "batches")
        noise = (torch.Generator().manual_seed(secrets.randbits(63)) if self.seed is None
                 else torch_stream(*key, "noise"))
        plan = [np.flatnonzero(coins.random(n) < rate) for _ in range(steps)]
        return replace(request, plan=plan, private=Private(self.clip_norm, self.noise_multiplier, rate * n, noise))

    def _cost(self, client: str, state: Mapping[str, Any]) -> tuple[Release, int] | None:
        """What one more round will cost this client: as the recipe has it train, or as it last did."""
        rows, z = self._facts.rows.get(client), self.noise_multiplier  # type: ignore[attr-defined]
        if not rows or not z:
            return None
        if self.noise != "local":
            return self.turns.release(z), 1
        local = self._facts.local  # type: ignore[attr-defined]
        rate = min(1.0, local.lot / rows)
        return Release(z, "poisson" if rate < 1 else "none", rate, 0), local.count(rows)

    def _afford(self, client: str, state: Mapping[str, Any]) -> None:
        if self.epsilon is None or not (cost := self._cost(client, state)):
            return
        ledger = Ledger({"releases": [list(r) for r in state["clients"].get(client, [])]})
        if waiting := state["open"].get(client, 0):
            ledger.book(cost[0], cost[1] * waiting)
        ledger.afford(cost[0], self.epsilon, self.delta or 1e-5, count=cost[1])
