"""What a client reads off a model by requests: losses, figures, text, scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.payload import Tree
from fedllm.core.rng import seed_of
from fedllm.data.encode import Encoded
from fedllm.data.federation import Row
from fedllm.engines.call import Call
from fedllm.local.generate import prompt_ids
from fedllm.local.requests import Embed, Generate, Logits, Losses, Measure, Outputs, Probe, RowLosses
from fedllm.models.batch import Batch
from fedllm.models.model import Model
from fedllm.tasks.answers import judge_of, judges_of, listed
from fedllm.tasks.chat import wanted
from fedllm.tasks.choices import FIGURE, options, picked


class Reading(Call):
    """The part of a client that asks a model and trains nothing."""

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
            wants = [wanted(row, self.model.tokenizer) for row in rows]
            found = {name: sum(right(s, want) for s, want in zip(said, wants, strict=True)) / len(rows)
                     for name, right in judges.items()}
        if made:
            each = self._world.tokenized([row for many, _ in made for row in many], True, self.model)
            got = self._ask(Losses(self.id, self.model, theta, base, each))
            found[FIGURE] = sum(picked(got.total, made)) / len(rows)
        return found

    def judged(self, said: str, wanted: str) -> float:
        """How right an answer is, from 0 to 1, by the first metric that the recipe names (`evaluate.metric`)."""
        return float(judge_of(listed(self._world.metric)[0])[1](said, wanted))
