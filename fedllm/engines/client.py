"""The client as its functions see it, for every engine: heavy work becomes requests."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.client import SERVER, ClientInfo, Profile
from fedllm.core.errors import CompositionError, RunError
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream, seed_of
from fedllm.data.encode import Encoded, batches
from fedllm.data.federation import Row
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_embeds, run_losses, run_outputs, run_probes
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import (
    Embed,
    Fit,
    Fitted,
    Generate,
    Limits,
    Losses,
    Outputs,
    Probe,
    Request,
    RowLosses,
    Sensitivity,
)
from fedllm.local.sensitivity import run_sensitivities
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Term
from fedllm.models.model import Model

RUNNERS: dict[type[Request], Callable[..., list[Any]]] = {
    Fit: run_fits, Losses: run_losses, Probe: run_probes, Generate: run_generates, Embed: run_embeds,
    Sensitivity: run_sensitivities, Outputs: run_outputs}


def carry_out(lot: Sequence[Request], limits: Limits) -> list[Any]:
    """The answers of requests that can share steps; RunError when their work does not fit into the device's memory."""
    try:
        return RUNNERS[type(lot[0])](lot, limits)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"a {type(lot[0]).__name__} of {len(lot)} client{'s' * (len(lot) > 1)} does not fit into the memory of "
            f"{lot[0].model.device}: lower engine.batch_tokens = {limits.batch_tokens} (fewer clients share a step), "
            f"local.batch_size or local.max_length ({str(error).splitlines()[0][:200]})") from None


class Bounds:
    """What its owner holds a client to; in a simulation nothing."""

    def spend(self, release: Any, count: int) -> None:
        """So many noisy releases are about to be made."""

    def work(self, steps: int, tokens: int = 0) -> None:
        """So much work is about to be done."""


FREE = Bounds()


