"""What a client learns from rows by requests: training, gradients, segments of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from fedllm.core.errors import CompositionError
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded, batches
from fedllm.data.federation import Row
from fedllm.data.order import PLACE, onward
from fedllm.engines.call import Call
from fedllm.local.moments import check_moments
from fedllm.local.objective import Objective, Side, check_side
from fedllm.local.objectives.registry import make_objective
from fedllm.local.objectives.task import Task
from fedllm.local.requests import Fit, Fitted, Sensitivity
from fedllm.local.segments import Backward, Forward, Slopes
from fedllm.local.terms import Term
from fedllm.models.segments import Segment


class Learning(Call):
    """The part of a client that trains."""

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
