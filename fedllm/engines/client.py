"""The client as its functions see it, for every engine: heavy work becomes requests."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.client import SERVER, ClientInfo, Profile
from fedllm.core.errors import CompositionError, RunError, Withheld
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream, seed_of
from fedllm.data.encode import Encoded, batches
from fedllm.data.federation import Row
from fedllm.data.order import PLACE, onward
from fedllm.engines.holder import Holder
from fedllm.engines.world import World
from fedllm.environments.env import Bounded
from fedllm.environments.registry import bounded
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_embeds, run_logits, run_losses, run_measures, run_outputs, run_probes
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.moments import check_moments
from fedllm.local.objective import Objective, Side, check_side
from fedllm.local.objectives.registry import make_objective
from fedllm.local.objectives.task import Task
from fedllm.local.policy import Episode, Improve, Rollout, run_improves, run_rollouts
from fedllm.local.requests import (
    Booked,
    Complete,
    Embed,
    Fit,
    Fitted,
    Generate,
    Limits,
    Logits,
    Losses,
    Measure,
    Outputs,
    Probe,
    Request,
    RowLosses,
    Sensitivity,
)
from fedllm.local.segments import Backward, Forward, Slopes, run_backwards, run_forwards
from fedllm.local.sensitivity import run_sensitivities
from fedllm.local.spec import LocalSpec
from fedllm.local.summed import Summed, run_sums
from fedllm.local.terms import Term
from fedllm.local.text import run_completes
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.models.sealed import Sealed
from fedllm.models.segments import Segment
from fedllm.tasks.answers import judge_of, judges_of, listed
from fedllm.tasks.choices import FIGURE, options, picked

RUNNERS: dict[type[Request], Callable[..., list[Any]]] = {
    Fit: run_fits, Summed: run_sums, Losses: run_losses, Probe: run_probes, Generate: run_generates, Embed: run_embeds,
    Sensitivity: run_sensitivities, Outputs: run_outputs, Logits: run_logits, Measure: run_measures,
    Rollout: run_rollouts, Improve: run_improves, Complete: run_completes, Forward: run_forwards,
    Backward: run_backwards,
    Booked: lambda requests, limits: [None] * len(requests)}


def carry_out(lot: Sequence[Request], limits: Limits) -> list[Any]:
    """The answers of requests that can share steps; RunError when their work does not fit into the device's memory."""
    try:
        return RUNNERS[type(lot[0])](lot, limits)
    except torch.OutOfMemoryError as error:
        most = limits.learned(lot[0].model)
        raise RunError(
            f"a {type(lot[0]).__name__} of {len(lot)} client{'s' * (len(lot) > 1)} does not fit into the memory of "
            f"{lot[0].model.device}: lower engine.batch_tokens = {most} (fewer clients share a step), "
            f"local.batch_size or local.max_length ({str(error).splitlines()[0][:200]})") from None


class Session(dict[str, Any]):
    """A client's scratch of one round: handed from one of its functions to the next, gone when the round ends."""

    def __missing__(self, key: str) -> Any:
        raise Withheld(f"'{key}' is not in this round's scratch: nothing put it there, or another process did (a site "
                       "that was started again; engine ray, whose workers keep none)")


class Bounds:
    """What its owner holds a client to; in a simulation nothing."""

    def spend(self, release: Any, count: int) -> None:
        """So many noisy releases are about to be made."""

    def work(self, steps: int, tokens: int = 0) -> None:
        """So much work is about to be done."""


FREE = Bounds()