class ClientCall:
    """One client during one call of one of its functions."""

    def __init__(self, info: ClientInfo, world: World, memory: MutableMapping[str, Any], round: int, phase: str,
                 visit: int, submit: Callable[[Request], Any], model: Model | None = None,
                 bounds: Bounds = FREE) -> None:
        """`model` is the one that this client holds; None: the world's."""
        self._bounds = bounds
        self.id, self.n, self.profile, self.model = info.id, info.n, info.profile, model or world.model
        self.memory, self.round = memory, round
        self._world, self._submit = world, submit
        step = phase.rpartition(".")[2]  # the function, without whose it is: methods compare on the same batches
        self._key = (world.seed, round, info.id, step, visit)
        self._streams: dict[str, np.random.Generator] = {}
        self._closed = ""

    @property
    def local(self) -> LocalSpec:
        """How the recipe has this client train in this round."""
        return self._world.local.at(self.round, self._world.rounds)

    @property
    def pace(self) -> float | None:
        """Seconds of one local step here, as the fleet declares it; None where time is real."""
        fleet = self._world.fleet
        return fleet.compute(self.profile, 1.0) if fleet else None

    @contextlib.contextmanager
    def through(self, change: Callable[[Request], Request], closed: str = "") -> Iterator[None]:
        """For layers: `change` sees every request made inside, and changes or refuses it.

        `closed` says why the functions above may not read the rows themselves (empty: they may).
        """
        before = self._submit, self._closed
        self._submit, self._closed = (lambda request: before[0](change(request))), closed or self._closed
        try:
            yield
        finally:
            self._submit, self._closed = before

    def _open_rows(self) -> None:
        if self._closed:
            raise CompositionError(self._closed)

    @property
    def data(self) -> Sequence[Mapping[str, Any]]:
        """The client's own training rows."""
        self._open_rows()
        return self._world.rows(self.id, "train")

    @property
    def public(self) -> Sequence[Encoded]:
        """The federation's public rows, tokenized."""
        return self._world.encoded(self.id, "public")

    def rng(self, owner: str) -> np.random.Generator:
        """This owner's stream for the present round and phase."""
        if owner not in self._streams:
            self._streams[owner] = numpy_stream(*self._key, owner)
        return self._streams[owner]

    def fit(self, theta: Tree, *, base: Tree | None = None, freeze: Sequence[str] = (), terms: Sequence[Term] = (),
            steps: int | None = None, on: Sequence[Row] | None = None) -> Fitted:
        """Train on the client's rows (or `on` others) as the recipe's `local` says; names that match a pattern in
        `freeze` stay."""
        spec = self.local
        rows = self._world.encoded(self.id, "train") if on is None else self._world.tokenized(on)
        shared = numpy_stream(self._world.seed, self.round, "batch order")  # all clients see short and long alike
        lengths, count = [len(e.ids) for e in rows], steps or spec.steps
        most = count or spec.count(len(rows))
        self._bounds.work(most, sum(lengths) * most * spec.batch_size // max(1, len(rows)))
        plan = batches(lengths, spec.batch_size, self.rng("batches"), shared, steps=count,
                       epochs=None if count else spec.epochs)
        return self._submit(Fit(self.id, self.model, theta, base, rows, plan, spec, tuple(freeze), tuple(terms)))

    def batches(self, steps: int) -> list[np.ndarray]:
        """Indices of the rows of `steps` batches, for methods with a local loop of their own."""
        self._open_rows()
        self._bounds.work(steps)
        spec, rows = self._world.local, self._world.encoded(self.id, "train")
        shared = numpy_stream(self._world.seed, self.round, "batch order")
        return batches([len(e.ids) for e in rows], spec.batch_size, self.rng("batches"), shared, steps=steps)

    def loss(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> float:
        """Mean loss per target on these training rows (None: all of them)."""
        return self._row_losses(theta, rows, base).mean

    def losses(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> np.ndarray:
        """Loss of `theta` on each of these training rows (None: all of them), per target."""
        got = self._row_losses(theta, rows, base)
        return got.total / np.maximum(1.0, got.count)

    def _row_losses(self, theta: Tree, rows: Sequence[int] | None, base: Tree | None) -> RowLosses:
        mine = self._world.encoded(self.id, "train")
        chosen = mine if rows is None else [mine[i] for i in rows]
        return self._submit(Losses(self.id, self.model, theta, base, chosen))

    @property
    def tokens(self) -> Sequence[Encoded]:
        """The client's own training rows, tokenized."""
        self._open_rows()
        return self._world.encoded(self.id, "train")

    def held_out(self, on: str = "local") -> Sequence[Mapping[str, Any]]:
        """The client's held-out rows, or those of the simulation's global test (`on="global"`)."""
        return self._world.rows(SERVER if on == "global" else self.id, "test")

    def probe(self, thetas: Sequence[Tree], rows: Sequence[int] | None = None, *, on: Sequence[Any] | None = None,
              base: Tree | None = None) -> list[RowLosses]:
        """Row losses of each of these trainables on the same training rows (or `on` others), in one forward."""
        if not thetas:
            return []
        mine = self._world.encoded(self.id, "train") if on is None else self._world.tokenized(on)
        chosen = mine if rows is None else [mine[i] for i in rows]
        return self._submit(Probe(self.id, self.model, thetas[0], base, chosen, tuple(thetas)))

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Rows as the model reads them."""
        return self._world.tokenized(rows, answers=True)

    def outputs(self, texts: Sequence[Tensor]) -> Tensor:
        """Class logits [texts, classes] of texts that are given as embeddings, each [T, d]; no gradient."""
        return self._submit(Outputs(self.id, self.model, {}, None, texts))

    def sensitivity(self, theta: Tree, rows: Sequence[int], *, base: Tree | None = None) -> Tree:
        """The mean of |d loss / d w| over these training rows, for every trainable w."""
        mine = self._world.encoded(self.id, "train")
        return self._submit(Sensitivity(self.id, self.model, theta, base, [mine[i] for i in rows]))

    def generate(self, prompts: Sequence[str], theta: Tree | None = None, *, base: Tree | None = None,
                 max_new_tokens: int | None = None, temperature: float = 0.0) -> list[str]:
        """Continuations of the prompts as text, greedy at temperature 0."""
        ids = prompt_ids(prompts, self.model.tokenizer, self._world.local.max_length)
        return self._continue(ids, theta or {}, base, max_new_tokens or self._world.max_new_tokens, temperature)

    def _continue(self, ids: Sequence[np.ndarray], theta: Tree, base: Tree | None, new: int,
                  temperature: float = 0.0) -> list[str]:
        seed = seed_of(*self._key, "generate")
        said = self._submit(Generate(self.id, self.model, theta, base, ids, new, temperature, seed))
        return [self.model.tokenizer.decode(s, skip_special_tokens=True) for s in said]

    def embed(self, texts: Sequence[str], theta: Tree | None = None) -> np.ndarray:
        """Mean-pooled last hidden states, fp32 [len(texts), hidden]."""
        rows = prompt_ids(texts, self.model.tokenizer, self._world.local.max_length)
        return self._submit(Embed(self.id, self.model, theta or {}, None, [Encoded(r, 0, 0) for r in rows]))

    def score(self, theta: Tree, *, base: Tree | None = None, on: str = "local",
              only: Mapping[str, str] | None = None) -> dict[str, float]:
        """Metrics on the client's held-out rows, or on the simulation's global test (`on="global"`); `only` keeps the
        rows whose columns say this."""
        who = SERVER if on == "global" else self.id
        rows, encoded = self._world.rows(who, "test"), self._world.encoded(who, "test")
        if only:
            kept = [i for i, row in enumerate(rows) if all(str(row.get(k, "")) == v for k, v in only.items())]
            rows, encoded = [rows[i] for i in kept], [encoded[i] for i in kept]
        if not rows:
            return {"n": 0}
        got = self._submit(Losses(self.id, self.model, theta, base, encoded))
        metrics = {"loss": got.mean, "n": len(rows)}
        if self.model.task == "classification":
            metrics["accuracy"] = float(got.correct.sum() / max(1.0, got.count.sum()))
        elif self._world.exact_match:
            said = self._continue([e.prompt for e in encoded], theta, base, self._world.max_new_tokens)
            hits = [same_answer(s, r["response"]) for s, r in zip(said, rows, strict=True)]
            metrics["exact_match"] = sum(hits) / len(hits)
        return metrics

    def spend(self, release: Any, count: int = 1) -> None:
        """For layers: so many noisy releases are about to leave; a real site books them, or refuses."""
        self._bounds.spend(release, count)

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)` of a pure function, computed once for all clients of this process."""
        return self._world.once(fn, *args)


def same_answer(said: str, wanted: str) -> bool:
    """Equal up to white space."""
    return re.sub(r"\s+", " ", said).strip() == re.sub(r"\s+", " ", wanted).strip()


def server_info() -> ClientInfo:
    """The server as a client of its own engine."""
    return ClientInfo(SERVER, 0, Profile())
