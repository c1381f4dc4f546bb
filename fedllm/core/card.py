"""What a method or a layer says of itself: its card with claims that can fail, and how the common tests try it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm.core.errors import RecipeError


@dataclass(frozen=True)
class Claim:
    """A sentence that can fail: on `rig`, `metric` of the method against the same metric of `baseline`, over seeds.

    `holds` is one of "<=", ">=", "<", ">" between `figure` and `threshold`; with `relative="ratio"` the figure is
    method / baseline, with "difference" method - baseline, with "own" the method's metric alone. What is said of it
    is not up to the author: `evidence/verdict.py` judges the figures of seeds that nobody looked at while building.
    """

    says: str
    rig: str
    metric: str
    holds: Literal["<=", ">=", "<", ">"]
    threshold: float
    baseline: str | None = None
    relative: Literal["own", "ratio", "difference"] = "own"
    seeds: int | None = None
    """Measured seeds; at least 10 where the figure can vary, and where it cannot (`exact`) 3 unless more are said."""
    wins: int | None = None
    """Of the rules before there were verdicts; nothing depends on it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the rig (for example other knobs, ranks or learning rates); `knobs` to the method's arm alone."""
    against: Mapping[str, Any] = field(default_factory=dict)
    """Options of the baseline's arm alone, over `options`."""
    kind: Literal["", "order", "level", "exact"] = ""
    """order: against a baseline. level: against a number. exact: an identity, or bytes that are counted, which no seed
    moves. "": order with a baseline, level without."""
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Option of the rig (`local.lr`, `knobs.server_lr`) -> values from which each arm gets its best, on seeds apart."""
    better: Literal["", "min", "max"] = ""
    """Which way the metric is better, for the grid. "": the way that `holds` points."""
    unequal: str = ""
    """Why the two arms may do unequal work; "": the run is refused when the rig reports that they did."""
    unseen: int = 4000
    """The first measured seed. All below were, or may have been, looked at while building."""

    def __post_init__(self) -> None:
        if self.kind == "order" and self.baseline is None:
            raise RecipeError(f"claim {self.says!r}: kind 'order' is not allowed without a baseline")
        if self.unseen < 4000:
            raise RecipeError(f"claim {self.says!r}: unseen = {self.unseen} is not allowed; it must be >= 4000, since "
                              "seeds below were looked at while building, or are those that rates are tuned on")

    @property
    def sort(self) -> Literal["order", "level", "exact"]:
        """Its kind, also where it is not said."""
        return self.kind or ("order" if self.baseline else "level")


KINDS = ("text", "tokens")
"""Words that were made of rows, and the ids of such words."""


CARRIERS = ("adapters", "logits", "text", "grades", "seeds")
DIRECTIONS = ("to clients", "to owner", "both")
IMPROVED = ("owner", "clients", "both", "answers")
SPARED = ("rows", "model", "compute", "designs")


@dataclass(frozen=True)
class Moves:
    """How knowledge moves between the owner of a large model and clients with rows (Kang et al., Grounding Foundation
    Models through Federated Transfer Learning, ACM TIST 2025): what people choose such a method by."""

    carrier: str
    """What clients send, of `CARRIERS`."""
    direction: str
    """Who learns from whom, of `DIRECTIONS`."""
    improves: str
    """Whose model ends better, of `IMPROVED`; answers: nobody's, it is asked."""
    spares: tuple[str, ...]
    """What it is made for, of `SPARED`: rows stay with clients, the large model with its owner, clients have little to
    compute with, models may be of several designs."""

    def __post_init__(self) -> None:
        known = {"carrier": CARRIERS, "direction": DIRECTIONS, "improves": IMPROVED}
        for name, value, allowed in (*((n, getattr(self, n), of) for n, of in known.items()),
                                     *(("spares", x, SPARED) for x in self.spares)):
            if value not in allowed:
                raise RecipeError(f"Moves.{name} = {value!r} is not allowed; it must be one of {', '.join(allowed)}")

    @property
    def words(self) -> str:
        """In a line."""
        return f"{self.carrier}, {self.direction}; improves {self.improves}; spares {', '.join(self.spares)}"


@dataclass(frozen=True)
class Card:
    """What a method says about itself; docs and tables are generated from it."""

    title: str
    paper: str
    topic: str
    sends: str
    needs: str
    claim: Claim
    evidence: str = ""
    """What of the paper was read where, and choices of our own."""
    kinds: tuple[str, ...] = ()
    """What leaves a client beside tensors and numbers, of `KINDS`: a site whose settings forbid it takes no part. It is
    no permission: what is not declared here is held back at the site all the same."""
    also: Mapping[str, Claim] = field(default_factory=dict)
    """Further claims, each by a word of its own; `<id>:<word>` is its name in `fedllm claims`."""
    moves: Moves | None = None
    """Of federated transfer learning: what moves between a large model's owner and clients."""
    only_exact: str = ""
    """Why there is no claim whose figure could vary, where there is none."""


@dataclass(frozen=True)
class Trial:
    """Small settings under which the tests that hold for all methods run this one, on every engine.

    What is not said is the tests' own. A method that cannot run under the tests' own says here what it needs.
    """

    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Its own knobs, small."""
    space: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora", "rank": 4})
    """The recipe's section `space`."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe's section `local`."""
    ranks: tuple[int, ...] = ()
    """LoRA ranks that clients declare."""
    task: str = "generation"
    models: Mapping[str, str] = field(default_factory=dict)
    """Of models that it asks for by name the task, where it is not generation."""
    far: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a recipe that differ in a real federation, for example so that answers come in the simulation's order."""
    acts: Mapping[str, Any] = field(default_factory=dict)
    """Of a method whose clients act in environments: `source` (env:NAME) and the keys of `data.environment`."""
    rounding: str = ""
    """Why it magnifies fp32 rounding, so that engines are held to one another in fp64 alone."""
    silent: str = ""
    """Why a round in which a client is silent is not a round without that client."""
    apart: str = ""
    """Why no common test of rounds can hold for it, so that only tests of its own do."""
