"""One ledger for every noisy release, and what it adds up to as epsilon at delta.

A release is booked before its result is used, so a run that dies half-way has paid. Two accountants of `dp-accounting`
read the same rows: PLD (tight; Poisson or no sampling) and RDP (an upper bound; also fixed-size sampling, and whole
numbers under discrete noise). What is let out without noise is booked too, as `unbooked`, and then no epsilon stands
for the run.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedllm.core.errors import BudgetSpent, CompositionError, RecipeError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

log = logging.getLogger(__name__)
logging.getLogger("absl").addFilter(lambda record: "Excluding this order" not in record.getMessage())
"""dp-accounting says so of each order whose series does not end, tens of times: one bound less is still a bound."""
Kind = Literal["pld", "rdp"]
Sampling = Literal["none", "poisson", "fixed"]
Law = Literal["gaussian", "discrete", "pure"]
ORDERS = [1 + x / 10 for x in range(8, 100)] + [*range(11, 64), 96, 128, 256, 512]
MOST_EPSILON, LOOSE = 1000.0, 200.0
"""No budget is larger; what is larger than the second is told by RDP alone."""
MANY = 12
"""More kinds of releases are told by RDP alone too: each costs the tight accountant a transform of its own, and the
ledger of a site over many runs would take minutes."""
COARSE = 300
"""Up to so many releases a grid of 1e-3 for the privacy loss is as good as one of 1e-4, and ten times as fast."""


@dataclass(frozen=True)
class Release:
    """One Gaussian release of a sum in which a unit (client or example) moves at most `1 / noise_multiplier` sigmas.

    `sampling` is how units came into the sum: "none" (everybody who could be in it), "poisson" (each with probability
    `rate`, on its own), or "fixed" (a draw of round(rate * population) without replacement). Under "fixed" neighbors
    differ by the replacement of one unit, which moves the sum by twice the clip: the accountant halves the multiplier.
    `law` "discrete" is a sum of whole numbers under discrete Gaussians (Canonne, Kairouz and Steinke 2020, 2004.00010;
    sums of them: Kairouz, Liu and Steinke 2021, 2102.06387, whose tau is below 1e-200 at 8 quanta a share): its Renyi
    divergences are at most the Gaussian's, so that RDP holds for it; nothing tighter is proven, and no sampling.
    `law` "pure" is no Gaussian: any release of epsilon 1 / noise_multiplier at delta 0, without sampling.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0
    population: int = 0
    law: Law = "gaussian"

    def __post_init__(self) -> None:
        if self.law != "gaussian" and self.sampling != "none":
            raise CompositionError(f"{self.law} noise and sampling = {self.sampling!r} do not fit together: no "
                                   "accountant covers them; let every row take part (sampling 'none')")
        if not self.noise_multiplier > 0:
            raise RecipeError(f"noise_multiplier = {self.noise_multiplier!r} is not allowed; it must be > 0")
        if not 0 < self.rate <= 1:
            raise RecipeError(f"sampling rate = {self.rate!r} is not allowed; it must be > 0 and <= 1")

    @property
    def row(self) -> list[Any]:
        """Its fields as a ledger keeps them; the law is named where it is not the Gaussian."""
        return list(astuple(self))[: None if self.law != "gaussian" else -1]

    @property
    def event(self) -> DpEvent:
        """The same release as `dp-accounting` names it."""
        import dp_accounting as dp  # seconds to import, and most runs need none of it

        if self.sampling == "fixed":
            size = round(self.rate * self.population)
            return dp.SampledWithoutReplacementDpEvent(self.population, size,
                                                       dp.GaussianDpEvent(self.noise_multiplier / 2))
        if self.law == "discrete":
            return dp.ZCDpEvent(0.5 / self.noise_multiplier**2)
        gaussian = dp.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sampling == "none" else dp.PoissonSampledDpEvent(self.rate, gaussian)


