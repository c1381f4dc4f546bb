"""CrossLM: the server's large model writes labelled texts, clients' small ones grade them, and both learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.form import need, shaped
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.payload import pack, part
from fedllm.core.rng import seed_of
from fedllm.local.objectives.rewarded import Rewarded
from fedllm.local.objectives.weighted import Weighted
from fedllm.methods._knowledge import knows
from fedllm.methods._own import Own, own
from fedllm.methods._written import graded, meant, need_parts, need_variety, said_by
from fedllm.models.model import Model

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class CrossLM(Own):
    """Texts go down, a grade for each comes up: how sure a client's classifier is of the label that was meant. Well
    graded texts become likelier and join the clients' rows. No weights, no private text."""

    card = Card(
        title="CrossLM: mutual enhancement of large and small language models",
        paper="Deng et al., Mutual Enhancement of Large and Small Language Models with Cross-Silo Knowledge Transfer, "
              "2023, arXiv 2312.05842",
        topic="cross-silo", moves=Moves("grades", "both", "both", ("rows", "model", "designs")),
        sends="down: texts and the labels that they are meant to have; up: a grade for each, or -1 of a label that the "
              "client has no rows of (the server learns which these are)",
        needs="task classification; a language model of the recipe's `models`, or an endpoint with `reinforce: false`"
              "; clients that remember; any `models`",
        claim=Claim("the share of texts that show the label they were written for ends higher than with grades that "
                    "are dealt out at random", rig="written", metric="intended", baseline="crosslm",
                    relative="difference", holds=">", threshold=0.0, against={"knobs": {"grades": "shuffled"}}),
        also={"risen": Claim("by 0.15 above what it was before the first grade", rig="written", metric="risen",
                             holds=">=", threshold=0.15),
              "kept": Claim("its loss on other text rises by a tenth or less", rig="written", metric="forgotten",
                            holds="<=", threshold=0.1),
              "small": Claim("clients are right more often than when each trains alone on as many steps",
                             rig="written", metric="accuracy", baseline="local_only", relative="difference",
                             holds=">", threshold=0.0, grid=LR)},
        evidence="Abstract; the rest from a dossier. Ours: rewards are grades less their mean by their deviation, cut "
                 "to [-1, 1]; a bad text is unlearned no further than `bound`; what holds the model to its start is "
                 "KL(p_0 || p) over p_0's likeliest words. Grades leak something of the rows; layers may hide them.",
    )
    trial = Trial({"texts": 6, "max_new_tokens": 4, "write_steps": 1, "least_new": 0.0}, task="classification",
                  rounding="texts are sampled", models={"writer": "generation"})
    serves, mixes, only_fits = False, "models", False

    writer: str = knob("writer", "the large model, by its name among the recipe's `models`")
    prompt: str = knob("{label}:", "what it is asked to go on from; {label} is the label's name")
    texts: int = knob(64, "texts a round", ge=1)
    temperature: float = knob(1.0, "of writing", gt=0)
    max_new_tokens: int = knob(48, "longest text", ge=1)
    accept: float = knob(0.5, "mean grade from which a text joins the clients' rows", ge=0, le=1)
    weight: float = knob(0.5, "of such a text's loss beside a row's", ge=0, le=1)
    reinforce: bool = knob(True, "the writer learns from the grades")
    write_steps: int = knob(10, "its steps a round", ge=1)
    beta: float = knob(0.1, "how strongly it is held to where it began", ge=0)
    least_new: float = knob(0.25, "least share of a round's texts that are new, or the round is left out", ge=0, le=1)
    grades: Literal["given", "shuffled"] = knob("given", "shuffled: dealt out at random, for comparison",
                                                options=("given", "shuffled"))

    def __post_init__(self) -> None:
        super().__post_init__()
        need_parts("CrossLM", "prompt", self.prompt, "label")

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'crosslm' and data.task = {model.task!r} do not fit together: clients "
                                   "grade texts by their label; use data.task = 'classification'")

    def check_named(self, main: Any, models: Any) -> None:
        if self.reinforce and not isinstance(models[self.writer], Model):
            raise CompositionError(f"models.{self.writer} cannot be trained, which method.reinforce wants; use an open "
                                   "model, or reinforce = false")

    def server_asks_for(self):
        return (self.writer,)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"writer": {}, "labels": list(model.labels), "texts": [], "of": [], "round": 0}

    def round(self, state: State, clients) -> Program:
        wrote = (yield Ask(self.write, {SERVER: pack(writer=state["writer"], labels=state["labels"],
                                                          t=state["round"])}))[SERVER]
        new = {"new": wrote["texts"], "meant": wrote["meant"], "texts": state["texts"], "of": state["of"]}
        out = yield Ask(self.local, {c.id: new for c in clients})
        s = graded([out[c]["grades"] for c in out])
        take = lambda at: {"texts": [wrote["texts"][i] for i in at], "of": [wrote["meant"][i] for i in at]}  # noqa: E731
        theta, known = state["writer"], [i for i, x in enumerate(s) if x >= 0]
        if self.reinforce and len(known) > 1:
            msg = pack(writer=theta, labels=state["labels"], grades=[s[i] for i in known], **take(known))
            theta = part((yield Ask(self.learn, {SERVER: msg}))[SERVER], "writer")
        kept = take([i for i in known if s[i] >= self.accept])
        return {**state, "writer": theta, "round": state["round"] + 1, **kept}

    @on_server
    def write(self, msg, client):
        """As many texts of each label as of any other."""
        meant = [i % len(msg["labels"]) for i in range(self.texts)]
        prompts = [self.prompt.format(label=msg["labels"][y]) for y in meant]
        seed = seed_of(client.model.seed, "crosslm", msg["t"]) % 2**31  # of the round: asked again it writes the same
        texts = said_by(client, self.writer, prompts, self.max_new_tokens, self.temperature, seed, part(msg, "writer"))
        new = need_variety(self.writer, texts, self.least_new)
        return {"texts": [texts[i] for i in new], "meant": [meant[i] for i in new]}

    def fits(self, msg: Any, reply: Any) -> None:
        shaped("grades", reply["grades"], (len(msg["new"]),))
        g = reply["grades"]
        need(bool(((g == -1) | ((g >= 0) & (g <= 1))).all()), "'grades' holds what is neither -1 nor from 0 to 1")

    @on_client(gives="grades: tensor, loss?: number", fits=fits)
    def local(self, msg, client):
        added, new = (client.encode([{"text": t, "label": y} for t, y in zip(msg[a], msg[b], strict=True)])
                      for a, b in (("texts", "of"), ("new", "meant")))
        w = [1.0] * client.n + [self.weight] * len(added)
        fitted = client.fit(own(client), on=[*client.tokens, *added], objective=Weighted(), side={"weight": w})
        client.memory["theta"] = fitted.theta
        grades = client.measure(fitted.theta, new, meant)[:, 0]
        mine = {int(r.labels) for r in client.tokens}  # a label without rows is one that it knows nothing of
        said = np.where([y in mine for y in msg["meant"]], np.clip(grades, 0, 1), -1.0)
        return {"grades": torch.from_numpy(said), "loss": fitted.loss}

    @on_server
    def learn(self, msg, client):
        self.check_named(client.model, {self.writer: (held := client.holding(self.writer)).model})
        s = np.array(msg["grades"])
        r = np.clip((s - s.mean()) / max(s.std(), 1e-8), -1, 1)
        r = client.rng("shuffled").permutation(r) if self.grades == "shuffled" else r
        rows = held.encode([{"prompt": self.prompt.format(label=msg["labels"][y]), "response": t}
                            for t, y in zip(msg["texts"], msg["of"], strict=True)])
        before = knows(held, start := held.model.initial(), rows, 16, 1.0)
        fitted = held.fit(part(msg, "writer") or start, on=rows, steps=self.write_steps, objective=Rewarded(self.beta),
                          side={"reward": r.tolist(), **before.side()})
        return pack(writer=fitted.theta)

    def trained(self, state: State):
        return {self.writer: state["writer"]}
