"""A model of ours as a text model: prompts in, completions with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedllm.core.errors import RecipeError
from fedllm.core.payload import Tree
from fedllm.data.encode import IGNORE, Encoded
from fedllm.local.forward import run_losses
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import Complete, Generate, Limits, Losses
from fedllm.models.endpoint import SEEDS, Completion, TextModel, Usage
from fedllm.models.model import Model
from fedllm.models.sealed import opened


def as_text(model: Model | TextModel) -> TextModel:
    """The text model that `model` is, or that can be made of it."""
    return LocalText(model) if isinstance(model, Model) else model


class LocalText:
    """A model of ours as a text model; `theta` are trainables of its space (None: the bare base)."""

    def __init__(self, model: Model, theta: Tree | None = None, *, base: Tree | None = None,
                 limits: Limits | None = None) -> None:
        self.model, self.theta, self.base = model, theta or {}, base
        self.limits, self.usage = limits or Limits(), Usage()

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0) -> list[Completion]:
        """Continue each prompt; too long a prompt loses its start."""
        if not prompts:
            return []
        ids = prompt_ids(prompts, self.model.tokenizer, room(self.model, max_new_tokens))
        asked = [Generate("text", self.model, self.theta, self.base, [p], max_new_tokens, temperature,
                          (seed + i) % SEEDS) for i, p in enumerate(ids)]
        said = [rows[0] for rows in run_generates(asked, self.limits)]
        out = [Completion(self.model.tokenizer.decode(s, skip_special_tokens=True), lp, len(p), len(s))
               for p, s, lp in zip(ids, said, self._logprobs(ids, said), strict=True)]
        self.usage.book(out)
        return out

    def _logprobs(self, prompts: Sequence[np.ndarray], said: Sequence[Sequence[int]]) -> list[float]:
        """log p(answer | prompt), summed over the answer's tokens without the end token."""
        spoke = [i for i, s in enumerate(said) if s]
        out = [0.0] * len(said)
        rows = [continued(prompts[i], said[i]) for i in spoke]
        if rows:
            [got] = run_losses([Losses("text", self.model, self.theta, self.base, rows)], self.limits)
            for i, loss in zip(spoke, got.total, strict=True):
                out[i] = -float(loss)
        return out

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation: by the tokenizer's chat template, or its contents line by line."""
        if self.model.tokenizer.chat_template:
            return self.model.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return "\n".join(m["content"] for m in messages)


def room(model: Model, new: int) -> int:
    """Tokens that a prompt may have before so many new ones; RecipeError when it is none."""
    whole = model.net.config.max_position_embeddings
    if whole - new < 1:
        raise RecipeError(f"max_new_tokens = {new} leaves no room for a prompt in a context of {whole} tokens")
    return whole - new


def run_completes(requests: Sequence[Complete], limits: Limits) -> list[list[Completion]]:
    """What each request's model says after its prompts."""
    out = []
    for r in requests:
        inside = opened(r.model)
        teller = LocalText(inside, r.theta, base=r.base, limits=limits) if isinstance(inside, Model) else inside
        out.append(teller.complete(r.prompts, r.max_new_tokens, r.temperature, r.seed))
    return out


def continued(prompt: np.ndarray, said: Sequence[int]) -> Encoded:
    """The prompt and what was said, with only the latter to be scored."""
    tail = np.array(said, np.int64)
    labels = np.concatenate([np.full(len(prompt), IGNORE, np.int64), tail])
    return Encoded(np.concatenate([prompt, tail]).astype(np.int32), labels, len(tail))
