"""A client's models: its own, to which its requests go, and the recipe's others by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.payload import Tree
from fedllm.engines.world import World
from fedllm.local.flops import book
from fedllm.local.requests import Complete, Request
from fedllm.models.endpoint import Completion, Usage
from fedllm.models.model import Model
from fedllm.models.sealed import Sealed
from fedllm.models.shelf import Shelf


class Holder:
    """The half of a client's call that knows which model answers it."""

    id: str
    model: Any
    used: dict[str, Usage]
    """What was asked of each model that has a name, by name."""
    _world: World
    _submit: Callable[[Request], Any]
    _called: str | None
    """The name of `model`; None: it is the recipe's main one."""

    @property
    def models(self) -> Shelf:
        """The recipe's models beside the main one, by name; an endpoint among them is asked by requests like any."""
        return Shelf({name: functools.partial(self._named, name) for name in self._world.models})

    def _named(self, name: str) -> Any:
        model = self._world.models[name]
        return model if isinstance(model, Model | Sealed) else Told(self.holding(name))

    def holding(self, name: str) -> Any:
        """The same client with another of the models for its own: requests go there, and rows are read as it does."""
        twin = copy.copy(self)  # streams, memory and ledger are the very same
        twin.model, twin._called = self._world.models[name], name
        twin._submit = lambda request: self._submit(request)  # what looks through us sees it too
        return twin

    def with_model(self, model: Any) -> Any:
        """The same client with a part of its own model (a narrower one) in its place: requests go there, and are booked
        as before."""
        twin = copy.copy(self)
        twin.model = model
        twin._submit = lambda request: self._submit(request)
        return twin

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, *,
                 theta: Tree | None = None, base: Tree | None = None) -> list[Completion]:
        """What the model (an endpoint too) says after each prompt, with its log-probability and what it cost."""
        return self._ask(Complete(self.id, self.model, theta or {}, base, prompts, max_new_tokens, temperature, seed))

    def _ask(self, request: Request) -> Any:
        """The answer, booked where the model has a name."""
        answer = self._submit(request)
        if self._called:
            book(self.used.setdefault(self._called, Usage()), request, answer)
        return answer


@dataclass(frozen=True)
class Told:
    """An endpoint as a client function sees it among the models: what it is asked is the client's request."""

    holder: Holder

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
                 ) -> list[Completion]:
        """Continue each prompt."""
        return self.holder.complete(prompts, max_new_tokens, temperature, seed)