class ClientCall(Holder):
    """One client during one call of one of its functions."""

    def __init__(self, info: ClientInfo, world: World, memory: MutableMapping[str, Any], round: int, phase: str,
                 visit: int, submit: Callable[[Request], Any], model: Model | None = None,
                 session: Session | None = None, bounds: Bounds = FREE) -> None:
        """`model` is the one that this client holds; None: the world's."""
        self._bounds = bounds
        self.id, self.n, self.profile, self.model = info.id, info.n, info.profile, model or world.model
        self.memory, self.round, self.session = memory, round, Session() if session is None else session
        self._world, self._submit = world, submit
        step = phase.rpartition(".")[2]  # the function, without whose it is: methods compare on the same batches
        self._key = (world.seed, round, info.id, step, visit)
        self._streams: dict[str, np.random.Generator] = {}
        self._closed, self._stepped = "", 0
        self._called, self.used = info.profile.model, {}

    @property
    def training(self) -> LocalSpec:
        """How the recipe has this client train in this round."""
        return self._local(self.n or sum(c.n for c in self._world.infos()))  # the server counts everybody's rows

    def _local(self, rows: int) -> LocalSpec:
        return self._world.local.at(self.round, self._world.rounds, rows, self._stepped)

    @property
    def pace(self) -> float | None:
        """Seconds of one local step here, as the fleet declares it; None where time is real."""
        fleet = self._world.fleet
        return fleet.compute(self.profile, 1.0) if fleet else None

    @contextlib.contextmanager
    def through(self, change: Callable[[Request], Request], closed: str = "",
                heard: Callable[[Any], None] = lambda answer: None) -> Iterator[None]:
        """For layers: `change` sees every request made inside, and changes or refuses it; `heard` is told each answer.

        `closed` says why the functions above may not read the rows themselves (empty: they may).
        """
        before = self._submit, self._closed

        def submit(request: Request) -> Any:
            answer = before[0](change(request))
            heard(answer)
            return answer

        self._submit, self._closed = submit, closed or self._closed
        try:
            yield
        finally:
            self._submit, self._closed = before

    def keep(self, payload: Mapping[str, Any]) -> None:
        """Raise where a payload that crosses the wire holds a tensor of a stream that is personal."""
        if self.id != SERVER and isinstance(self.model, Model | Sealed) and (found := self.model.withheld(payload)):
            raise CompositionError(f"stream '{found[1]}' is personal and cannot be put on the wire, where "
                                   f"'{self._key[3]}' puts it under '{found[0]}'; keep it in client.memory, or take it "
                                   "out of space.personal")

    def _open_rows(self) -> None:
        if self._closed:
            raise CompositionError(self._closed)

    def _encoded(self, part: str) -> list[Encoded]:
        return self._world.encoded(self.id, part, self.model)

    @property
    def data(self) -> Sequence[Mapping[str, Any]]:
        """The client's own training rows."""
        self._open_rows()
        return self._world.rows(self.id, "train")

    @property
    def public(self) -> Sequence[Encoded]:
        """The federation's public rows, tokenized."""
        return self._encoded("public")

    def rng(self, owner: str) -> np.random.Generator:
        """This owner's stream for the present round and phase."""
        if owner not in self._streams:
            self._streams[owner] = numpy_stream(*self._key, owner)
        return self._streams[owner]

    def fit(self, theta: Tree, *, base: Tree | None = None, freeze: Sequence[str] = (), terms: Sequence[Term] = (),
            steps: int | None = None, on: Sequence[Row] | None = None, objective: Objective | str | None = None,
            side: Side | None = None, moments: Tree | Literal[False] | None = False, rate: float = 1.0) -> Fitted:
        """Train on the client's rows (or `on` others) as the recipe's `local` says; names that match a pattern in
        `freeze` stay. `objective` (with its `side`, an entry a row) takes the place of the task's own loss; with
        `moments` (None at first) the optimizer goes on where it was; `rate` is so many times the recipe's own."""
        rows = self._encoded("train") if on is None else self._world.tokenized(on, model=self.model)
        spec = self._local(self.n or len(rows))
        spec = spec if rate == 1 else replace(spec, lr=spec.lr * rate)
        goal = make_objective(objective) if isinstance(objective, str) else objective or Task()
        check_side(goal, side or {}, len(rows))
        beside = {n: self._world.tokenized(v, True, self.model) if len(v) and isinstance(v[0], Mapping) else v
                  for n, v in (side or {}).items()}
        still = (*freeze, *(f"{s}/*" for s in self.model.space.frozen))
        if moments:
            trained = {n: t for n, t in theta.items() if not any(fnmatch.fnmatch(n, f) for f in still)}
            check_moments(moments, trained, spec)
        shared = numpy_stream(self._world.seed, self.round, "batch order")  # all clients see short and long alike
        lengths, count = [len(e.ids) for e in rows], steps or spec.steps
        most = count or spec.count(len(rows))
        each = sum(lengths) + sum(len(e.ids) for v in beside.values() for e in v if isinstance(e, Encoded))
        self._bounds.work(most, each * most * spec.lot // max(1, len(rows)))
        if spec.order == "stream" and on is None:
            plan = self._onward(len(rows), spec.lot, most)
        else:
            plan = batches(lengths, spec.lot, self.rng("batches"), shared, steps=count,
                           epochs=None if count else spec.epochs)
        self._stepped += len(plan)
        draws = spec.neftune is not None or self.model.space.draws
        noise = int(self.rng("noise").integers(2**62)) if draws else None
        return self._ask(Fit(self.id, self.model, theta, base, rows, plan, spec, still, tuple(terms),
                             objective=goal, side=beside, moments=moments if moments or moments is False else None,
                             noise=noise))

    def batches(self, steps: int) -> list[np.ndarray]:
        """Indices of the rows of `steps` batches, for methods with a local loop of their own."""
        self._open_rows()
        self._bounds.work(steps)
        spec, rows = self._world.local, self._encoded("train")
        if spec.order == "stream":
            return self._onward(len(rows), spec.lot, steps)
        shared = numpy_stream(self._world.seed, self.round, "batch order")
        return batches([len(e.ids) for e in rows], spec.lot, self.rng("batches"), shared, steps=steps)

    def _onward(self, rows: int, lot: int, steps: int) -> list[np.ndarray]:
        """So many batches from where the last ones that counted ended."""
        def order(epoch: int) -> np.ndarray:
            return numpy_stream(self._world.seed, self.id, PLACE, epoch).permutation(rows)

        plan, self.memory[PLACE] = onward(rows, lot, steps, self.memory.get(PLACE), order)
        return plan

    def loss(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> float:
        """Mean loss per target on these training rows (None: all of them)."""
        return self._row_losses(theta, rows, base).mean

    def losses(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> np.ndarray:
        """Loss of `theta` on each of these training rows (None: all of them), per target."""
        got = self._row_losses(theta, rows, base)
        return got.total / np.maximum(1.0, got.count)

    def _row_losses(self, theta: Tree, rows: Sequence[int] | None, base: Tree | None) -> RowLosses:
        mine = self._encoded("train")
        chosen = mine if rows is None else [mine[i] for i in rows]
        return self._ask(Losses(self.id, self.model, theta, base, chosen))

    @property
    def tokens(self) -> Sequence[Encoded]:
        """The client's own training rows, tokenized."""
        self._open_rows()
        return self._encoded("train")

    def held_out(self, on: str = "local") -> Sequence[Mapping[str, Any]]:
        """The client's held-out rows, or those of the simulation's global test (`on="global"`)."""
        return self._world.rows(SERVER if on == "global" else self.id, "test")

    def probe(self, thetas: Sequence[Tree], rows: Sequence[int] | None = None, *, on: Sequence[Any] | None = None,
              base: Tree | None = None) -> list[RowLosses]:
        """Row losses of each of these trainables on the same training rows (or `on` others), in one forward."""
        if not thetas:
            return []
        mine = self._encoded("train") if on is None else self._world.tokenized(on, model=self.model)
        chosen = mine if rows is None else [mine[i] for i in rows]
        return self._ask(Probe(self.id, self.model, thetas[0], base, chosen, tuple(thetas)))

    def measure(self, theta: Tree, rows: Sequence[Any], fn: Callable[[Model, Batch], Tensor], *,
                base: Tree | None = None) -> np.ndarray:
        """`fn(model, batch)`, a vector for each of these rows [rows, width], without a gradient; of text rows the
        answer alone counts as target. Clients that give the same function share a forward."""
        if not len(rows):
            return np.zeros((0, 0))
        return self._ask(Measure(self.id, self.model, theta, base, self._world.tokenized(rows, True, self.model), fn))

    def book(self, *, tokens: int, steps: float, flops: float = 0.0) -> None:
        """Count work that this function does by itself, before it does it: `steps` as local steps, of `fit`'s size."""
        self._bounds.work(math.ceil(steps), tokens)
        self._ask(Booked(self.id, self.model, {}, None, tokens, steps, flops))

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Rows as the model reads them."""
        return self._world.tokenized(rows, True, self.model)

    def outputs(self, texts: Sequence[Tensor]) -> Tensor:
        """Class logits [texts, classes] of texts that are given as embeddings, each [T, d]; no gradient."""
        return self._ask(Outputs(self.id, self.model, {}, None, texts))

    def logits(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> list[np.ndarray]:
        """What the head says of each of these training rows (None: all): [classes], or [T, classes] where tokens have
        classes; no gradient."""
        if self.model.rules.net not in ("pooled", "tokens", "dual"):
            raise CompositionError(f"data.task = {self.model.task!r} has no classes; client.logits is for "
                                   "classification, tokens, regression and image_text")
        self._open_rows()
        mine = self._encoded("train")
        return self._ask(Logits(self.id, self.model, theta, base, mine if rows is None else [mine[i] for i in rows]))

    def forward(self, segment: Segment, theta: Tree, x: Tensor, mask: Tensor, *, base: Tree | None = None) -> Tensor:
        """States [B, T, d] after one segment of the model, of token ids [B, T] or states [B, T, d]."""
        return self._ask(Forward(self.id, self.model, theta, base, segment, x, mask))

    def backward(self, segment: Segment, theta: Tree, x: Tensor, mask: Tensor, g: Tensor | None = None, *,
                 labels: Tensor | None = None, base: Tree | None = None, times: float = 1.0) -> Slopes:
        """The gradients of that forward from `g`, dL/d(its states), or at the last segment from its `labels` [B, T],
        whose mean loss counts so many `times`."""
        if (g is None) == (labels is None) or (labels is not None and not segment.last):
            raise CompositionError("backward takes either g or, at the last segment, labels")
        self._bounds.work(1)
        return self._ask(Backward(self.id, self.model, theta, base, segment, x, mask, g, labels, times))

    def sensitivity(self, theta: Tree, rows: Sequence[int], *, base: Tree | None = None) -> Tree:
        """The mean of |d loss / d w| over these training rows, for every trainable w."""
        mine = self._encoded("train")
        return self._ask(Sensitivity(self.id, self.model, theta, base, [mine[i] for i in rows]))

    def gradient(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> Tree:
        """The mean over these training rows (None: all) of d loss(row) / d w, for every trainable w."""
        self._open_rows()
        mine = self._encoded("train")
        some = mine if rows is None else [mine[i] for i in rows]
        return self._ask(Sensitivity(self.id, self.model, theta, base, some, signed=True))

    def generate(self, prompts: Sequence[str], theta: Tree | None = None, *, base: Tree | None = None,
                 max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """Continuations of the prompts as text, greedy at temperature 0."""
        ids = prompt_ids(prompts, self.model.tokenizer, self._world.local.max_length)
        return self._continue(ids, theta or {}, base, max_new_tokens or self._world.max_new_tokens, temperature)

    def _continue(self, ids: Sequence[np.ndarray], theta: Tree, base: Tree | None, new: int,
                  temperature: float = 0.0) -> list[str]:
        seed = seed_of(*self._key, "generate")
        said = self._ask(Generate(self.id, self.model, theta, base, ids, new, temperature, seed))
        return [self.model.tokenizer.decode(s, skip_special_tokens=True) for s in said]

    def embed(self, texts: Sequence[str], theta: Tree | None = None) -> np.ndarray:
        """Mean-pooled last hidden states, fp32 [len(texts), hidden]."""
        rows = prompt_ids(texts, self.model.tokenizer, self._world.local.max_length)
        return self._ask(Embed(self.id, self.model, theta or {}, None, [Encoded(r, 0, 0) for r in rows]))

    def score(self, theta: Tree, *, base: Tree | None = None, on: str = "local",
              only: Mapping[str, str] | None = None) -> dict[str, float]:
        """Metrics on the client's held-out rows, or on the simulation's global test (`on="global"`); `only` keeps the
        rows whose columns say this."""
        who = SERVER if on == "global" else self.id
        rows, encoded = self._world.rows(who, "test"), self._world.encoded(who, "test", self.model)
        if only:
            kept = [i for i, row in enumerate(rows) if all(str(row.get(k, "")) == v for k, v in only.items())]
            rows, encoded = [rows[i] for i in kept], [encoded[i] for i in kept]
        if not rows:
            return {"n": 0}
        got = self._ask(Losses(self.id, self.model, theta, base, encoded, tested=True))
        metrics = {"loss": got.mean, "n": len(rows), **self.model.measured(got.figures)}
        return metrics | (self._answers(rows, encoded, theta, base) if self.model.rules.speaks else {})

    def _answers(self, rows: Sequence[Row], encoded: Sequence[Encoded], theta: Tree, base: Tree | None
                 ) -> dict[str, float]:
        """How many answers are right, by each of the recipe's metrics."""
        judges, made = judges_of(self._world.metric), options(rows) if "choice" in listed(self._world.metric) else []
        found = {}
        if self._world.exact_match:
            said = self._continue([e.prompt for e in encoded], theta, base, self._world.max_new_tokens)
            found = {name: sum(right(s, r["response"]) for s, r in zip(said, rows, strict=True)) / len(rows)
                     for name, right in judges.items()}
        if made:
            each = self._world.tokenized([row for many, _ in made for row in many], True, self.model)
            got = self._ask(Losses(self.id, self.model, theta, base, each))
            found[FIGURE] = sum(picked(got.total, made)) / len(rows)
        return found

    def judged(self, said: str, wanted: str) -> float:
        """How right an answer is, from 0 to 1, by the first metric that the recipe names (`evaluate.metric`)."""
        return float(judge_of(listed(self._world.metric)[0])[1](said, wanted))

    def env(self, rng: np.random.Generator, row: Mapping[str, Any] | None = None) -> Bounded:
        """The client's environment (of several the first, or that of `row`); its episodes are seeded by `rng`."""
        return bounded(self.data[0] if row is None else row, rng)

    def rollout(self, theta: Tree, episodes: int, *, rng: np.random.Generator | None = None, greedy: bool = False,
                on: Sequence[Mapping[str, Any]] | None = None) -> list[Episode]:
        """So many episodes in the client's environment (in each, where it has several), or in each of those of the rows
        `on`; without `rng` their seeds are the same whoever asks and whenever, for tests."""
        rows = list(self.data if on is None else on)
        draw = rng or np.random.default_rng(0)
        seeds = draw.integers(2**31, size=len(rows) * episodes).tolist()
        envs = [bounded(row, draw) for row in rows for _ in range(episodes)]
        return self._ask(Rollout(self.id, self.model, theta, None, envs, seeds, greedy))

    def improve(self, theta: Tree, seen: np.ndarray, actions: np.ndarray, weights: np.ndarray, *,
                steps: int = 1) -> Fitted:
        """Policy-gradient steps on what was done, by the recipe's optimizer."""
        self._bounds.work(steps, steps * len(actions))
        return self._ask(Improve(self.id, self.model, theta, None, seen, actions, weights, self.training, steps))

    def spend(self, release: Any, count: int = 1) -> None:
        """For layers: so many noisy releases are about to leave; a real site books them, or refuses."""
        self._bounds.spend(release, count)

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)` of a pure function, computed once for all clients of this process."""
        return self._world.once(fn, *args)


def server_info() -> ClientInfo:
    """The server as a client of its own engine."""
    return ClientInfo(SERVER, 0, Profile())
