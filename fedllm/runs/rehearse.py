"""What to train with for a wanted epsilon, found by rehearsing the run on public rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Shard
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.dp_ftrl import DPFTRL
from fedllm.privacy.dp_sgd import DPSGD, LEAST
from fedllm.runs.build import Parts, bound, build, make_layers
from fedllm.runs.course import Course
from fedllm.runs.fits import cohort_size
from fedllm.runs.judge import Judge
from fedllm.runs.progress import log as progress
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.sections import Named

TESTED = 0.3
"""Share of the public rows on which the rehearsals are tested."""
LEAST_ROWS = 4
"""Public rows of each rehearsing client."""
FAR = (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30)
"""What the recipe's rate is multiplied by at first."""
FINALISTS, SEEDS, SWEEPS = 3, 3, 2


@dataclass(frozen=True)
class Setting:
    """What is chosen."""

    rounds: int
    lr: float
    clip_norm: float
    batch_size: int
    server_lr: float | None = None
    """None: the method has none, or what is private is a row and not a client."""


Way = tuple[Callable[[Setting], Setting], Callable[[Setting], Setting]]


@dataclass(frozen=True)
class Tried:
    """How one setting did, as the mean over so many rehearsals."""

    setting: Setting
    noise_multiplier: float
    """That the real run needs with these rounds and batches."""
    loss: float
    score: float
    seeds: int


