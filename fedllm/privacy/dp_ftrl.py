"""DP without random sampling, of clients or of rows: noise that hangs together over the rounds and mostly cancels in
their sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.ask import Ask, ClientId
from fedllm.core.card import Card, Claim
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer
from fedllm.core.payload import Tree, digest
from fedllm.core.reduce import Lifted
from fedllm.core.sums import WHOLE, is_control, must_lift, need_sums
from fedllm.privacy import _share, _shared, _turns
from fedllm.privacy._clip import OWN, UNCOVERED, contribution, fresh_secret, noise_stream, put_back, told
from fedllm.privacy._discrete import Coins
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


@dataclass(frozen=True)
class DPFTRL(Knobs, Layer):
    """DP-FTRL (Kairouz et al. 2021, arXiv 2103.00039), with the tree or with a banded matrix (Choquette-Choo et al.
    2023, 2306.08153; its square-root coefficients: Kalinin and Lampert 2024, 2405.13763).

    Unit: the client, clipped at home as under `dp_fedavg`, at a fixed clip. Round t adds xi_t to the clipped sum, such
    that the running sum of all rounds carries little noise; what the method's server does with the rounds is
    post-processing. No sampling is assumed: how often a client takes part is what the guarantee rests on, so this layer
    picks the cohort among those asked, who has waited longest first, and never asks anybody too soon:

    tree    once from one restart to the next; a contribution is in at most log2(rounds) + 1 nodes
    banded  at least `min_separation` rounds apart; with as many bands, no two contributions of a client share noise

    The live noise is in the layer's state, and is checkpointed: fresh noise after a restart would void the proof.

    With `unit: example` a training row is what is private, against everyone, as under `dp_sgd` with `noise: shared`: a
    round is one step on one in `restart_every` of each client's rows, each row is read once between restarts, and each
    client keeps a tree of its own, whose shares add up under `secagg` or `secagg_plus` (`privacy._turns.Tree`).
    """

    card = Card(
        title="DP-FTRL: client-level privacy without sampling, from correlated noise",
        paper="Kairouz et al., ICML 2021, arXiv 2103.00039; Choquette-Choo et al., NeurIPS 2023, arXiv 2306.08153",
        topic="privacy", sends="what the method sends, clipped", needs="a method whose reducer is a Sum",
        claim=Claim("at epsilon 4 over 256 rounds, each client once, running sums carry at most 0.6 of the noise that "
                    "independent noise of the same epsilon leaves in them", rig="prefix_noise",
                    metric="over_independent", holds="<=", threshold=0.6, options={"rounds": 256, "epsilon": 4.0}),
        evidence="The tree is the plain one: Google's library by default refines a node by those below it (Honaker's "
                 "estimator, `efficient_tree`), which has less noise at the same price and is not here.")
    secrets = ("secret", "phases")
    book = "dp_ftrl"
    noise = "shared"

    noise_multiplier: float | None = knob(None, "fresh noise of a round / clip; None: from epsilon and rounds. 0 adds "
                                                "none", ge=0)
    clip_norm: float = knob(0.1, "largest L2 norm of what a client adds, for the whole run", gt=0)
    mechanism: Literal["tree", "banded"] = knob("tree", "how noise is correlated", options=("tree", "banded"))
    unit: Literal["client", "example"] = knob(
        "client", "client: whole clients, and the server adds the noise; example: training rows, and each client adds "
                  "a share under a secure sum", options=("client", "example"))
    colluding: int = knob(0, "unit example: clients that may tell the server their share of the noise", ge=0)
    restart_every: int = knob(0, "rounds until noise starts anew, at a price of its own; 0: never", ge=0)
    min_separation: int = knob(1, "banded: rounds from one part of a client to its next, and number of bands", ge=1)
    cohort: int | None = knob(None, "clients used in a round; None: as many as can always be found", ge=1)
    epsilon: float | None = knob(None, "budget; the run stops before exceeding it", gt=0)
    delta: float | None = knob(None, "None: 1e-5, or (number of clients) ** -1.1 if less", gt=0, lt=1)
    seed: int | None = knob(None, "seeds the noise for tests, which voids the claim; None: from the OS")
    population: int = knob(0, "clients in the federation; found out by the run", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)
        if self.mechanism == "tree" and self.min_separation != 1:
            raise RecipeError(f"DPFTRL.min_separation = {self.min_separation} is not allowed with mechanism 'tree', "
                              "where a client takes part once between restarts; use restart_every, or 'banded'")
        given = {"mechanism": self.mechanism == "banded", "cohort": self.cohort is not None}
        if odd := [k for k, is_set in given.items() if is_set and self.unit == "example"]:
            raise RecipeError(f"DPFTRL.{odd[0]} = {getattr(self, odd[0])!r} is not allowed with unit 'example': "
                              "clients add up whole numbers of a tree, and all who are asked take part; leave it out")
        if self.colluding and self.unit == "client":
            raise RecipeError(f"DPFTRL.colluding = {self.colluding} is not allowed with unit 'client', where the "
                              "server adds the noise; leave it out, or set unit: example")
        object.__setattr__(self, "_facts", Facts())
        object.__setattr__(self, "_trial", False)

    @property
    def algebra(self) -> Algebra:  # type: ignore[override]
        instead = "dp_sgd, which works at the client under any method"
        rows = self.unit == "example"
        return Algebra("dp", needs="sum", whole=rows, shares=rows, instead=instead)

    @property
    def session(self) -> tuple[str, ...]:  # type: ignore[override]
        return (_shared.OWN + "scale",) if self.unit == "example" else (OWN + "clip",)

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (WHOLE, _shared.OWN + "rate") if self.unit == "example" else ()

    @property
    def by_example(self) -> bool:  # type: ignore[override]
        return self.unit == "example"

    @property
    def turns(self) -> _turns.Tree:
        """Which rows a round reads, and how its noise hangs together with the others'."""
        return _turns.Tree(max(1, self.restart_every))

    @property
    def apart(self) -> int:
        """Rounds in which a client takes part once at the most."""
        return self.restart_every if self.mechanism == "tree" else self.min_separation

    @property
    def bands(self) -> list[float]:
        """c_0, c_1, ...: the first coefficients of (1 - x)^(-1/2), whose square is the matrix of prefix sums."""
        rest = ((2 * j - 1) / (2 * j) for j in range(1, self.min_separation))
        return list(itertools.accumulate(rest, lambda c, r: c * r, initial=1.0))

    @property
    def sensitivity(self) -> float:
        """How far one client moves all of a span together, in clips."""
        if self.mechanism == "tree":
            return math.sqrt(self.restart_every.bit_length())  # one leaf is in at most ceil(log2(T + 1)) nodes
        parts = math.ceil(self.restart_every / self.min_separation)
        return math.sqrt(parts * sum(c * c for c in self.bands))  # columns that are `apart` share no row

    @property
    def one_part(self) -> float:
        """How far one answer moves what its span releases, in clips."""
        parts = 1 if self.mechanism == "tree" else math.ceil(self.restart_every / self.min_separation)
        return self.sensitivity / math.sqrt(parts)

    def init(self) -> dict[str, Any]:
        return {"clients": {}} if self.unit == "example" else {"secret": fresh_secret(), "phases": {}}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)
        if self.unit == "example":
            _shared.check_fits(self, method)
            _shared.check_method(self, method, reducers)

    def bind(self, facts: Facts) -> DPFTRL:
        if self.unit == "example":
            span = min(self.restart_every or facts.rounds, max(1, facts.rounds))
            return _shared.bind(replace(self, restart_every=span), facts)  # type: ignore[no-any-return]
        n, asked = len(facts.rows), min(facts.cohort or len(facts.rows), len(facts.rows))
        if self.delta is not None:
            check_delta(self.delta, n, self)
        bound = replace(self, population=n, delta=self.delta or usual_delta(n),
                        restart_every=min(self.restart_every or facts.rounds, max(1, facts.rounds)))
        most = min(asked, n // bound.apart)
        if (self.cohort or 1) > most:
            way = "restart_every" if self.mechanism == "tree" else "min_separation"
            raise RecipeError(f"DPFTRL.cohort = {self.cohort or 1} is not allowed: each of {n} clients takes part once "
                              f"in {bound.apart} rounds and {asked} are asked, which leaves {most} for a round; lower "
                              f"{way}" + (" or use mechanism: banded" if self.mechanism == "tree" else ""))
        bound = replace(bound, cohort=self.cohort or most)
        if bound.noise_multiplier is None:
            assert bound.epsilon is not None and bound.delta is not None
            spans = math.ceil(facts.rounds / bound.restart_every)
            z = noise_for(bound.epsilon, bound.delta, max(1, spans)) * bound.sensitivity
            bound = replace(bound, noise_multiplier=z)
        if bound.noise_multiplier:
            check_reach(bound, Release(bound.noise_multiplier), bound.delta or usual_delta(n))  # of one round alone
        return bound

    def foresee(self, facts: Facts) -> dict[str, Any]:
        if self.unit == "example":
            return _shared.foresee(self, facts)
        z, delta = self._noise(), self.delta or usual_delta(self.population or 2)
        says = {"layer": "dp_ftrl", "unit": "client", "noise_multiplier": z, "delta": delta, "rounds_that_fit": None}
        if not z:
            return says | {"epsilon": math.inf}
        ledger, release = Ledger({}), Release(z / self.sensitivity)
        ledger.book(release, math.ceil(facts.rounds / self.restart_every))
        if self.epsilon is not None:
            says["rounds_that_fit"] = rounds_for(self.epsilon, delta, release) * self.restart_every
        return says | {"epsilon": ledger.epsilon(delta)}

    def unlimited(self) -> DPFTRL:
        return _shared.free(self)  # type: ignore[no-any-return]

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        if self.unit == "example":
            return (yield from _shared.server(self, ask, state))
        lift, at = must_lift(ask, self), state["phases"].setdefault(ask.phase, {"t": 0, "last": {}, "live": []})
        if not self.restart_every:
            raise RecipeError("DPFTRL.restart_every is unknown: with 0, bind the layer first")
        t = at["t"] % self.restart_every + 1  # 1, 2, ... of this span
        if t == 1:
            self._pay(ask.phase, at, state)
        chosen = self._draw(ask, at, t)
        at["t"] += 1
        at["last"] |= dict.fromkeys(chosen, at["t"])
        if not chosen:
            raise QuorumError(f"{ask.phase}: all {len(ask.msgs)} clients asked took part less than {self.apart} rounds "
                              "ago; ask more of them (clients.per_round)")
        tell, common = told(ask, self.clip_norm, lift)
        out = yield replace(ask, msgs={c: {**ask.msgs[c], **tell} for c in chosen}, reduce=Lifted(),
                            form=ask.lifted())
        noise = self._noise_of(dict(out.value), ask.phase, at, t, state)
        noisy = {k: v + noise[k] for k, v in out.value.items()}
        # fixed denominator: who answers must not move it
        value = ask.reducer.done(noisy | {"n": float(self.cohort or max(1, len(ask.msgs) // self.apart))})
        return replace(out, value=put_back(value, common))

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if self.unit == "example":
            return _share.client(self, fn, msg, client, call)
        if OWN + "clip" not in msg:
            return call(msg)
        if (z := self._noise()) and self.restart_every:
            client.spend(Release(z / self.one_part))
        return contribution(fn, msg, call)[0]

    def coins(self, client: Any) -> Coins:
        """What this client's next noise is drawn from."""
        return _share.coins(self, client)

    def statement(self, state: Any) -> dict[str, Any]:
        if self.unit == "example":
            return {**_shared.statement(self, state), "mechanism": self.mechanism, "takes_part":
                    f"a row once in {self.restart_every} rounds"}
        ledger, delta = Ledger(dict(state)), self.delta or usual_delta(self.population or 2)
        return {"layer": "dp_ftrl", "unit": "client", "epsilon": ledger.epsilon(delta), "delta": delta,
                "epsilon_rdp": ledger.epsilon(delta, "rdp"), "releases": ledger.count, "sampling": "none",
                "adjacency": "one client's parts zeroed", "mechanism": self.mechanism, "clip": self.clip_norm,
                "takes_part": f"once in {self.apart} rounds", "noise_multiplier": self._noise(),
                "not_covered": UNCOVERED, "void": list(ledger.unbooked)}

    def _noise(self) -> float:
        if self.noise_multiplier is None:
            raise RecipeError("DPFTRL.noise_multiplier is unknown: with epsilon alone, bind the layer first")
        return self.noise_multiplier

    def _pay(self, phase: str, at: dict[str, Any], state: Any) -> None:
        """For the whole span at once, before its first round; what lies before it is over."""
        ledger, z = Ledger(state), self._noise()
        if z:
            release = Release(z / self.sensitivity)
            ledger.afford(release, self.epsilon, self.delta or usual_delta(self.population or 2))
            ledger.book(release)
        else:
            ledger.book_unaccounted(f"DPFTRL.noise_multiplier = 0: {phase} was released without noise")
        if self.seed is not None:
            ledger.book_unaccounted("DPFTRL.seed is set, so whoever knows the recipe can take the noise off")
        at["live"] = []
        if self.mechanism == "tree":
            at["last"] = {}

    def _draw(self, ask: Ask, at: Mapping[str, Any], t: int) -> list[ClientId]:
        """Who has waited longest, of those who may; in the order of the ask."""
        now, last = at["t"] + 1, at["last"]
        may = [c for c in ask.msgs if c not in last or (self.mechanism == "banded" and now - last[c] >= self.apart)]
        size = self.cohort or max(1, len(ask.msgs) // self.apart)
        first = set(sorted(may, key=lambda c: last.get(c, 0))[:size])
        return [c for c in ask.msgs if c in first]

    def _noise_of(self, total: Tree, phase: str, at: dict[str, Any], t: int, state: Any) -> dict[str, Tensor]:
        """xi_t, so that x_1 + xi_1, x_2 + xi_2, ... is all that is ever released."""
        rng = noise_stream(self.seed, state, phase, at["t"], digest(total))
        std = self._noise() * self.clip_norm
        fresh = {k: std * torch.randn(v.shape, generator=rng, dtype=v.dtype) for k, v in total.items()}
        live: list[tuple[int, dict[str, Tensor]]] = at["live"]
        if self.mechanism == "tree":
            # the nodes of t's binary digits cover [1, t]: the new one, which ends at t, replaces those that lie in it
            begin = t - (t & -t)
            old = [(1.0, node) for end, node in live if end > begin]
            keep = [entry for entry in live if entry[0] <= begin]
        else:
            # C xi = Z, row by row: xi_t = Z_t - sum_j c_j xi_{t-j}
            old = [(self.bands[t - s], xi) for s, xi in live if t - s < self.min_separation]
            keep = [entry for entry in live if t - entry[0] < self.min_separation - 1]
        xi = {k: f - sum((c * node[k] for c, node in old), torch.zeros_like(f)) for k, f in fresh.items()}
        at["live"] = [*keep, (t, fresh if self.mechanism == "tree" else xi)]
        return xi