class Ledger:
    """A view of the ledger that a layer keeps in its state (plain lists, so that it is checkpointed with the run)."""

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        self.rows: list[list[Any]] = state.setdefault("releases", [])
        """[noise_multiplier, sampling, rate, population, count], equal releases counted in one row; before the count
        stands "discrete" where noise is that."""
        self.unbooked: list[str] = state.setdefault("unbooked", [])

    def book(self, release: Release, count: int = 1) -> None:
        """Write down `count` releases of this kind."""
        key = release.row
        for row in self.rows:
            if row[:-1] == key:
                row[-1] += count
                return
        self.rows.append([*key, count])

    def book_unaccounted(self, what: str) -> None:
        """Something left without noise: from now on no epsilon stands for the run, and everybody hears so once."""
        if what not in self.unbooked:
            self.unbooked.append(what)
            log.warning("the privacy claim of this run is void: %s", what)

    def epsilon(self, delta: float, kind: Kind | None = None, extra: Release | None = None, count: int = 1) -> float:
        """Epsilon at `delta` of all that is booked (and of `count` more `extra`); infinite with anything unbooked."""
        if self.unbooked:
            return math.inf
        rows = [tuple(r) for r in self.rows]
        return spent(tuple(rows + ([(*extra.row, count)] if extra else [])), delta, kind)

    def afford(self, extra: Release, epsilon: float | None, delta: float, count: int = 1) -> None:
        """Raise BudgetSpent when `count` more such releases would exceed `epsilon` (None: no budget).

        RDP's bound, which is cheap, is asked first, and the tight accountant only when that says no.
        """
        if epsilon is None or self.epsilon(delta, "rdp", extra, count) <= epsilon:
            return
        after = self.epsilon(delta, extra=extra, count=count)
        if after > epsilon:
            raise BudgetSpent(f"one more round would cost epsilon {after:.3f} at delta {delta:g}, and the budget is "
                              f"{epsilon:g} ({self.epsilon(delta):.3f} spent); end the run here, or start again with "
                              "more noise or fewer rounds")

    @property
    def count(self) -> int:
        """How many releases are booked."""
        return sum(row[-1] for row in self.rows)


@functools.lru_cache(maxsize=4096)
def spent(rows: tuple[tuple[Any, ...], ...], delta: float, kind: Kind | None = None) -> float:
    """Epsilon at `delta` of counted releases; `kind` None takes the tighter accountant that can read all rows."""
    check_delta(delta)
    rows = tuple(row for row in rows if row[-1])
    if not rows:
        return 0.0
    if pure := [row for row in rows if "pure" in row]:  # their epsilons add up, and to what the others cost
        return sum(row[-1] / row[0] for row in pure) + spent(tuple(r for r in rows if r not in pure), delta, kind)
    fixed = {row[1] == "fixed" for row in rows}
    if len(fixed) > 1:
        raise CompositionError("releases under fixed-size sampling and releases under Poisson or no sampling have "
                               "different neighbors and cannot share a ledger; use one kind of sampling, or poisson")
    rdp_only = fixed == {True} or any("discrete" in row for row in rows)
    if rdp_only and kind == "pld":
        raise CompositionError("the PLD accountant and fixed-size sampling or discrete noise do not fit together; use "
                               "kind='rdp'")
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = dp.NeighboringRelation.REPLACE_ONE if fixed == {True} else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    use_rdp = kind == "rdp" or rdp_only
    grid = 1e-3 if sum(row[-1] for row in rows) <= COARSE else 1e-4

    def by(accountant: Any) -> float:
        for *fields, count in rows:
            accountant.compose(Release(*fields).event, count)
        return float(accountant.get_epsilon(delta))

    if use_rdp or (kind is None and (len(rows) > MANY or by(RdpAccountant(ORDERS, relation)) > LOOSE)):
        # a bound that promises nothing either way, and tight figures of so little noise take minutes
        return by(RdpAccountant(ORDERS, relation))
    return by(PLDAccountant(relation, grid))


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rounds: int, sampling: Sampling = "none", rate: float = 1.0,
              population: int = 0, kind: Kind | None = None, law: Law = "gaussian") -> float:
    """The least noise multiplier with which `rounds` releases stay within (epsilon, delta), to 0.1 %."""
    check_epsilon(epsilon)

    def fits(z: float, kind: Kind | None) -> bool:
        return spent(((*Release(z, sampling, rate, population, law).row, rounds),), delta, kind) <= epsilon

    high = 0.1
    while not fits(high, "rdp"):  # RDP is a bound, so what it finds is enough
        high *= 2
        if high > 1e6:
            raise RecipeError(f"epsilon = {epsilon} at delta = {delta} over {rounds} rounds needs a noise multiplier "
                              "above a million; allow more epsilon or fewer rounds")
    low = high / 4
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle, kind) else (middle, high)
    return high


