"""Talk to a run's model in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from fedllm.core.errors import RunError
from fedllm.core.payload import Tree
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.models.model import Model
from fedllm.models.peft_io import load_adapter
from fedllm.runs.build import make_recipe_space, recipe_model
from fedllm.runs.products import BASE
from fedllm.runs.recipe import Recipe, received
from fedllm.runs.result import Result
from fedllm.tasks.templates import template


class Speaker:
    """A run's model, ready to continue prompts."""

    def __init__(self, path: str | Path, trust_remote_code: bool = False) -> None:
        """Raises RunError when the run has no adapter to talk to."""
        result = Result.load(path)
        adapter = result.folder / "adapter"
        self.recipe = received(result.folder, trust_remote_code)
        if self.recipe.data.task != "generation":
            raise RunError(f"{path}: a classifier does not talk; `fedllm export` gives you the model")
        if not adapter.is_dir():
            raise RunError(f"{path} has no adapter; `fedllm chat` needs a space that PEFT has (lora, ia3, prompts)")
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
        tokenizer: Any = self.model.tokenizer
        ids = prompt_ids([text], tokenizer, 4096)
        theta = self.theta if adapted else self.model.initial()
        request = Generate("chat", self.model, theta, self.base if adapted else None, ids, max_new_tokens or self.new,
                           temperature, seed)
        return str(tokenizer.decode(run_generates([request], Limits())[0][0], skip_special_tokens=True))

    def framed(self, text: str) -> str:
        """What was typed, in the frame that the model was trained on, where the recipe has one that fits."""
        if self.recipe.data.source == "office":
            from fedllm.data.office import format_prompt

            return format_prompt(text)
        named = self.recipe.data.template
        if named in ("alpaca", "question_answer"):
            fields = {"question": text, "answer": "", "instruction": text, "input": "", "output": ""}
            return str(template(named)(fields, "what you typed")["prompt"])
        return text


def _model(recipe: Recipe) -> Model:
    space, _ = make_recipe_space(recipe)
    return recipe_model(recipe, space, "generation", device="auto")  # this machine need not be the run's


def chat(path: str | Path, console: Console, read: Callable[[], Iterator[str]], *, temperature: float,
         raw: bool, trust_remote_code: bool = False) -> None:
    """Answer line after line until there are no more; `/base TEXT` asks the untrained model."""
    speaker = Speaker(path, trust_remote_code)
    console.print(f"[dim]{path}: {speaker.recipe.method.name} on {speaker.recipe.model.name}. "
                  "Empty line or Ctrl-D ends; /base TEXT asks the model before training.[/dim]")
    for turn, line in enumerate(read()):
        base = line.startswith("/base ")
        text = line.removeprefix("/base ").replace("\\n", "\n")
        said = speaker.say(text if raw else speaker.framed(text), temperature=temperature, seed=turn, adapted=not base)
        console.print(f"[cyan]{'base' if base else 'model'}>[/cyan] ", end="")
        console.print(said.strip() or "(nothing)", markup=False, highlight=False)