@dataclass(frozen=True)
class Proposal:
    """The settings by their scores, the best first, and how they were found."""

    epsilon: float
    delta: float
    metric: str
    """Of the public rows kept back: `accuracy`, or `loss` where nothing is classified."""
    rows: int
    tested: int
    own: Tried
    """As the recipe says it."""
    tried: tuple[Tried, ...]
    overrides: tuple[str, ...]
    """The best one as `key=value`, for `fedllm run`."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def propose(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Proposal:
    """Rounds, rate, clip and (where each client adds its own noise) batch for the epsilon of the recipe's `dp_sgd` or
    `dp_ftrl` over rows, or with the server's rate for that of its `dp_fedavg`.

    A rehearsal is the recipe's run on `data.public`, dealt out to some of its clients, with the noise of the real run
    scaled by the rows at hand to the rows of the run (by clients, where they are what is private): noise and signal of
    a step stand to each other as they will. Of the private rows it uses nothing but how many there are, which is taken
    as public; so it costs no epsilon. RecipeError without such a layer, an epsilon or enough public rows.
    """
    parts = build(load_recipe(recipe, overrides))
    at = _layer(parts.recipe)
    layer = parts.layers[at]
    assert isinstance(layer, DPSGD | DPFTRL | DPFedAvg) and layer.epsilon is not None
    stage = _Stage(parts, at)
    server = vars(parts.method).get("server_lr") if isinstance(layer, DPFedAvg) else None
    first = Setting(parts.recipe.rounds, parts.world.local.lr, layer.clip_norm, parts.world.local.batch_size, server)
    ways = [*_WAYS, *([_BATCH] if stage.own_noise else []), *([_SERVER] if server else [])]
    scores = _search(stage, first, ways)
    up = stage.metric == "accuracy"
    ranked = tuple(sorted(scores, key=lambda t: (-t.seeds, -t.score if up else t.score, t.loss)))
    own = next(t for t in ranked if t.setting == first)
    best = ranked[0].setting
    said = {"rounds": best.rounds, "local.lr": f"{best.lr:.4g}", f"layers.{at}.clip_norm": f"{best.clip_norm:.4g}",
            "local.batch_size": best.batch_size}
    if best.server_lr is not None:
        said["method.server_lr"] = f"{best.server_lr:.4g}"
    return Proposal(layer.epsilon, layer.delta or 1e-5, stage.metric, stage.rows, len(stage.test), own, ranked,
                    tuple(f"{key}={value}" for key, value in said.items()))


def _layer(recipe: Recipe) -> int:
    """Where the layer stands whose epsilon is given."""
    names = [n.name for n in recipe.layers]
    at = next((i for i, name in enumerate(names) if name in ("dp_sgd", "dp_ftrl", "dp_fedavg")), None)
    if at is None:
        raise RecipeError(f"layers = {names}: settings are proposed for the epsilon of layer dp_sgd, dp_ftrl or "
                          "dp_fedavg; add one")
    if names[at] == "dp_ftrl" and (unit := recipe.layers[at].knobs.get("unit", "client")) != "example":
        raise RecipeError(f"layers.{at}.unit = {unit!r}: settings of dp_ftrl are proposed for unit: example alone; "
                          "where clients are what is private, for dp_fedavg")
    if recipe.layers[at].knobs.get("epsilon") is None:
        raise RecipeError(f"layers.{at}.epsilon is not given, and settings are proposed for one; give it")
    return at


class _Stage:
    """Where the run is rehearsed: public rows, a few of them kept back to test on."""

    def __init__(self, parts: Parts, at: int) -> None:
        self.parts, self.at = parts, at
        public, ids = list(parts.world.federation.public), list(parts.world.federation.clients)
        order = numpy_stream(parts.recipe.seed, "rehearse").permutation(len(public))
        held = round(TESTED * len(public))
        train: Sequence[Any] = [public[i] for i in order[held:]]
        self.test: Sequence[Any] = [public[i] for i in order[:held]]
        self.rows = len(train)
        self.real = {c.id: c.n for c in parts.world.infos()}
        self.there = sum(self.real.values()) / len(self.real)
        layer = parts.layers[at]
        self.own_noise = isinstance(layer, DPSGD) and layer.noise == "local"
        least = max(1, round(self.there))  # a private client is a whole one
        if isinstance(layer, DPSGD | DPFTRL):
            least = max(LEAST_ROWS, layer.turns.parts)  # a round reads one row at least of each
        count = min(len(ids), self.rows // least)
        if not held or not count:
            most = math.ceil(least / (1 - TESTED))
            raise RecipeError(f"data.public gives {len(public)} rows; settings are proposed from {most} public rows or "
                              "more of the same task: a file, or in a simulation a fraction of the rows")
        if parts.world.model.settled:  # their states serve all rehearsals
            self.test, train = parts.world.tokenized(self.test, True), parts.world.tokenized(train)
        self.shards = {c: Shard(train[i::count]) for i, c in enumerate(ids[:count])}
        self.metric = "accuracy" if parts.world.federation.labels else "loss"

    def rehearse(self, setting: Setting, seed: int) -> Tried:
        """One rehearsal."""
        recipe, world = self.parts.recipe, self.parts.world
        here = self.rows / len(self.shards)
        asked = cohort_size(recipe.clients.per_round, len(self.real))
        few = max(1, round(asked * len(self.shards) / len(self.real)))
        spec = self._with(setting).model_copy(update={
            "seed": seed, "layers": [recipe.layers[self.at]],
            "clients": recipe.clients.model_copy(update={"per_round": few, "quorum": 1, "deadline": None})})
        z = self._noise(setting)
        batch = max(1, round(setting.batch_size * here / self.there))
        if isinstance(self.parts.layers[self.at], DPFTRL):
            batch = setting.batch_size  # all that a round reads, which is more than its share where rows are few
        local = LocalSpec.make({**spec.local, "batch_size": batch}, "local")
        scaled = z * here / self.there * ((few / asked) ** 0.5 if self.own_noise else few / asked)
        trial = self._trial(setting, max(LEAST, scaled), seed, few)
        method = make_method(spec.method.name, **spec.method.knobs)
        federation = replace(world.federation, clients=self.shards, test=self.test, public=())
        stage = replace(world, federation=federation, local=local, seed=seed, rounds=setting.rounds)
        layers = bound([trial], spec, {c: len(s.train) for c, s in self.shards.items()}, local)
        small = replace(self.parts, recipe=spec, world=stage, layers=layers, method=method)
        course = Course(small, small.method, layers)
        for round_ in range(setting.rounds):
            course.step(round_)
        found = Judge(small, small.method, Record(lambda event: None)).test(course.state, course.engine.memory, 0)
        figures = found["global"]
        if not figures or not {"loss", self.metric} <= figures.keys():
            raise CompositionError(f"method {recipe.method.name!r} has no loss on a test of everybody's, by "
                                   "which settings could be compared")
        return Tried(setting, z, float(figures["loss"]), float(figures[self.metric]), 1)

    def _trial(self, setting: Setting, noise: float, seed: int, few: int) -> DPSGD | DPFTRL | DPFedAvg:
        """The layer with this much noise and no budget; rows are nobody's, so its draws may be known."""
        layer = self.parts.layers[self.at]
        if isinstance(layer, DPFTRL):  # without a sum that hides them, each of the few adds all of its noise
            knobs = self.parts.recipe.layers[self.at].knobs
            return DPFTRL(unit="example", noise_multiplier=noise / few**0.5, clip_norm=setting.clip_norm,
                          delta=layer.delta, seed=seed, restart_every=knobs.get("restart_every", 0))
        if isinstance(layer, DPSGD):
            return DPSGD(noise_multiplier=noise, clip_norm=setting.clip_norm, delta=layer.delta, seed=seed,
                         noise="local" if self.own_noise else "central")
        assert isinstance(layer, DPFedAvg)
        return replace(layer, noise_multiplier=noise, clip_norm=setting.clip_norm, epsilon=None, delta=None, seed=seed,
                       population=0, count_noise=None)

    def _with(self, setting: Setting) -> Recipe:
        """The recipe with this setting."""
        recipe = self.parts.recipe
        layers = [Named(**{**n.model_dump(), "clip_norm": setting.clip_norm}) if i == self.at else n
                  for i, n in enumerate(recipe.layers)]
        update = {"rounds": setting.rounds, "layers": layers,
                  "local": {**recipe.local, "lr": setting.lr, "batch_size": setting.batch_size}}
        if setting.server_lr is not None:
            update["method"] = Named(**{**recipe.method.model_dump(), "server_lr": setting.server_lr})
        return recipe.model_copy(update=update)

    def _noise(self, setting: Setting) -> float:
        """The noise multiplier that these rounds and batches need on the real rows."""
        asked = self._with(setting)
        layer = bound(make_layers(asked)[0], asked, self.real, LocalSpec.make(asked.local, "local"))[self.at]
        assert isinstance(layer, DPSGD | DPFTRL | DPFedAvg) and layer.noise_multiplier is not None
        return layer.noise_multiplier


