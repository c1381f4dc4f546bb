"""Methods that put questions to text models: the completion of a prompt is an ask like any other."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.form import aligned
from fedllm.core.method import Method
from fedllm.core.payload import Payload
from fedllm.models.endpoint import Completion


class Asking(Method):
    """A method whose server half asks the server's model, or clients' own, to continue prompts."""

    mixes, only_fits = "text", False

    def say(self, prompts: Sequence[str], at: Sequence[str], max_new_tokens: int, temperature: float = 0.0) -> Program:
        """Returns the `Completion` of each prompt by the model at its place; silence where that place is missing."""
        rows = {who: [i for i, a in enumerate(at) if a == who] for who in dict.fromkeys(at)}
        said = [Completion("")] * len(prompts)
        if not rows:
            return said
        out = yield Ask(self.complete, {who: {"prompts": [prompts[i] for i in mine], "max_new_tokens": max_new_tokens,
                                              "temperature": temperature} for who, mine in rows.items()})
        for who, reply in out.items():
            columns = (reply[name] for name in ("texts", "logprobs", "read", "said"))
            for i, *got in zip(rows[who], *columns, strict=False):
                said[i] = Completion(*got)
        return said

    def each(self, msg: Payload, reply: Payload) -> None:
        aligned(reply, ("texts", "logprobs", "read", "said"), len(msg["prompts"]))

    @on_client(gives="texts: texts, logprobs: numbers, read: numbers, said: numbers", fits=each)
    def complete(self, msg: Payload, client: Client) -> Payload:
        """Whoever holds a model continues the prompts; what each cost travels with it."""
        seed = int(client.rng("complete").integers(2**31))
        said = client.complete(msg["prompts"], msg["max_new_tokens"], msg["temperature"], seed)
        return {"texts": [c.text for c in said], "logprobs": [c.logprob for c in said],
                "read": [c.prompt_tokens for c in said], "said": [c.completion_tokens for c in said]}
