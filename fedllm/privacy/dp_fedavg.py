"""Central, user-level DP: each client's contribution is clipped at home, and the server adds noise to the sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.ask import Replies
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer
from fedllm.core.payload import digest
from fedllm.core.reduce import Lifted
from fedllm.core.sums import is_control, must_lift, need_sums
from fedllm.privacy._clip import OWN, UNCOVERED, contribution, fresh_secret, noise_stream, put_back, told
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

BIT = OWN + "below"


@dataclass(frozen=True)
class DPFedAvg(Knobs, Layer):
    """DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) with clipping to a quantile (Andrew et al. 2021, 1905.03871).

    Unit: the client. What a client adds to the sum (lifted, weight 1 whatever its number of rows, training loss left
    out) has an L2 norm of at most the clip, and the divisor is fixed by the sampling and not by who answers. Works on
    any Sum: for a Mean of weights that all were told alike it is their change that is clipped. The server is trusted
    with the sum before the noise; with `secagg` below, with nothing else. Noise is drawn in floating point from
    torch's generator, from a secret of the run (`fresh_secret`), so a run's checkpoints are for the server alone.
    """

    algebra = Algebra("dp", needs="sum", instead="dp_sgd, which works at the client under any method")
    session = (OWN + "clip",)
    secrets = ("secret",)

    noise_multiplier: float | None = knob(None, "noise / clip; None: from epsilon and rounds. 0 adds none", ge=0)
    clip_norm: float = knob(0.1, "the clip at the start; also the clip for good when clip_lr is 0", gt=0)
    clip_lr: float = knob(0.2, "how fast the clip follows the quantile; 0: fixed clip", ge=0)
    quantile: float = knob(0.5, "share of clients whose norm should be below the clip", gt=0, lt=1)
    count_noise: float | None = knob(None, "sigma_b, noise on the count of unclipped clients; None: "
                                           "max(expected cohort / 20, noise_multiplier)", gt=0)
    sampling: Literal["none", "poisson", "fixed"] = knob(
        "none", "drawn here, in secret, among those asked: nobody is left out, each by a coin (poisson), or a fixed "
                "number", options=("none", "poisson", "fixed"))
    rate: float = knob(1.0, "share of those asked that takes part", gt=0, le=1)
    epsilon: float | None = knob(None, "budget; the run stops before exceeding it", gt=0)
    delta: float | None = knob(None, "None: 1e-5, or (number of clients) ** -1.1 if less", gt=0, lt=1)
    seed: int | None = knob(None, "seeds noise and sampling for tests, which voids the claim; None: from the OS")
    population: int = knob(0, "clients in the federation; found out by the run", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)
        if self.sampling == "none" and self.rate != 1:
            raise RecipeError(f"DPFedAvg.rate = {self.rate} is not allowed with sampling 'none'; it must be 1")
        least = (self.noise_multiplier or 0) / 2
        if self.count_noise is not None and self.count_noise <= least:
            raise RecipeError(f"DPFedAvg.count_noise = {self.count_noise} is not allowed; it must be > "
                              f"noise_multiplier / 2 = {least}: the count alone would cost more than the whole may")

    def init(self) -> dict[str, Any]:
        return {"clip": self.clip_norm, "asked": 0, "secret": fresh_secret()}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)

    def bind(self, facts: Facts) -> DPFedAvg:
        n = len(facts.rows)
        if self.delta is not None:
            check_delta(self.delta, n, self)
        cohort = min(facts.cohort or n, n)
        bound = replace(self, population=n, delta=self.delta or usual_delta(n))
        if bound.noise_multiplier is None:
            assert bound.epsilon is not None and bound.delta is not None
            z = noise_for(bound.epsilon, bound.delta, facts.rounds, self.sampling, self.rate, cohort)
            bound = replace(bound, noise_multiplier=z)
        if bound.noise_multiplier:
            rate = bound._size(cohort) / cohort if self.sampling == "fixed" else self.rate
            check_reach(bound, Release(bound.noise_multiplier, self.sampling, rate, cohort), bound._delta(n))
        return bound

    def foresee(self, facts: Facts) -> dict[str, Any]:
        z, asked = self._noise(), min(facts.cohort or len(facts.rows), len(facts.rows))
        delta = self._delta(self.population or asked)
        says = {"layer": "dp_fedavg", "unit": "client", "noise_multiplier": z, "delta": delta, "rounds_that_fit": None}
        if not z:
            return says | {"epsilon": math.inf}
        ledger = Ledger({})
        release = Release(z, self.sampling, self._size(asked) / asked if self.sampling == "fixed" else self.rate, asked)
        ledger.book(release, facts.rounds)
        if self.epsilon is not None:
            says["rounds_that_fit"] = rounds_for(self.epsilon, delta, release)
        return says | {"epsilon": ledger.epsilon(delta)}

    def doubts(self, asked: int, odds: float) -> list[str]:
        if asked >= self.population or self.sampling != "none":
            return []
        return [f"{asked} of {self.population} clients are asked (clients.per_round), who follow from the recipe's "
                "seed: no epsilon is saved by that; sampling: poisson or fixed draws in secret among those asked"]

    def unlimited(self) -> DPFedAvg:
        return replace(self, epsilon=None)

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        asked, lift = len(ask.msgs), must_lift(ask, self)
        self._book(ask.phase, asked, state)
        state["asked"] += 1
        tell, common = told(ask, state["clip"], lift)
        out, total = Replies(), {}
        if chosen := self._draw(list(ask.msgs), noise_stream(self.seed, state, ask.phase, state["asked"], "cohort")):
            out = yield replace(ask, msgs={c: {**ask.msgs[c], **tell} for c in chosen}, reduce=Lifted(),
                                form=ask.lifted())
            total = dict(out.value)
            state["shapes"] = [[k, list(v.shape)] for k, v in total.items()]
        else:
            total = self._nobody(state, ask.phase)
        # fixed denominator q N: who answers must not move it
        expected = self._size(asked) if self.sampling == "fixed" else self.rate * asked
        rng = noise_stream(self.seed, state, ask.phase, state["asked"], digest(total))
        value = ask.reducer.done(self._noisy(total, state, expected, rng) | {"n": float(expected)})
        return replace(out, value=put_back(value, common))

    def _book(self, phase: str, asked: int, state: Any) -> None:
        """Pay before anything is asked."""
        ledger, z = Ledger(state), self._noise()
        if z:
            rate = self._size(asked) / asked if self.sampling == "fixed" else self.rate
            release = Release(z, self.sampling, rate, asked)
            ledger.afford(release, self.epsilon, self._delta(asked))
            ledger.book(release)
        else:
            ledger.book_unaccounted(f"DPFedAvg.noise_multiplier = 0: {phase} was released without noise")
        if self.seed is not None:
            ledger.book_unaccounted("DPFedAvg.seed is set, so whoever knows the recipe can take the noise off")

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "clip" not in msg:
            return call(msg)
        if z := self._noise():  # nobody but the server knows who was drawn: without the drawing, at the full price
            client.spend(Release(z))
        given, below = contribution(fn, msg, call)
        # Andrew et al.: b = 1 when NOT clipped, sent as b - 1/2 so that one client moves the count by 1/2
        return given | {BIT: torch.tensor(float(below) - 0.5)}

    def statement(self, state: Any) -> dict[str, Any]:
        ledger, delta = Ledger(dict(state)), self._delta(self.population or 2)
        adjacency = "one client replaced by another" if self.sampling == "fixed" else "one client more or less"
        return {"layer": "dp_fedavg", "unit": "client", "epsilon": ledger.epsilon(delta), "delta": delta,
                "epsilon_rdp": ledger.epsilon(delta, "rdp"), "adjacency": adjacency, "releases": ledger.count,
                "sampling": self.sampling, "rate": self.rate, "noise_multiplier": self._noise(),
                "clip": state["clip"], "not_covered": UNCOVERED, "void": list(ledger.unbooked)}

    def _noise(self) -> float:
        if self.noise_multiplier is None:
            raise RecipeError("DPFedAvg.noise_multiplier is unknown: with epsilon alone, bind the layer first")
        return self.noise_multiplier

    def _delta(self, clients: int) -> float:
        return self.delta or usual_delta(clients)

    def _size(self, asked: int) -> int:
        return max(1, round(self.rate * asked))

    def _draw(self, clients: list[str], rng: torch.Generator) -> list[str]:
        if self.sampling == "none":
            return clients
        u = torch.rand(len(clients), generator=rng, dtype=torch.float64)
        if self.sampling == "poisson":
            return [c for c, x in zip(clients, u.tolist(), strict=True) if x < self.rate]
        return [clients[i] for i in sorted(u.argsort()[: self._size(len(clients))].tolist())]

    def _nobody(self, state: Any, phase: str) -> dict[str, Tensor]:
        """An empty draw is released as noise alone, like any other; only the shapes must be known by then."""
        if "shapes" not in state:
            Ledger(state).book_unaccounted(f"{phase}: the very first draw was empty, and that this was so is known")
            raise QuorumError(f"{phase}: the Poisson draw of rate {self.rate} chose nobody in the first round")
        return {k: torch.zeros(shape) for k, shape in state["shapes"]}

    def _noisy(self, total: dict[str, Tensor], state: Any, expected: float, rng: torch.Generator) -> dict[str, Tensor]:
        z, clip = self._noise(), state["clip"]
        count = total.pop(BIT)
        adaptive = self.clip_lr > 0
        sigma_b = self.count_noise or max(expected / 20, z)
        # z_u = (z^-2 - (2 sigma_b)^-2)^(-1/2): count and sum together cost what z alone would
        z_u = (z**-2 - (2 * sigma_b) ** -2) ** -0.5 if adaptive and z else z
        std = z_u * clip  # the clip that did the clipping, not the next one
        noisy = {k: v + std * torch.randn(v.shape, generator=rng, dtype=v.dtype) for k, v in total.items()}
        if adaptive:
            noise = sigma_b * float(torch.randn((), generator=rng, dtype=torch.float64)) if z else 0.0
            below = min(1.0, max(0.0, (float(count) + noise) / expected + 0.5))  # a share, whatever the noise says
            # C <- C exp(-eta (b - gamma)): too many below the clip, and it comes down
            state["clip"] = clip * math.exp(-self.clip_lr * (below - self.quantile))
        return noisy
