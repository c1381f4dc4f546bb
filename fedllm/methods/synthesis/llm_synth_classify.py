"""Labelled text that a language model wrote: the server has it written once, and clients learn it beside their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.ask import on_client, on_server
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.gate.copies import distinct
from fedllm.gate.made import made, read
from fedllm.methods._averaged import Handed
from fedllm.models.similar import embedder

NEIGHBORS = 5
MISSING = {"rig": "missing_labels", "metric": "worst_recall", "relative": "difference"}


@dataclass(frozen=True)
class LLMSynthClassify(Handed):
    """Asked for each label in turn, in several styles, zero-shot or with a few public rows as examples, the model
    writes `n_per_label` texts; what says a text again, or has neighbors of another label, is left out.
    """

    card = Card(
        title="Synthetic data by LLMs for text classification",
        paper="Li, Zhu, Lu, Yin, Synthetic Data Generation with Large Language Models for Text Classification: "
              "Potential and Limitations, EMNLP 2023, arXiv 2310.07849",
        topic="LLMs for federated learning: synthesis",
        sends="as fedavg; once down: the synthetic rows",
        needs="a classification task; a language model by name (models); for mode few labelled public rows",
        claim=Claim("where every client lacks half of the labels, the label that is known worst is recalled in at "
                    "least 10 points more of its rows than by FedAvg after as many steps", baseline="fedavg",
                    holds=">=", threshold=0.1, grid={"local.lr": (3e-3, 1e-2)}, **MISSING),
        also={"few": Claim("rows that were written after a few examples make it no less accurate than zero-shot ones",
                           rig="missing_labels", metric="accuracy", relative="difference", holds=">=",
                           threshold=0.0, baseline="llm_synth_classify", against={"knobs": {"mode": "zero"}},
                           options={"knobs": {"mode": "few"}, "local": {"lr": 1e-2}})},
        evidence="Abstract read, and a dossier. The paper's diagnosis, that synthetic rows serve less the more "
                 "subjective a task is, needs annotators who disagree, and is not here.",
    )
    trial = Trial({"n_per_label": 0}, task="classification")
    only_fits = False
    generator: str = knob("", "name of the recipe's model that writes (needed where n_per_label > 0)")
    n_per_label: int = knob(50, "texts asked for of each label; 0: none, FedAvg", ge=0)
    mode: Literal["zero", "few"] = knob("zero", "with or without public rows as examples", options=("zero", "few"))
    shots: int = knob(3, "examples of the label (few)", ge=1, le=16)
    ask: str = knob("Write {style} of the kind '{label}':\n", "asks for a text")
    example: str = knob("{text}\n", "how an example is written, behind the question and before the question again")
    styles: tuple[str, ...] = knob(("a short text", "a long text", "a personal text"), "asked for in turn")
    only_missing: bool = knob(True, "each client learns texts of labels alone that it has no row of")
    agree: bool = knob(True, "leave out a text most of whose five neighbors are of another label")
    collapse: float = knob(0.9, "mean cosine of the texts from which the model counts as repeating itself", gt=0, le=1)
    embed: str = knob("auto", "cosines by 'minilm', 'tfidf' or 'auto' (whichever is installed)")
    temperature: float = knob(1.0, "of sampling", gt=0)
    max_new_tokens: int = knob(64, "longest text", ge=1)
    license: str = knob("CC0-1.0", "of the synthetic rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{label}" not in self.ask:
            raise RecipeError(f"LLMSynthClassify.ask = {self.ask!r} is not allowed; it must hold {{label}}")
        if self.n_per_label and not self.generator:
            raise RecipeError("LLMSynthClassify.generator = '' is not allowed with n_per_label > 0; it must be a name "
                              "of the recipe's models")
        embedder(self.embed)

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'llm_synth_classify' writes labelled text and data.task is {model.task!r}, "
                                   "so they do not fit together; data.task = 'classification' works")

    def asks_for(self) -> Sequence[str]:
        return (self.generator,) if self.n_per_label else ()

    def public_at(self):
        return ("server",) if self.n_per_label and self.mode == "few" else ()

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "rows": [], "told": [], "cosine": 0.0}

    def making(self, state: State) -> Payload | None:
        return {} if self.n_per_label else None

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        w = part(msg, "theta")
        rows = [read(t)[0] for t in (self.handed(msg, client) if self.n_per_label else ())]
        known = {row["label"] for row in client.data}
        extra = [r for r in rows if not (self.only_missing and r["label"] in known)]
        fitted = client.fit(w, on=[*client.data, *extra]) if extra else client.fit(w)
        return pack(delta=sub(fitted.theta, w), n=client.n, loss=fitted.loss)

    @on_server
    def written(self, msg: Payload, client: Any) -> Payload:
        names, rng = list(client.model.labels), client.rng("synth")
        seed, who = int(rng.integers(2**31)), client.holding(self.generator)
        asks = [(k, self.question(client, k, i, rng)) for k in range(len(names)) for i in range(self.n_per_label)]
        said = [c.text.strip() for c in who.complete([a for _, a in asks], self.max_new_tokens, self.temperature, seed)]
        found = [(k, bare) for (k, _), t in zip(asks, said, strict=True)  # no text tells its label by name
                 if (bare := re.sub(rf"(?i)\b{re.escape(names[k])}\b", "", t).strip())]
        found = [found[i] for i in distinct([t for _, t in found], 0.9)]
        cosine, agrees = self.looked_at(found)
        rows = [made({"text": t, "label": k}, self.generator, self.license, seed) for (k, t), ok in
                zip(found, agrees, strict=True) if ok or not self.agree]
        if lacking := sorted({names[k] for k in range(len(names))} - {names[read(r)[0]["label"]] for r in rows}):
            raise DataError(f"method 'llm_synth_classify' has no text of {', '.join(lacking[:5])} left: the model "
                            f"'{self.generator}' writes none, or none that agrees with its neighbors")
        return {"rows": rows, "cosine": cosine}

    def question(self, client: Any, k: int, i: int, rng: np.random.Generator) -> str:
        """What is asked for the i-th text of label k."""
        ask = self.ask.format(label=client.model.labels[k], style=self.styles[i % len(self.styles)])
        if self.mode == "zero":
            return ask
        mine = [e for e in client.public if int(e.labels) == k]
        if not mine:
            raise DataError(f"mode = few shows public rows of each label, and '{client.model.labels[k]}' has none")
        some = [mine[j] for j in rng.choice(len(mine), min(self.shots, len(mine)), replace=False)]
        tell = client.model.tokenizer.decode
        return "".join(ask + self.example.format(text=tell(e.ids, skip_special_tokens=True)) for e in some) + ask

    def looked_at(self, found: Sequence[tuple[int, str]]) -> tuple[float, list[bool]]:
        """The texts' mean cosine to each other, and whether most of each one's neighbors are of its label."""
        x = embedder(self.embed)[0]([t for _, t in found])
        cosines, label = x @ x.T, np.array([k for k, _ in found])
        n = len(found)
        mean = float((cosines.sum() - np.trace(cosines)) / max(1, n * (n - 1)))
        if n < 2 or mean > self.collapse:
            raise DataError(f"the model '{self.generator}' repeats itself: {n} different texts, of a mean cosine of "
                            f"{mean:.2f} (collapse = {self.collapse:g})")
        near = np.argsort(-(cosines - 2 * np.eye(n)), axis=1, kind="stable")[:, : min(NEIGHBORS, n - 1)]
        return mean, [bool((label[row] == label[i]).mean() >= 0.5) for i, row in enumerate(near)]

    def report(self, state: State) -> Mapping[str, Any] | None:
        return {"rows": len(state["rows"]), "mean_cosine": state["cosine"]} if state["rows"] else None
