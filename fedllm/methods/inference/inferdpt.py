"""InferDPT: a large model far away drafts an answer to a perturbed document, and a small one at home makes it good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.payload import pack
from fedllm.methods.asking import Asking
from fedllm.models.overlap import rouge_l
from fedllm.tasks.answers import same_answer

INFER = {"rig": "inferdpt", "metric": "exact_match", "relative": "difference"}


@dataclass(frozen=True)
class InferDPT(Asking):
    """A round answers each client's documents (its rows' prompts): perturbed up, a draft down, the answer at home.

    The layer `dp_text` perturbs what leaves; a document is perturbed once, however often it is asked about. The answer
    is kept at the client, which reads document and draft together. Nothing is trained.
    """

    card = Card(
        title="InferDPT: private inference with a black-box language model",
        paper="Tong et al., InferDPT: Privacy-Preserving Inference for Black-box Large Language Models, 2023, arXiv "
              "2310.12214",
        topic="transfer: inference", kinds=("text",), moves=Moves("text", "to clients", "answers", ("rows", "model")),
        sends="up: documents of as many other tokens (dp_text); down: the remote model's drafts",
        needs="a text model at the server, ours or an endpoint; at clients a small one with token embeddings, "
              "and the layer dp_text",
        claim=Claim("at an epsilon of 6 a token the answers at home are right in 20 points more of the documents "
                    "than those of the small model alone", baseline="inferdpt", holds=">=", threshold=0.2,
                    options={"token_epsilon": 6.0}, against={"token_epsilon": 6.0, "knobs": {"draft": False}},
                    **INFER),
        also={"price": Claim("and in at most 30 points fewer than with the documents themselves", holds=">=",
                             baseline="inferdpt", threshold=-0.3, options={"token_epsilon": 6.0},
                             against={"token_epsilon": None}, **INFER),
              "epsilon": Claim("what a client's ledger says is its tokens times the epsilon of one (the difference)",
                               rig="inferdpt", metric="off_ledger", holds="<=", threshold=1e-6, kind="exact",
                               options={"token_epsilon": 6.0})},
        evidence="Written from a dossier on FATE-LLM's code; the perturbation is the layer's matter (its card says "
                 "what of RANTEXT stands). The figure of a document is the sum over its tokens, never that of one.",
    )
    trial = Trial({"protect": "none", "max_new_tokens": 4}, far={"rounds": 1})
    metrics: ClassVar = {"exact_match": "max"}
    serves, only_text = False, True
    protect: Literal["token", "none"] = knob("token", "what the layers must protect: each token of what leaves, or "
                                             "nothing (for comparison)", options=("token", "none"))
    draft: bool = knob(True, "ask the remote model; false: the small model answers alone, and nothing leaves")
    ask: str = knob("{document}", "what the remote model is told; {document} stands for the perturbed document")
    read: str = knob("{document} {draft} ", "what the small model at home goes on with; {document} is the true one")
    max_new_tokens: int = knob(64, "longest draft and answer", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, marks in (("ask", ["{document}"]), ("read", ["{document}", "{draft}"])):
            if any(mark not in getattr(self, name) for mark in marks):
                raise RecipeError(f"InferDPT.{name} = {getattr(self, name)!r} is not allowed; it must hold "
                                  f"{' and '.join(marks)}")

    def check(self, model: Any) -> None:
        if getattr(model, "task", "generation") != "generation":
            raise CompositionError(f"method 'inferdpt' answers prompts and data.task is {model.task!r}, so they do not "
                                   "fit together; data.task = 'generation' works")

    def check_layers(self, layers: Sequence[Any]) -> None:
        """What leaves must be perturbed."""
        names = [name_of(x) for x in layers]
        if "responsible_gate" in names and "dp_text" in names[names.index("responsible_gate"):]:
            raise CompositionError("layer 'responsible_gate' above layer 'dp_text': the gate would see documents as "
                                   "they are, and keep them back; list dp_text first")
        if self.protect == "token" and "dp_text" not in names:
            raise CompositionError("method 'inferdpt' with protect = token and layers without dp_text do not fit "
                                   "together: documents would leave as they are; list dp_text, or set method.protect "
                                   "= none")

    def init(self, model: Any) -> State:
        return {"theta": {}, "documents": {}}

    def round(self, state: State, clients) -> Program:
        if not self.draft:
            out = yield Ask(self.extract, {c.id: {"drafts": []} for c in clients})
            return {**state, "documents": {c: r["documents"] for c, r in out.items()}}
        asked = yield Ask(self.documents, {c.id: {} for c in clients})
        texts = [(c, t) for c, reply in asked.items() for t in reply["texts"]]
        said = yield from self.say([self.ask.replace("{document}", t) for _, t in texts], [SERVER] * len(texts),
                                   self.max_new_tokens)
        drafts: dict[str, list[str]] = {c: [] for c in asked}
        for (c, _), one in zip(texts, said, strict=True):
            drafts[c].append(one.text)
        out = yield Ask(self.extract, {c: {"drafts": d} for c, d in drafts.items()})
        return {**state, "documents": {**state["documents"], **{c: r["documents"] for c, r in out.items()}}}

    @on_client(gives="texts: texts")
    def documents(self, msg, client):
        """What is to be answered; the layer below perturbs it."""
        return {"texts": [row["prompt"] for row in client.data]}

    @on_client(gives="documents: count")
    def extract(self, msg, client):
        drafts = msg["drafts"] or [""] * len(client.data)
        if len(drafts) != len(client.data):
            raise PayloadError(f"client '{client.id}' has {len(client.data)} documents and got {len(drafts)} drafts")
        heads = [self.read.replace("{draft}", d.strip()).replace("{document}", row["prompt"].strip())
                 for row, d in zip(client.data, drafts, strict=True)]
        said = client.complete(heads, self.max_new_tokens)
        client.memory["answers"] = [one.text.strip() for one in said]
        return {"documents": len(said)}

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        """The documents' answers as the last round left them, held against the rows' own."""
        said = client.memory.get("answers", [])
        wanted = [row["response"] for row in client.data][: len(said)]
        if not said or msg["on"] != "local":
            return {"n": 0}
        far = [1 - rouge_l(a, b) for a, b in zip(said, wanted, strict=False)]
        right = [same_answer(a, b) for a, b in zip(said, wanted, strict=False)]
        return {"n": len(wanted), "loss": float(np.mean(far)), "exact_match": float(np.mean(right))}
