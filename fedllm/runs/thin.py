"""How much of a run its plan tries out: less of it the larger the model is, and what the rest weighs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm.data.memory import memory
from fedllm.local.flops import cost_of
from fedllm.models.load import DTYPES, resolve
from fedllm.models.model import Model
from fedllm.models.size import STEP, Sizes, weights
from fedllm.runs.build import Parts
from fedllm.runs.progress import log as progress
from fedllm.runs.recipe import Recipe
from fedllm.tasks.registry import task_of

PROBED = 16
"""Clients in the slice: the vectorized engine's step is full with as many."""
TEST_ROWS, CLIENT_ROWS = 64, 16
OPERATIONS, OF_TESTS = 1.5e12, 0.4e12
"""What trying out rounds may cost, and each of two tests: some 15 and 5 seconds of one core."""
PROCESS = 450 << 20
"""Bytes of Python, torch and transformers."""


@dataclass(frozen=True)
class Thin:
    """How thin the slice is."""

    clients: int = PROBED
    more: int = 3
    """Steps of the longer round."""
    batch: int | None = None
    """Rows of its steps, where they are fewer than the recipe's."""
    times: float = 1.0
    """A whole step's time by one of the slice's."""
    missing: int = 0
    """Bytes that a whole step holds beyond one of the slice's."""
    test_rows: int = TEST_ROWS
    client_rows: int = CLIENT_ROWS

    @classmethod
    def of(cls, parts: Parts, asked: int, more: int) -> Thin:
        """As much as the operations allow; the recipe's own batches where they do."""
        world, model = parts.world, parts.world.model
        infos = sorted(world.infos(), key=lambda c: c.n)
        if not isinstance(model, Model) or world.federation.acts or not infos:
            return cls(more=more)
        rows = world.encoded(infos[len(infos) // 2].id, "train")[:TEST_ROWS]
        cost, b = cost_of(model, model.initial()), world.local.batch_size
        tokens = sum(len(e.ids) for e in rows) / len(rows)
        each = cost.of([(len(e.ids), e.n_target) for e in rows], train=True).flops / len(rows)
        clients, least = max(1, min(PROBED, asked, len(infos))), min(2, asked, len(infos))
        if clients * (3 + more) * b * each > OPERATIONS:
            more = 3
            clients = max(least, min(clients, int(OPERATIONS / (6 * b * each))))
        thin = max(1, min(b, int(OPERATIONS / (6 * clients * each))))
        sizes = Sizes.of(getattr(model.net, "config", None))
        left = (b - thin) * tokens * (sizes.learned if sizes else 0)
        new = world.max_new_tokens if world.exact_match and model.rules.speaks else 0
        tested = cost.of([(len(e.ids) + new, e.n_target + new) for e in rows], train=False).flops / len(rows)
        tests = max(4, int(OF_TESTS / tested)) // (2 if new else 1)
        return cls(clients, more, thin if thin < b else None, b / thin, int(left), min(TEST_ROWS, tests),
                   max(1, min(CLIENT_ROWS, tests // clients)))

    def local(self, parts: Parts) -> Parts:
        """The parts with the slice's batches."""
        if self.batch is None:
            return parts
        return replace(parts, world=replace(parts.world, local=replace(parts.world.local, batch_size=self.batch)))


def say_size(recipe: Recipe) -> None:
    """Tell what a model of a folder weighs, and what a run of it will hold, before it is loaded."""
    folder = Path(resolve(recipe.model.name)) if recipe.data.task != "environment" else Path()
    if not (folder / "config.json").exists():
        return
    from transformers import AutoConfig

    with contextlib.suppress(Exception):  # whatever is wrong with it, loading says better
        config = AutoConfig.from_pretrained(str(folder))
        count, item = weights(config, task_of(recipe.data.task).net == "causal"), DTYPES[recipe.model.dtype].itemsize
        held = PROCESS + count * item + STEP
        progress.info("plan: the model has %.1f M weights, %.2f GB; a run of it takes some %.1f GB of this machine's "
                      "%.1f", count / 1e6, count * item / 1e9, held / 1e9, memory() / 1e9)
