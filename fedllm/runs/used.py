"""What models with a name cost: each answer tells what its client asked of them, and the run adds it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from fedllm.core.ask import Ask, Program
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload
from fedllm.privacy.dp_sgd import BOOK
from fedllm.runs.recipe import Recipe

TOLD = ("calls", "prompt_tokens", "completion_tokens")
NOTE = "used/"


class ModelUsage(Layer):
    """Stands under all layers that change a reply; an answer that did not count has cost all the same, at its place.

    A call is one row or one prompt. A client that keeps a ledger of privacy tells nothing. Tests are not counted, as
    an energy meter does not count them.
    """

    optional = at_home = True

    def __init__(self, prices: Mapping[str, tuple[float, float]] | None = None) -> None:
        """`prices`: of some models, what a million tokens read and said cost."""
        self.prices = prices or {}

    def init(self) -> dict[str, Any]:
        return {"total": {}, "round": {}}

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        reply = call(msg)
        if client.memory.get(BOOK):  # what its rows cost would be a release that no ledger holds
            return reply
        return {**reply, **{f"note/{NOTE}{name}": torch.tensor([getattr(u, t) for t in TOLD], dtype=torch.float64)
                            for name, u in sorted(client.used.items())}}

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        out = yield ask
        for note in out.notes.values():
            for key, told in note.items():
                if key.startswith(NOTE) and isinstance(told, torch.Tensor) and told.shape == (len(TOLD),):
                    _add(state["round"], key.removeprefix(NOTE), told.tolist())
        return out

    def facts(self, state: MutableMapping[str, Any]) -> Mapping[str, Any] | None:
        """The round's ledger, which goes to the total."""
        mine, state["round"] = state["round"], {}
        for name, told in mine.items():
            _add(state["total"], name, told)
        return {"models": self._named(mine)} if mine else None

    def report(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        total = {name: list(told) for name, told in state["total"].items()}
        for name, told in state["round"].items():
            _add(total, name, told)
        return self._named(total)

    def _named(self, ledger: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
        return {name: {t: int(v) for t, v in zip(TOLD, told, strict=True)} | self._cost(name, told)
                for name, told in sorted(ledger.items())}

    def _cost(self, name: str, told: Sequence[float]) -> dict[str, float]:
        """By the model's prices, where the recipe has some."""
        if name not in self.prices:
            return {}
        return {"cost": sum(price * tokens for price, tokens in zip(self.prices[name], told[1:], strict=True)) / 1e6}


def usage_of(recipe: Recipe, layers: Sequence[Layer], named: bool) -> list[Layer]:
    """The ledger of models that have a name; counts are read from rows without noise, which no promise of privacy
    covers."""
    dealt = recipe.clients.models or any("model" in p for p in recipe.clients.profiles.values())
    named = named or bool(recipe.models or dealt)
    prices = {name: (m.prices[0], m.prices[1]) for name, m in recipe.models.items() if m.prices}
    return [ModelUsage(prices)] if named and all(x.algebra.kind != "dp" for x in layers) else []


def _add(ledger: MutableMapping[str, list[float]], name: str, told: list[float]) -> None:
    ledger[name] = [a + b for a, b in zip(ledger.get(name, [0.0] * len(TOLD)), told, strict=True)]

