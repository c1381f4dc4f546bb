"""Differential privacy of text, token by token: what a client says leaves as other tokens, near in a public table."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedllm.core.ask import Ask, Program
from fedllm.core.card import Card, Claim
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, Withheld
from fedllm.core.form import TEXT
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer, name_of
from fedllm.core.payload import Payload
from fedllm.core.rng import numpy_stream
from fedllm.gate.verdict import told
from fedllm.local.dp_tokens import Table
from fedllm.privacy.accountant import Ledger, Release, check_epsilon

BOOK = "dp_text"
SAME = {"rig": "dp_tokens", "kind": "level"}


@dataclass(frozen=True)
class DPText(Knobs, Layer):
    """Each token of a text that leaves is drawn anew by the exponential mechanism over the whole vocabulary.

    `token_epsilon` is of one token; a text of n tokens costs n times that, and the ledger says so. The same text is
    drawn once and remembered, so that asking again costs nothing. Listed above the gate. What is private is which
    tokens a text has, and not how many.
    """

    algebra: ClassVar[Algebra] = Algebra(kind="dp", needs="any")
    card: ClassVar[Card] = Card(
        title="Local differential privacy of tokens (the perturbation of InferDPT)",
        paper="Tong et al., InferDPT: Privacy-Preserving Inference for Black-box Large Language Models, 2023, arXiv "
              "2310.12214 (RANTEXT); McSherry and Talwar, Mechanism Design via Differential Privacy, FOCS 2007",
        topic="privacy: text",
        sends="in the place of a text another of as many tokens; a count of the tokens that were drawn",
        needs="clients that hold a model with a table of token embeddings; a method that sends text",
        claim=Claim("at an epsilon of 12 a token the calibrated draw keeps more tokens as they are than the usual "
                    "bound on the same table", rig="dp_tokens", metric="kept", baseline="dp_text",
                    relative="difference", holds=">", threshold=0.0, options={"epsilon": 12.0},
                    against={"exact": False}),
        also={"exact": Claim("no two tokens are told apart by more than the epsilon of a draw (the largest log-ratio "
                             "over it)", metric="spent", holds="<=", threshold=1.0, **{**SAME, "kind": "exact"}),
              "rantext": Claim("draws of RANTEXT at its epsilon of 3 refute that figure (over it, at 95 %)",
                               metric="rantext_refutes", holds=">", threshold=1.0, **SAME),
              "rises": Claim("tokens kept by RANTEXT rise with its epsilon, from 0.5 to 30 (the smallest step)",
                             metric="rantext_step", holds=">=", threshold=0.0, **SAME)},
        evidence="RANTEXT from a dossier on FATE-LLM's code, of which tokens without an embedding and lists without "
                 "candidates get lost; here one token stands for one token. Its list of candidates depends on the "
                 "token itself, so that no epsilon stands for it: the ledger says void. The default is ours: the whole "
                 "vocabulary, with the scale at which the worst log-ratio of the public table is epsilon.",
    )

    token_epsilon: float = knob(12.0, "epsilon of one token", gt=0, le=1000)
    epsilon: float | None = knob(None, "budget of a client's texts over the run; None: none", gt=0)
    mechanism: Literal["exponential", "rantext"] = knob(
        "exponential", "over the whole vocabulary, with a guarantee; or RANTEXT's, with none",
        options=("exponential", "rantext"))
    seed: int | None = knob(None, "of the draws, for tests: whoever knows it takes the noise off; None: the system's")

    noise_multiplier: ClassVar[float | None] = None
    delta: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None:
            check_epsilon(self.epsilon)

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        if not getattr(method, "only_text", False):
            raise CompositionError(f"layer 'dp_text' draws text anew, and method '{name_of(method)}' sends more "
                                   "of rows than text, which would leave as it is; use dp_sgd, or a method that sends "
                                   "text alone (inferdpt)")

    @property
    def release(self) -> Release:
        """One token's."""
        return Release(1 / self.token_epsilon, law="pure")

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        reply = call(msg)
        form = fn.__dict__.get("form")
        kinds = {} if form is None else form.parts
        if client.id == SERVER or not any(kinds.get(key) in TEXT for key in reply):
            return reply
        book = client.memory.get(BOOK, {"tokens": 0, "said": {}})
        said, tokens = dict(book["said"]), 0
        table, tokenizer = Table.of(client.model), getattr(client.model, "tokenizer", None)

        def drawn(key: str, at: int, text: str) -> str:
            nonlocal tokens
            if kinds.get(key) not in TEXT:
                return text
            mark = hashlib.sha256(text.encode()).hexdigest()[:32]
            if mark not in said:
                ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]
                tokens += len(ids)
                self._afford(client, book["tokens"] + tokens)
                rng = (np.random.default_rng(secrets.randbits(128)) if self.seed is None
                       else numpy_stream(self.seed, client.id, BOOK, mark))
                new = (table.draw(ids, self.token_epsilon, rng) if self.mechanism == "exponential"
                       else table.rantext(ids, self.token_epsilon, rng)[0])
                said[mark] = tokenizer.decode(new)  # type: ignore[union-attr]
            return said[mark]

        out = told(reply, drawn)
        if tokens and self.mechanism == "exponential":
            client.spend(self.release, tokens)
        client.memory[BOOK] = {"tokens": book["tokens"] + tokens, "said": said}
        return {**out, f"note/{BOOK}": float(tokens)}

    def _afford(self, client: Any, tokens: int) -> None:
        if self.epsilon is not None and tokens * self.token_epsilon > self.epsilon:
            raise Withheld(f"dp_text: {tokens} tokens at {self.token_epsilon:g} each are more than its budget of "
                           f"{self.epsilon:g}")

    def init(self) -> MutableMapping[str, Any]:
        return {"clients": {}}

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        out = yield ask
        for client, note in out.notes.items():
            if BOOK in note:
                state["clients"][client] = state["clients"].get(client, 0) + int(note[BOOK])
        return out

    def ledger(self, tokens: int) -> Ledger:
        """What so many tokens have cost."""
        ledger = Ledger({})
        if tokens:
            ledger.book(self.release, tokens)
        if tokens and self.mechanism == "rantext":
            ledger.unbooked.append("rantext")
        return ledger

    def facts(self, state: MutableMapping[str, Any]) -> Mapping[str, Any] | None:
        most = max(state["clients"].values(), default=0)
        return {"epsilon": self.ledger(most).epsilon(1e-5)} if most else None

    def statement(self, state: Mapping[str, Any]) -> dict[str, Any]:
        void = ["DPText.seed is set, so whoever knows the recipe can draw the same"] if self.seed is not None else []
        if self.mechanism == "rantext":
            void.append("RANTEXT's candidates depend on the token that they stand for: no epsilon bounds it")
        each = {c: self.ledger(n).epsilon(1e-5) for c, n in state["clients"].items()}
        worst = float("inf") if void else max(each.values(), default=0.0)
        return {"layer": "dp_text", "unit": "text", "epsilon": worst,
                "delta": 0.0, "clients": each, "adjacency": "all tokens that a client's texts have are others",
                "mechanism": f"{self.mechanism}, epsilon {self.token_epsilon:g} a token",
                "releases": sum(state["clients"].values()), "void": void,
                "not_covered": "how many tokens a text has, and what a method sends beside text"}
