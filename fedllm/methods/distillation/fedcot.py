"""FedCoT (PDSS): a remote model explains questions that it sees in other words, and small ones learn to reason."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.form import aligned
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.rng import numpy_stream
from fedllm.methods._own import Own, own
from fedllm.methods._written import need_parts, need_variety, said_by
from fedllm.privacy.word_noise import WordNoise

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedCoT(Own):
    """Once: a client's questions leave with other words, and rationales come back; its own model, question in hand,
    puts them right. Then it learns to say both, the rationale behind a mark of its own, and the answer."""

    card = Card(
        title="FedCoT: federated chain-of-thought distillation (PDSS)",
        paper="Fan et al., FedCoT: Federated Chain-of-Thought Distillation for Large Language Models, Findings of "
              "EMNLP 2025, arXiv 2406.12403",
        topic="transfer", kinds=("text",), moves=Moves("text", "to clients", "clients", ("rows", "model")),
        sends="up, once: each question with its words exchanged; down, once: a rationale for each; no weights",
        needs="task generation; a `teacher` among the recipe's `models`, or an endpoint; clients that remember",
        claim=Claim("with rationales for its questions as they are a small model answers right more often than one "
                    "that learns answers alone, on as many steps", rig="reasons", metric="accuracy",
                    baseline="local_only", relative="difference", holds=">", threshold=0.0, grid=LR,
                    options={"knobs": {"epsilon": None}}),
        also={"noisy": Claim("where words are exchanged at epsilon 0.5 it does so less often than with questions as "
                             "they are", rig="reasons", metric="accuracy", baseline="fedcot", relative="difference",
                             holds="<", threshold=0.0, better="max", grid=LR, options={"knobs": {"epsilon": 0.5}},
                             against={"knobs": {"epsilon": None}})},
        evidence="Authors' code read by the dossier: alpha 0.5, two prefixes, epsilon 3. Ours: the exponential "
                 "mechanism over all words, which is private (the code's, `rantext`, is not proven to be); the "
                 "answer's prompt is the row's own; the learned encoder of the second version is left out. In our rig "
                 "a template explains.",
    )
    trial = Trial({"max_new_tokens": 3, "repair": "none", "seed": 0}, rounding="texts are sampled",
                  local={"steps": 2})
    serves, mixes, only_fits = False, "models", False

    teacher: str = knob("teacher", "the remote model, by its name among the recipe's `models`")
    alpha: float = knob(0.5, "share of rationales in what is learned; 0: answers alone, nothing is sent", ge=0, le=1)
    epsilon: float | None = knob(3.0, "of each word's exchange; null: questions leave as they are", gt=0)
    mechanism: Literal["exponential", "rantext"] = knob("exponential", "how words are drawn; `rantext` as in the "
                                                        "authors' code, for which nothing is proven",
                                                        options=("exponential", "rantext"))
    ask: str = knob("{question}\nExplain step by step:\n", "what the remote model is asked")
    mend: str = knob("{question}\nDraft: {rationale}\nCorrected explanation:\n", "what the own model is asked")
    repair: Literal["model", "none"] = knob("model", "who puts a rationale right: the client's model, or nobody",
                                            options=("model", "none"))
    mark: str = knob("[rationale] ", "stands before a question whose rationale is wanted")
    max_new_tokens: int = knob(64, "longest rationale", ge=1)
    temperature: float = knob(0.0, "of the remote model", ge=0)
    seed: int | None = knob(None, "seeds the words' draws for tests, which voids the promise; null: from the OS")

    def __post_init__(self) -> None:
        super().__post_init__()
        need_parts("FedCoT", "ask", self.ask, "question")
        need_parts("FedCoT", "mend", self.mend, "question", "rationale")

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError(f"method 'fedcot' and data.task = {model.task!r} do not fit together: it learns to "
                                   "say rationales; use data.task = 'generation'")

    def server_asks_for(self):
        return (self.teacher,) if self.alpha else ()

    def init(self, model: Any) -> State:
        self.check(model)
        return {"served": [], "longest": 0}

    def round(self, state: State, clients) -> Program:
        new = [c.id for c in clients if c.id not in state["served"]] if self.alpha else []
        told: dict[str, list[str]] = {}
        if new:
            out = yield Ask(self.offer, {c: {} for c in new}, quorum=0)
            asked = [self.ask.format(question=q) for c in out for q in out[c]["questions"]]
            said = iter((yield Ask(self.explain, {SERVER: {"asked": asked}}))[SERVER]["said"] if asked else ())
            told = {c: [next(said) for _ in out[c]["questions"]] for c in out}
            state = {"served": [*state["served"], *told], "longest": max([state["longest"], *(
                out[c]["longest"] for c in out)])}
        yield Ask(self.local, {c.id: {"rationales": told[c.id]} if c.id in told else {"learn": 1} for c in clients})
        return state

    @on_client(gives="questions: texts, longest: count")
    def offer(self, msg, client):
        asked, longest = [str(r["prompt"]) for r in client.data], 0
        if self.epsilon is not None:
            noise = WordNoise(self.epsilon, self.mechanism)
            rng = np.random.default_rng(secrets.randbits(128)) if self.seed is None else numpy_stream(
                self.seed, "fedcot", client.id)
            asked, longest = noise(client.model, asked, rng)
        return {"questions": asked, "longest": longest}

    @on_server
    def explain(self, msg, client):
        said = said_by(client, self.teacher, msg["asked"], self.max_new_tokens, self.temperature, 0)
        need_variety(self.teacher, said, min(1.0, 2 / len(said)))  # not one and the same for all
        return {"said": said}

    @on_client(gives="loss?: number")
    def local(self, msg, client):
        theta, rows = own(client), list(client.data)
        if "rationales" in msg:
            aligned({"r": msg["rationales"]}, ("r",), len(rows))
            client.memory["rationales"] = self.mended(client, theta, rows, msg["rationales"])
        why = client.memory.get("rationales") or []
        kept = [i for i, text in enumerate(why) if text.strip()] if len(why) == len(rows) else []
        thought = [{"prompt": f"{self.mark}{rows[i]['prompt']}", "response": why[i]} for i in kept]
        if not self.alpha or not thought:  # min L_label
            fitted = client.fit(theta)
        else:  # min alpha L_rationale + (1 - alpha) L_label
            fitted = client.fit(theta, on=[*client.tokens, *client.encode(thought)], objective="weighted", side={
                "weight": [2 * (1 - self.alpha)] * len(rows) + [2 * self.alpha] * len(thought)})
        client.memory["theta"] = fitted.theta
        return {"loss": fitted.loss}

    def mended(self, client: Any, theta: Any, rows: list[Any], said: list[str]) -> list[str]:
        """What the client's own model makes of rationales for other words; one that it has nothing to say to stays."""
        if self.repair == "none" or self.epsilon is None:
            return list(said)
        asked = [self.mend.format(question=r["prompt"], rationale=t) for r, t in zip(rows, said, strict=True)]
        made = client.generate(asked, theta, max_new_tokens=self.max_new_tokens)
        return [new if new.strip() else old for new, old in zip(made, said, strict=True)]

    def report(self, state: State) -> Mapping[str, Any] | None:
        """What the words' exchange promises of the longest question; None: nothing is proven."""
        if self.epsilon is None or not state["served"]:
            return None
        proven = WordNoise(self.epsilon, self.mechanism).spent(state["longest"]) if self.seed is None else None
        return {"mechanism": self.mechanism, "a_word": self.epsilon, "longest_question": state["longest"],
                "epsilon": proven}
