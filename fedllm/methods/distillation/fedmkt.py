"""FedMKT: a server's large model and clients' small ones, of any tokenizers, teach one another on public rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.local.objectives.top_words import TopWords
from fedllm.methods._knowledge import Knowledge, bridge, drawn, fits_knowledge, knows, picked, targets
from fedllm.methods._own import Own, own
from fedllm.models.sealed import Sealed
from fedllm.models.token_map import surfaces

PARTS = ("words", "p", "ce")
LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedMKT(Own):
    """Each learns from public rows what whoever finds a row's answer likeliest says of it: clients' models and the
    server's, told as the likeliest words at each target and carried from one tokenizer to the other."""

    card = Card(
        title="FedMKT: federated mutual knowledge transfer for large and small language models",
        paper="Fan et al., FedMKT: Federated Mutual Knowledge Transfer for Large and Small Language Models, COLING "
              "2025, arXiv 2406.02224",
        topic="transfer", moves=Moves("logits", "both", "both", ("rows", "model", "designs")),
        sends="up: k words and probabilities at each target of the round's public rows, in the server's vocabulary; "
              "down: the server's, and the vocabulary; no weights",
        needs="task generation; public rows at clients and server; clients that remember; any `models`",
        claim=Claim("clients of another tokenizer, each with a domain of its own, end with a lower loss over all "
                    "domains than after training alone on their rows for as many steps", rig="readers", metric="loss",
                    baseline="local_only", relative="difference", holds="<", threshold=0.0, grid=LR),
        also={"mixed": Claim("but not than after training alone on their own and the labelled public rows together",
                             rig="readers", metric="loss", baseline="local_only", relative="difference", holds=">",
                             threshold=0.0, better="min", grid=LR, against={"public": True}),
              "server": Claim("and the server's model with a lower one than when it learns the public rows by itself",
                              rig="readers", metric="server_loss", baseline="fedmkt", relative="difference", holds="<",
                              threshold=0.0, grid=LR, against={"knobs": {"alone": True}}),
              "selection": Claim("the server's model ends with a lower loss than when it always takes clients' word",
                                 rig="readers", metric="server_loss", baseline="fedmkt", relative="difference",
                                 holds="<", threshold=0.0, grid=LR, against={"knobs": {"strategy": "other"}})},
        evidence="Authors' code read by the dossier: alpha 0.9, k 128, whoever has the lower cross-entropy teaches, "
                 "edit distance for words and time warping for sequences. Ours: tokens that cover the same letters "
                 "(`align: spans`); an answer's nats are summed, since a mean over tokens is no measure between "
                 "tokenizers; both directions are carried over at the client, so that nobody tells its vocabulary; "
                 "adapters are not averaged.",
    )
    trial = Trial({"top_k": 4, "alignment": 4, "digest_steps": 1, "teach_steps": 1},
                  rounding="probabilities cross in 16 bits, and whose word counts is a choice")
    mixes, only_fits = "models", False

    top_k: int = knob(128, "words told at each target", ge=1)
    kd_alpha: float = knob(0.9, "share of the rows' own answers in what is learned on public rows", ge=0, le=1)
    temperature: float = knob(1.0, "of what is told and learned", gt=0)
    strategy: Literal["greater", "weighted_mean", "other"] = knob(
        "greater", "whose word counts of a row: who finds its answer likeliest, all by exp(-nats), or the same among "
        "the others alone", options=("greater", "weighted_mean", "other"))
    align: Literal["spans", "dtw", "skip"] = knob("spans", "how two readings are matched: tokens over the same letters"
                                                  ", time warping, or not at all (one tokenizer)",
                                                  options=("spans", "dtw", "skip"))
    alignment: int = knob(256, "public rows of a round", ge=1)
    digest_steps: int = knob(10, "a client's steps on public rows a round", ge=1)
    teach_steps: int = knob(10, "the server's steps on public rows a round; 0: its model stays", ge=0)
    half: bool = knob(True, "send probabilities in 16 bits")
    alone: bool = knob(False, "the server learns the public rows' answers by itself (for comparison)")
    seed: int = knob(0, "draws each round's public rows", ge=0)

    def check(self, model: Any) -> None:
        if isinstance(model, Sealed) or model.task != "generation":
            why = "a black box tells no probabilities" if isinstance(model, Sealed) else f"data.task = {model.task!r}"
            raise CompositionError(f"method 'fedmkt' needs language models that can be trained, and {why}; use an open "
                                   "model and data.task = 'generation'")

    def public_at(self):
        return ("clients", "server")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0}

    def round(self, state: State, clients) -> Program:
        t, theta = state["round"], state["theta"]
        read = (yield Ask(self.read, {SERVER: pack(t=t)}))[SERVER]
        k = min(self.top_k, len(read["said"]))
        out = yield Ask(self.tell, {c.id: {**read, "t": t, "k": k} for c in clients})
        told = {f"{i}/{n}": out[c][n] for i, c in enumerate(out) for n in PARTS}
        met = (yield Ask(self.teach, {SERVER: pack(theta=theta, told=told, many=len(out), t=t, k=k)}))[SERVER]
        yield Ask(self.local, {c: {**read, "t": t, "k": k, **part(met, "known")} for c in out})
        return {"theta": part(met, "theta"), "round": t + 1}

    def rows(self, client: Any, t: int) -> list[Any]:
        """The public rows of round t, as this model reads them."""
        return drawn(client.public, self.alignment, self.seed, "fedmkt", t)

    @on_server
    def read(self, msg, client):
        """How the server reads the round's public rows: its tokens, and what they write."""
        tokens = [targets(r) for r in self.rows(client, msg["t"])]
        return {"tokens": torch.from_numpy(np.concatenate(tokens)), "counts": [len(x) for x in tokens],
                "said": list(surfaces(client.model))}

    def bridge(self, msg: Any, client: Any) -> Any:
        rows, theirs = self.rows(client, msg["t"]), [x.numpy() for x in msg["tokens"].split(msg["counts"])]
        return rows, bridge(client, rows, theirs, msg["said"], self.align)

    def fits(self, msg: Any, reply: Any) -> None:
        fits_knowledge(msg["counts"], msg["k"], len(msg["said"]), reply)

    @on_client(gives="words: whole, p: tensor, ce: tensor, loss?: number", fits=fits)
    def tell(self, msg, client):
        fitted = client.fit(own(client))
        client.memory["theta"] = fitted.theta
        rows, over = self.bridge(msg, client)
        told = over.there(knows(client, fitted.theta, rows, self.top_k, self.temperature))
        return {**told.wide(msg["k"]).packed(self.half), "loss": fitted.loss}

    @on_server
    def teach(self, msg, client):
        theta, rows, told = part(msg, "theta"), self.rows(client, msg["t"]), part(msg, "told")
        counts = [len(targets(r)) for r in rows]
        if self.teach_steps:
            own = knows(client, theta, rows, msg["k"], self.temperature)
            theirs = [Knowledge.read(part(told, str(i)), counts) for i in range(msg["many"])]
            best = picked([own, *([] if self.alone else theirs)], self.strategy)
            goal = TopWords(1.0 if self.alone else self.kd_alpha, self.temperature)
            theta = client.fit(theta, on=rows, steps=self.teach_steps, objective=goal, side=best.side()).theta
        return pack(theta=theta, known=knows(client, theta, rows, msg["k"], self.temperature).packed(self.half))

    @on_client(gives="loss?: number")
    def local(self, msg, client):
        rows, over = self.bridge(msg, client)
        theirs = over.here(Knowledge.read(msg, msg["counts"]))
        own = knows(client, client.memory["theta"], rows, self.top_k, self.temperature)
        best = picked([own, theirs], self.strategy)
        met = client.fit(client.memory["theta"], on=rows, steps=self.digest_steps, side=best.side(),
                         objective=TopWords(self.kd_alpha, self.temperature))
        client.memory["theta"] = met.theta
        return {"loss": met.loss}
