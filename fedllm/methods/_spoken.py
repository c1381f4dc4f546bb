"""What black-box methods share whose clients may hold no more than an endpoint: text in, text out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError
from fedllm.core.method import State, knob
from fedllm.core.payload import Payload
from fedllm.methods._blackbox import BlackBox, Meter
from fedllm.models.endpoint import Endpoint


@dataclass(frozen=True)
class Spoken(BlackBox):
    """With an endpoint, clients ask it instead of the recipe's model, and are tested by what it says."""

    endpoint: str | None = knob(None, "address of an OpenAI-compatible API that clients ask instead of the model")
    endpoint_model: str = knob("local", "the model's name there")
    api_key_env: str | None = knob(None, "NAME of the environment variable that holds the API key; None: no key")
    max_new_tokens: int = knob(16, "longest answer of an endpoint", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint:
            asked(self.endpoint, self.endpoint_model, self.api_key_env)  # a bad address or name is refused at once

    @property
    def serves(self) -> bool:  # type: ignore[override]
        """The words of a prompt are no trainables of the recipe's model."""
        return not self.endpoint

    def check(self, model: Any) -> None:
        if self.endpoint and model.task != "generation":
            raise CompositionError(f"method.endpoint compares answers in words, and the task is {model.task!r}; "
                                   "data.task = 'generation' works")

    def at_client(self, model: Any) -> Any:
        if self.endpoint:
            return asked(self.endpoint, self.endpoint_model, self.api_key_env)
        return super().at_client(model)

    def text(self, state: State) -> str:
        """The prompt in words."""
        raise NotImplementedError

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        if not self.endpoint:
            return (yield from super().evaluate(state, clients, on))
        said = self.text(state)
        return (yield Ask(self.spoken, {c.id: {"prompt": said, "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def spoken(self, msg: Payload, client: Client) -> Payload:
        """How far (`loss`) the answers behind the prompt are from those wanted; `exact_match`: by nothing."""
        rows = client.held_out(msg["on"])
        if not rows:
            return {"n": 0}
        far = Meter(client).misses([msg["prompt"]], rows, self.max_new_tokens)[0]
        return {"n": len(rows), "loss": float(far.mean()), "exact_match": float((far == 0).mean())}


@functools.lru_cache(maxsize=8)
def asked(url: str, model: str, key_env: str | None) -> Endpoint:
    """One endpoint for all clients of this process: they share its connections."""
    return Endpoint(url, model, api_key_env=key_env, logprobs=False)
