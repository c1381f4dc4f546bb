"""A finished run's model, and the one that it began with, ready to be measured side by side."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.errors import RunError
from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.forward import run_losses, run_measures
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits, Losses, Measure, RowLosses
from fedllm.models.load import load_model
from fedllm.models.made import NAMES as BUILT
from fedllm.models.model import Model
from fedllm.models.peft_io import load_adapter
from fedllm.runs.build import make_recipe_space, recipe_model
from fedllm.runs.folder import RunFolder
from fedllm.runs.products import BASE
from fedllm.runs.received import received
from fedllm.runs.result import Result
from fedllm.spaces.registry import make_space

log = logging.getLogger("fedllm.progress")
KEPT = "evaluations"
"""Folder of a run that holds what was measured after it."""
LOT = 256
"""Prompts that are answered between two lines of progress."""


@dataclass(frozen=True)
class Arm:
    """A model with trainables in it."""

    model: Model
    theta: Tree
    base: Tree | None
    limits: Limits

    def losses(self, rows: Sequence[Encoded]) -> RowLosses:
        """Each row's loss, and the task's own figures."""
        return run_losses([Losses("evaluate", self.model, self.theta, self.base, rows, tested=True)], self.limits)[0]

    def measure(self, rows: Sequence[Encoded], fn: Callable[..., Any]) -> np.ndarray:
        """`fn(model, batch)`, a vector for each row [rows, width]."""
        return run_measures([Measure("evaluate", self.model, self.theta, self.base, rows, fn)], self.limits)[0]

    def say(self, prompts: Sequence[np.ndarray], new: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """What follows each prompt."""
        tokenizer: Any = self.model.tokenizer
        said: list[str] = []
        for at in range(0, len(prompts), LOT):
            part = prompts[at : at + LOT]
            ids = run_generates([Generate("evaluate", self.model, self.theta, self.base, part, new, temperature,
                                          seed + at)], self.limits)[0]
            said += [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
            if len(prompts) > LOT:
                log.info("%d of %d answers", len(said), len(prompts))
        return said


class Trained:
    """A finished run: `after` is its model, `before` the one that it began with."""

    def __init__(self, path: str | Path, trust_remote_code: bool = False) -> None:
        """RunError where the run left no single model that can be loaded again."""
        result = Result.load(path)
        self.folder, made = RunFolder.open(result.folder), result.adapter_path
        self.recipe = received(result.folder, trust_remote_code)
        if made is None:
            raise RunError(f"{path} left no single model that can be loaded: each client has its own, in "
                           f"{result.folder / 'clients'}; or it was deleted")
        if self.recipe.model.name in BUILT:
            raise RunError(f"{path}: 'fedllm evaluate' loads models of transformers, and {self.recipe.model.name!r} is "
                           f"built from the recipe; its weights lie in {made}")
        self.made = made
        self.limits = Limits(batch_tokens=self.recipe.engine.step_tokens)

    @cached_property
    def before(self) -> Arm:
        """The recipe's model as it was before the run."""
        space, _ = make_recipe_space(self.recipe)
        model = recipe_model(self.recipe, space, self.recipe.data.task, self.recipe.data.labels or (), device="auto")
        return Arm(model, model.initial(), None, self.limits)

    @cached_property
    def after(self) -> Arm:
        """What the run made of it."""
        m = self.recipe.model
        if self.made.name == "model":
            net = load_model(str(self.made), self.recipe.data.task, make_space("lora"), dtype=m.dtype, device="auto",
                             labels=self.recipe.data.labels or (), fast_kernels=m.fast_kernels, pooling=m.pooling,
                             trust_remote_code=m.trust_remote_code)
            return Arm(net, net.initial(), None, self.limits)
        base: Tree | None = None
        if (self.made / BASE).exists():
            from safetensors.torch import load_file

            base = load_file(self.made / BASE)
        return Arm(self.before.model, load_adapter(self.made, self.before.model), base, self.limits)

    def beside(self, name: str, suffix: str) -> Path:
        """The path of a file of this name under the run's `evaluations/`, which is made where it is missing."""
        folder, stem = self.folder.path / KEPT, re.sub(r"[^\w.+-]", "_", name)[:100].lstrip(".") or "evaluation"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{stem}{suffix}"

    def keep(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write `evaluations/NAME.json` into the run's folder; a name that is taken gets a number."""
        path, n = self.beside(name, ".json"), 2
        folder, stem = path.parent, path.stem
        while path.exists():
            path, n = folder / f"{stem}-{n}.json", n + 1
        self.folder.write_json(f"{KEPT}/{path.name}", value)
        return path