def _search(stage: _Stage, first: Setting, ways: Sequence[Way]) -> list[Tried]:
    """Rates far and near at a few counts of rounds, then a climb from the best along each thing in turn while the loss
    falls (between them lies a ridge that no climb crosses); the finalists on more seeds."""
    found, seed = dict[Setting, Tried](), stage.parts.recipe.seed

    def loss(setting: Setting) -> float:
        if setting not in found:
            try:
                found[setting] = stage.rehearse(setting, seed)
            except (RecipeError, CompositionError) as error:
                if setting == first:
                    raise
                progress.info("propose: %s: %s", setting, error)
                return float("inf")
            t = found[setting]
            progress.info("propose: %s: loss %.4g, %s %.4g", ", ".join(
                f"{k} {v:.4g}" for k, v in vars(setting).items() if v is not None), t.loss, stage.metric, t.score)
        return found[setting].loss

    loss(first)
    at = min((replace(first, rounds=first.rounds * r, lr=first.lr * f) for r in (1, 3) for f in FAR), key=loss)
    for _ in range(SWEEPS):
        before = at
        for more, less in ways:
            for way in (more, less):
                while loss(to := way(at)) < loss(at):
                    at = to
        if at == before:
            break
    finalists = [*sorted(found, key=lambda s: found[s].loss)[:FINALISTS], first]
    for setting in dict.fromkeys(finalists):
        all_ = [found[setting], *(stage.rehearse(setting, seed + i) for i in range(1, SEEDS))]
        found[setting] = replace(all_[0], seeds=SEEDS, loss=sum(t.loss for t in all_) / SEEDS,
                                 score=sum(t.score for t in all_) / SEEDS)
    return list(found.values())


_WAYS: tuple[Way, ...] = (
    (lambda s: replace(s, lr=s.lr * 3), lambda s: replace(s, lr=s.lr / 3)),
    (lambda s: replace(s, rounds=s.rounds * 2), lambda s: replace(s, rounds=max(1, s.rounds // 2))),
    (lambda s: replace(s, clip_norm=s.clip_norm / 3), lambda s: replace(s, clip_norm=s.clip_norm * 3)),
    (lambda s: _clipped(s, 1 / 3), lambda s: _clipped(s, 3)))
"""Of each thing that is chosen: more of it, and less."""
_BATCH: Way = (lambda s: replace(s, batch_size=s.batch_size * 4),
               lambda s: replace(s, batch_size=max(1, s.batch_size // 4)))
_SERVER: Way = (lambda s: replace(s, server_lr=(s.server_lr or 1) * 3),
                lambda s: replace(s, server_lr=(s.server_lr or 1) / 3))


def _clipped(s: Setting, by: float) -> Setting:
    """A clip that binds, and steps as long as they were."""
    if s.server_lr is not None:
        return replace(s, clip_norm=s.clip_norm * by, server_lr=s.server_lr / by)
    return replace(s, clip_norm=s.clip_norm * by, lr=s.lr / by)
