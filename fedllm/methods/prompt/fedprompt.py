"""FedPrompt: the language model is frozen, and nothing but a soft prompt is trained, sent and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.core.ask import on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.label_words import LabelWords
from fedllm.methods._prompts import need_prompt, numbers
from fedllm.methods._words import check_words, label_accuracy, words_of

LR = {"local.lr": (1e-2, 3e-2, 1e-1)}
ONE_OF_TEN = ({"name": "att_backdoor", "kind": "data", "clients": 1, "target": "red", "share": 0.8},)
PRIVATE = ({"name": "dp_sgd", "epsilon": 8.0, "clip_norm": 0.5, "seed": 0},)


@dataclass(frozen=True)
class FedPrompt(Star):
    """[P; E(x)] goes through the frozen model, and P <- sum_k w_k P_k: "split aggregation" of the prompt alone."""

    card = Card(
        title="FedPrompt: soft prompts with split aggregation",
        paper="Zhao et al., FedPrompt: Communication-Efficient and Privacy Preserving Prompt Tuning in Federated "
              "Learning, ICASSP 2023, arXiv 2208.12268",
        topic="prompt learning: communication",
        sends="down: the prompt; up: its change, the number of examples, the training loss",
        needs="the space soft_prompt, p_tuning (whose network travels) or prefix; with `verbalizer` task generation, "
              "answers that begin with one of its words",
        claim=Claim("ten clients of mostly one kind each end at most 5 points less accurate on all kinds than one "
                    "prompt tuned on all rows in one place, on the same examples", rig="ruled", metric="accuracy",
                    baseline="centralized", relative="difference", holds=">=", threshold=-0.05, grid=LR),
        also={"backdoor": Claim("one poisoned client of ten gets its answer by its trigger less often than under "
                                "FedAvg of all weights (each at a rate chosen by accuracy without the attack)",
                                rig="ruled", metric="success", baseline="fedavg", relative="difference", holds="<",
                                threshold=0.0, options={"layers": ONE_OF_TEN, "local": {"lr": 0.1}},
                                against={"space": {"name": "full"}, "local": {"lr": 1e-3}}),
              "private": Claim("under dp_sgd at epsilon 8 it loses at most 5 points of accuracy", rig="ruled",
                               metric="accuracy", baseline="fedprompt", relative="difference", holds=">=",
                               threshold=-0.05, options={"layers": PRIVATE}, against={"layers": ()}, grid=LR),
              "bytes": Claim("a reply is at most a hundredth of one with all weights", rig="ruled", metric="up_bytes",
                             baseline="fedavg", relative="ratio", holds="<=", threshold=0.01, kind="exact",
                             options={"rounds": 1}, against={"space": {"name": "full"}})},
        evidence="Abstract and summaries; no code of the authors was found. A causal model's next word stands for the "
                 "mask's. Its privacy by noise and its poisoned clients are the layers dp_sgd and att_backdoor. Over "
                 "10 seeds it is 0.043 below pooled tuning (95 %: 0.026 to 0.064): open.",
    )
    trial = Trial({"verbalizer": tuple(f"w{i}" for i in range(60))}, {"name": "soft_prompt", "length": 4},
                  far={"method.verbalizer": ["A", "B"], "data.fields": {"response": "letter"}})
    metrics: ClassVar = {"label_accuracy": "max"}

    verbalizer: tuple[str, ...] = knob((), "the word of each label, one token each, which are then compared with one "
                                           "another alone; none: the task's own loss")

    def check(self, model: Any) -> None:
        need_prompt(self, model)
        if self.verbalizer:
            check_words(self, self.verbalizer, model)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "of": numbers(model)}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Any, client: Any):
        p = part(msg, "theta")  # m x d
        words = LabelWords(words_of(client, self.verbalizer)) if self.verbalizer else None
        fitted = client.fit(p, objective=words)  # K steps of cross-entropy on P; the model's weights stay
        return pack(delta=sub(fitted.theta, p), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        # P <- sum_k w_k P_k = P + sum_k w_k (P_k - P), w_k = n_k / sum_j n_j
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def report(self, state: State) -> Mapping[str, Any]:
        """Numbers that travel in one direction, all that the model has, and their share."""
        sent = sum(t.numel() for t in state["theta"].values())
        return {"sent": sent, "of": state["of"], "share": sent / state["of"]}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Any, client: Any):
        p, on = part(msg, "theta"), msg["on"]
        labels = label_accuracy(client, p, on, self.verbalizer) if self.verbalizer else {}
        return client.score(p, on=on) | labels
