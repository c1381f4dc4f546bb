"""Talk to a run's model in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from fedllm.core.errors import RunError
from fedllm.core.payload import Tree
from fedllm.evaluation.frame import framed
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.models.model import Model
from fedllm.models.peft_io import load_adapter
from fedllm.runs.build import make_recipe_space, recipe_model
from fedllm.runs.products import BASE
from fedllm.runs.received import received
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result
from fedllm.tasks.chat import pieces, render
from fedllm.tasks.task import How
from fedllm.tasks.templates import prompt_columns


class Speaker:
    """A run's model, ready to continue prompts."""

    def __init__(self, path: str | Path, trust_remote_code: bool = False) -> None:
        """Raises RunError when the run has no adapter to talk to."""
        result = Result.load(path)
        adapter = result.adapter_path
        self.recipe = received(result.folder, trust_remote_code)
        if self.recipe.data.task != "generation":
            raise RunError(f"{path}: a classifier does not talk; `fedllm export` gives you the model")
        if adapter is None or adapter.name == "model":
            raise RunError(f"{path} has no adapter; `fedllm chat` needs a space beside the model's weights (lora, ia3, "
                           "prompts, adapter)")
        self.model = _model(self.recipe)
        self.theta = load_adapter(adapter, self.model)
        self.base: Tree | None = None
        if (adapter / BASE).exists():
            from safetensors.torch import load_file

            self.base = load_file(adapter / BASE)
        self.new = self.recipe.evaluate.max_new_tokens

    def say(self, text: str, *, temperature: float = 0.0, max_new_tokens: int | None = None, seed: int = 0,
            adapted: bool = True) -> str:
        """The model's continuation of `text`; `adapted=False` asks the base model instead."""
        return self._go_on(prompt_ids([text], self.model.tokenizer, self._room(max_new_tokens)), temperature,
                           max_new_tokens, seed, adapted)

    def answer(self, turns: Sequence[Mapping[str, str]], *, temperature: float = 0.0, max_new_tokens: int | None = None,
               seed: int = 0, adapted: bool = True) -> str:
        """The assistant's next turn by the model's chat template; too long a talk loses its oldest turns."""
        tokenizer: Any = self.model.tokenizer
        turns = list(turns)
        while True:
            ids = pieces(tokenizer, [render(tokenizer, turns, ask=True)], How(tokenizer).tokens)[0]
            if len(ids) <= self._room(max_new_tokens) or len(turns) < 3:
                break
            turns = turns[2:]
        return self._go_on([np.array(ids, np.int32)], temperature, max_new_tokens, seed, adapted)

    def _room(self, new: int | None) -> int:
        return max(2, min(32_768, self.model.room - (new or self.new)))

    def _go_on(self, ids: list[np.ndarray], temperature: float, new: int | None, seed: int, adapted: bool) -> str:
        theta = self.theta if adapted else self.model.initial()
        request = Generate("chat", self.model, theta, self.base if adapted else None, ids, new or self.new, temperature,
                           seed)
        tokenizer: Any = self.model.tokenizer
        return str(tokenizer.decode(run_generates([request], Limits())[0][0], skip_special_tokens=True))

    @property
    def talks(self) -> bool:
        """Whether the model was trained on conversations, so that it is given all that was said."""
        return self.recipe.data.template == "chat"

    def framed(self, text: str) -> str:
        """What was typed, in the frame that the model was trained on."""
        return framed(self.recipe, text)

    @property
    def empty(self) -> list[str]:
        """Fields of the frame that stay empty: what is typed goes into one."""
        return [] if self.recipe.data.source == "office" else prompt_columns(self.recipe.data.template)[1:]


def _model(recipe: Recipe) -> Model:
    space, _ = make_recipe_space(recipe)
    return recipe_model(recipe, space, "generation", device="auto")  # this machine need not be the run's


def chat(path: str | Path, console: Console, read: Callable[[], Iterator[str]], *, temperature: float,
         raw: bool, max_new_tokens: int | None = None, trust_remote_code: bool = False,
         put: Callable[[Mapping[str, Any]], None] | None = None) -> None:
    """Answer line after line until there are no more; `/base TEXT` asks the untrained model, `/new` forgets.

    `put` takes each answer as an object, in the place of the console.
    """
    speaker = Speaker(path, trust_remote_code)
    talks = speaker.talks and not raw
    greet = Console(quiet=True) if put else console
    greet.print(f"[dim]{escape(str(path))}: {escape(speaker.recipe.method.name)} on "
                  f"{escape(speaker.recipe.model.name)}. Empty line or Ctrl-D ends; /base TEXT asks the model before "
                  f"training{'; /new begins another talk' if talks else ''}.[/dim]")
    if speaker.empty and not raw:
        greet.print(f"[dim]What you type stands in the recipe's frame; its {', '.join(speaker.empty)} stays "
                      "empty.[/dim]")
    how: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    turns: list[dict[str, str]] = []
    for turn, line in enumerate(read()):
        if talks and line == "/new":
            turns = []
            continue
        base = line.startswith("/base ")
        text = line.removeprefix("/base ").replace("\\n", "\n")
        if talks:
            asked_now = [*turns, {"role": "user", "content": text}]
            said = speaker.answer(asked_now, seed=turn, adapted=not base, **how)
            turns = turns if base else [*asked_now, {"role": "assistant", "content": said.strip()}]
        else:
            said = speaker.say(text if raw else speaker.framed(text), seed=turn, adapted=not base, **how)
        if put:
            put({"typed": line, "model": "base" if base else "run", "answer": said.strip()})
            continue
        console.print(f"[cyan]{'base' if base else 'model'}>[/cyan] ", end="")
        console.print(said.strip() or "(nothing)", markup=False, highlight=False)