def rounds_for(epsilon: float, delta: float, release: Release, kind: Kind | None = None, most: int = 1 << 20) -> int:
    """How many such releases fit into (epsilon, delta)."""
    check_epsilon(epsilon)

    def fits(n: int) -> bool:
        return spent(((*release.row, n),), delta, kind) <= epsilon

    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_budget(layer: Any) -> None:
    """Raise RecipeError unless a layer's `noise_multiplier` or `epsilon` is given, the latter above 0."""
    if layer.epsilon is not None:
        check_epsilon(layer.epsilon)
    if layer.noise_multiplier is None and layer.epsilon is None:
        name = type(layer).__name__
        raise RecipeError(f"{name}.noise_multiplier and {name}.epsilon are both missing; give one of them")


def check_reach(layer: Any, release: Release, delta: float, count: int = 1) -> None:
    """Raise RecipeError where not even one round (`count` such releases) fits into a layer's `epsilon`."""
    if layer.epsilon is None:
        return
    ledger = Ledger({})
    try:
        ledger.afford(release, layer.epsilon, delta, count)
    except BudgetSpent:
        cost = ledger.epsilon(delta, extra=release, count=count)
        raise RecipeError(
            f"{type(layer).__name__}.epsilon = {layer.epsilon:g} is not allowed with noise_multiplier = "
            f"{layer.noise_multiplier:.4g}: a single round costs {cost:.4g} at delta {delta:g}, so that no number of "
            "rounds keeps to it; leave noise_multiplier out, and it follows from epsilon and rounds") from None


def check_epsilon(epsilon: float) -> None:
    """Raise RecipeError for an epsilon that promises nothing."""
    if not 0 < epsilon <= MOST_EPSILON:
        raise RecipeError(f"epsilon = {epsilon!r} is not allowed; it must be > 0 and <= {MOST_EPSILON:g}: more "
                          "promises nothing")


def check_delta(delta: float, units: int | None = None, of: Any = None) -> None:
    """Raise RecipeError for a delta that promises nothing; with `units` people a delta of 1/units may expose one.

    `of` is the layer whose key it is.
    """
    key = "delta" if of is None else f"{type(of).__name__}.delta"
    if not 0 < delta < 1:
        raise RecipeError(f"{key} = {delta!r} is not allowed; it must be > 0 and < 1")
    if units and delta >= 1 / units:
        raise RecipeError(f"{key} = {delta!r} is not allowed with {units} units; it must be < 1/{units}, since a "
                          f"mechanism that publishes one unit's data outright has that delta; take {units ** -1.1:.1e}")


def usual_delta(units: int) -> float:
    """The smaller of 1e-5 and units ** -1.1."""
    return min(1e-5, max(2, units) ** -1.1)


def join(statements: Sequence[Mapping[str, Any]], also: Sequence[str] = ()) -> dict[str, Any] | None:
    """What a run says about its privacy, from what its layers say: the claim holds only if every part of it does, and
    none of what no layer can see (`also`) takes it away."""
    if not statements:
        return None
    void = [why for s in statements for why in s.get("void", ())] + list(also)
    spent = [s.get("epsilon", 0.0) for s in statements]
    void += [f"epsilon = {epsilon:.3g} promises nothing" for epsilon in spent if MOST_EPSILON < epsilon < math.inf]
    return {"claim": "none" if void else "private", "void": void, "layers": [dict(s) for s in statements]}


def unaccounted(says: Sequence[Mapping[str, Any]], tests_on_clients: bool) -> list[str]:
    """Releases of a run that no layer can see, and that take away what the layers say.

    Each client's own test metrics go up as they are. Under example-level privacy they are about other rows; a client
    whose taking part is to stay hidden is told by them.
    """
    hidden = any(s.get("unit") == "client" for s in says)
    return ["evaluate.clients = true: each client's test metrics went up without noise; set it to false for a claim "
            "about clients"] if hidden and tests_on_clients else []


def composed(runs: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What runs on the same clients spent together, by basic composition: epsilons and deltas add up, unit by unit.

    None where no run says anything. A run that says nothing, or claims nothing, takes the claim away from them all.
    """
    said = {name: privacy for name, privacy in runs.items() if privacy}
    if not said:
        return None
    void = [f"{name}: nothing in it accounts for privacy" for name, privacy in runs.items() if not privacy]
    void += [f"{name}: {why}" for name, privacy in said.items() for why in privacy.get("void", ())]
    spent: dict[str, dict[str, float]] = {}
    for privacy in said.values():
        for layer in privacy.get("layers", ()):
            if "epsilon" in layer:
                sums = spent.setdefault(str(layer.get("unit")), {"epsilon": 0.0, "delta": 0.0})
                sums["epsilon"] += float(layer["epsilon"])
                sums["delta"] += float(layer.get("delta") or 0.0)
    return {"claim": "none" if void else "private", "void": void, "composed": spent}
