"""DEPT: one body for all, while each silo has only its own words' rows of the embeddings, or all of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.local.objectives.own_words import OwnWords, among
from fedllm.spaces.params import Params, lookup_of, tables_of
from fedllm.spaces.slices import Covered, Slice

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class DEPT(Method):
    """theta <- theta + mean_k Delta theta_k; of the embeddings phi every row over the silos that know its word."""

    card = Card(
        title="DEPT: decoupled embeddings for pre-training language models",
        paper="Iacob et al., DEPT: Decoupled Embeddings for Pre-training Language Models, ICLR 2025, arXiv 2410.05021",
        topic="pre-training",
        sends="glob: all, as FedAvg; trim: the body and the rows of the silo's own words, whose numbers tell the "
              "server which words a silo uses; spec: the body alone, and never a tensor along the vocabulary",
        needs="a causal language model, space full (or another that trains its token embeddings); trim, spec: silos "
              "with vocabularies of their own",
        claim=Claim("three silos with alphabets of their own and one grammar: after the same steps trim's loss on "
                    "their held-out rows is below that of FedAvg, whose silos share one vocabulary", rig="tongues",
                    metric="local_loss", baseline="fedavg", relative="difference", holds="<", threshold=0.0, grid=LR),
        also={"bytes": Claim("and it uploads less than FedAvg does", rig="tongues", metric="up_bytes",
                             baseline="fedavg", relative="ratio", holds="<", threshold=1.0, kind="exact"),
              "spec": Claim("and spec less than trim", rig="tongues", metric="up_bytes", baseline="dept",
                            relative="ratio", holds="<", threshold=1.0, kind="exact",
                            options={"knobs": {"variant": "spec"}}, against={"knobs": {"variant": "trim"}}),
              "moves": Claim("under a fourth alphabet, with new embeddings over the frozen body, spec's body ends with "
                             "a lower loss than a random body", rig="tongues", metric="moved_loss", baseline="dept",
                             relative="difference", holds="<", threshold=0.0, grid=LR,
                             options={"knobs": {"variant": "spec"}}, against={"rounds": 0},
                             unequal="the random body is what no rounds leave; the embeddings take equal steps")},
        evidence="From the abstract and a dossier. Weights n_k are ours; all silos have one tokenizer, so that spec's "
                 "matrices keep rows that their silo never uses. trim trains and tests among the silo's own words "
                 "alone; a word of the test that it does not know costs log V.",
    )
    trial = Trial(space={"name": "full"})
    variant: Literal["glob", "trim", "spec"] = knob("trim", "what of the embeddings is shared: all, each word's row "
                                                    "among those who use it, nothing", options=("glob", "trim", "spec"))
    min_count: int = knob(1, "trim: how often a token must stand in a silo's rows to be one of its words", ge=1)

    @property
    def only_fits(self) -> bool:  # type: ignore[override]
        """Which words are its own a silo sees in its rows."""
        return self.variant != "trim"

    @property
    def serves(self) -> bool:  # type: ignore[override]
        """A body without embeddings is no model."""
        return self.variant != "spec"

    def check(self, model: Any) -> None:
        word = model.net.get_input_embeddings().weight if model.rules.net == "causal" else None
        mine = model.initial() if isinstance(model.space, Params) else {}
        if word is None or not any(p is word and n in mine for n, p in model.net.named_parameters()):
            raise CompositionError(f"method 'dept' parts a language model's embeddings from its body, and data.task = "
                                   f"{model.task!r} with space '{model.space.stem}' has none to train; use a causal "
                                   "language model and the space 'full'")

    def init(self, model: Any) -> State:
        apart = tables_of(model.net) if self.variant == "spec" else ()
        return {"theta": {n: t for n, t in model.initial().items() if n not in apart}, "lookup": lookup_of(model.net),
                "words": {}}

    def round(self, state: State, clients) -> Program:
        words = state["words"]
        if self.variant == "trim" and (new := [c.id for c in clients if c.id not in words]):
            met = yield Ask(self.greet, {c: {"size": len(state["theta"][state["lookup"][0]])} for c in new}, quorum=0)
            words = {**words, **{c: met[c]["words"] for c in met}}
        views = {c.id: self.view(state, words.get(c.id)) for c in clients if self.variant != "trim" or c.id in words}
        out = yield Ask(self.local, {c: pack(theta=v.take(state["theta"])) for c, v in views.items()})
        return {**state, "theta": add(state["theta"], part(out.value, "delta")), "words": words}

    def view(self, state: Any, words: Any) -> Slice:
        """What of the shared trainables a silo with these words holds."""
        return Slice(None, dict.fromkeys(state["lookup"], words)) if self.variant == "trim" else Slice()

    @on_client(gives="words: whole", fits=lambda self, msg, reply: need(
        reply["words"].dim() == 1 and len(reply["words"]) > 0 and bool((reply["words"] >= 0).all())
        and bool((reply["words"] < msg["size"]).all()) and bool((reply["words"].diff() > 0).all()),
        f"'words' are not ascending tokens below {msg['size']}, the rows of the embeddings"))
    def greet(self, msg, client):
        return {"words": self.own(client)}

    def own(self, client: Any) -> Tensor:
        """V_k: tokens that stand in its rows often enough, and the tokenizer's special ones."""
        size = client.model.words.shape[0]
        seen = np.bincount(np.concatenate([row.ids for row in client.tokens]), minlength=size)
        special = client.model.tokenizer.all_special_ids if client.model.tokenizer else []
        known = [t for t in special if t < size]
        if np.delete(seen, known).max(initial=0) < self.min_count:
            raise DataError(f"client '{client.id}': no token stands {self.min_count} times in its rows "
                            "(method.min_count), so that it has no word of its own; lower min_count", kind="value")
        seen[known] = self.min_count
        return torch.from_numpy(np.flatnonzero(seen >= self.min_count).astype(np.int32))

    @on_client(reduce=Covered(), gives="delta: some, at: places, n: rows, loss?: number")
    def local(self, msg, client):
        sent, whole, goal = part(msg, "theta"), client.model.initial(), {}
        if self.variant == "trim":
            words = client.memory["words"] = self.own(client)
            view = self.view({"lookup": lookup_of(client.model.net)}, words)
            goal = {"objective": OwnWords(), "side": {"words": [known_of(words, client.model)] * client.n}}
            theta = view.put(whole, sent)
        else:
            view = Slice(tuple(sent))
            theta = {**whole, **client.memory.get("embeddings", {}), **sent}
        fitted = client.fit(theta, **goal)
        if self.variant == "spec":
            client.memory["embeddings"] = {n: t for n, t in fitted.theta.items() if n not in sent}
        shared = {n: t for n, t in whole.items() if n in sent}
        return pack(delta=sub(view.take(fitted.theta), sent), at=view.places(shared), n=client.n, loss=fitted.loss)

    def evaluate(self, state: State, clients, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        theta = {**client.model.initial(), **client.memory.get("embeddings", {}), **part(msg, "theta")}
        if (words := client.memory.get("words")) is None:
            return client.score(theta, on=msg["on"])
        told = client.measure(theta, client.held_out(msg["on"]), among(known_of(words, client.model)))  # [rows, 2]
        own = {"loss": float(told[:, 0].sum() / told[:, 1].sum())} if len(told) else {}
        return {**client.score(theta, on=msg["on"]), **own}


def known_of(words: Tensor, model: Any) -> Tensor:
    """[V] bool: which tokens these are."""
    return torch.zeros(model.words.shape[0], dtype=torch.bool).index_fill(0, words.long(), True)
