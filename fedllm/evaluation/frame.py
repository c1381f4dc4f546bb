"""A question as a run's model was taught to read one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import DataError
from fedllm.local.generate import prompt_ids
from fedllm.models.model import Model
from fedllm.runs.recipe import Recipe
from fedllm.tasks.chat import pieces, render
from fedllm.tasks.task import How
from fedllm.tasks.templates import asked, columns_of, prompt_columns


def framed(recipe: Recipe, text: str) -> str:
    """What somebody asks, in the frame that the model was trained on."""
    if recipe.data.source == "office":
        from fedllm.data.office import format_prompt

        return format_prompt(text)
    names = prompt_columns(recipe.data.template)
    fields = dict.fromkeys(columns_of(recipe.data.template) | set(names), "")
    fields |= {names[0]: text} if names else {}
    return asked(recipe.data.template, fields) if names else text


def prompt_of(recipe: Recipe, model: Model, turns: Sequence[Mapping[str, str]], new: int) -> np.ndarray:
    """The tokens of a talk up to where the model speaks, with room for `new` more; DataError for a second turn where
    the model was not taught to talk."""
    room = max(2, min(32_768, model.room - new))
    tokenizer: Any = model.tokenizer
    if recipe.data.template == "chat":
        ids = pieces(tokenizer, [render(tokenizer, turns, ask=True)], How(tokenizer).tokens)[0]
        return np.array(ids[-room:], np.int32)
    if len(turns) > 1:
        raise DataError(f"a question has further turns, and the run {recipe.name!r} was not trained on conversations "
                        "(data.template: chat); give one turn", kind="chat")
    return prompt_ids([framed(recipe, turns[0]["content"])], tokenizer, room)[0]
