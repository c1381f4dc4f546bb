"""FedNER with unlike tag sets: what a client does not annotate the global model fills in, as a distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedllm.core.ask import on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Mean
from fedllm.tasks.row import IGNORE, Encoded
from fedllm.tasks.tokens import ALLOWED, OUTSIDE, TARGET, entity_type, entity_types


@dataclass(frozen=True)
class FedNERTagset(Star):
    """Client k annotates the types T_k alone and writes every other entity as O; one tagger learns all types."""

    card = Card(
        title="FedNER: distilling heterogeneous tag sets",
        paper="Wang et al., Federated Domain Adaptation for Named Entity Recognition via Distilling with Heterogeneous "
              "Tag Sets, Findings of ACL 2023",
        topic="heterogeneity",
        sends="as FedAvg, both ways: the trainables",
        needs="data.task: tokens, whose labels are the union of all clients' tags; a type that a client's rows never "
              "show counts as one that it does not annotate",
        claim=Claim("where each of three clients annotates two of six types, the macro-F1 over all types is at least "
                    "0.3 above that of FedAvg, which reads missing tags as O", rig="hidden_tags", metric="macro_f1",
                    baseline="fedavg", relative="difference", holds=">=", threshold=0.3,
                    grid={"local.lr": (1e-3, 3e-3, 1e-2)}),
        also={"marginal": Claim("distilled tags give a higher macro-F1 than the marginal likelihood kept for all "
                                "rounds", rig="hidden_tags", metric="over_marginal", holds=">", threshold=0.0, wins=4)},
        evidence="From the abstract; the warm-up and the threshold are the dossier's. Measured on a synthetic world of "
                 "tags (rig hidden_tags), not on the paper's clinical corpora; instance weighting is left out.",
    )
    trial, only_fits = Trial(task="tokens"), False
    warmup_rounds: int = knob(2, "rounds in which an O may be any type that the client does not annotate, before the "
                                 "global model is worth asking", ge=0)
    temperature: float = knob(1.0, "of the global model's distribution", gt=0)

    def check(self, model) -> None:
        if model.task != "tokens":
            raise CompositionError(f"method 'fedner_tagset' completes tags, and data.task = {model.task!r} has none; "
                                   "data.task = 'tokens' works")
        if OUTSIDE not in model.labels:
            raise CompositionError(f"method 'fedner_tagset' needs the tag 'O' among data.labels, which are "
                                   f"{', '.join(model.labels)}")

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        seen = {entity_type(labels[y]) for many in rows.values() for row in many for y in _tags(row)}
        if alone := sorted(set(entity_types(labels)) - seen):
            raise DataError(f"data.labels has the type '{alone[0]}', which no client's training rows show: it would be "
                            "learned from guesses alone; leave its tags out of data.labels, or add rows that have it")

    def init(self, model) -> State:
        return {"theta": model.initial(), "round": 0}

    def down(self, state: State, client: ClientInfo) -> Payload:
        return pack(theta=state["theta"], round=state["round"])

    @on_client(reduce=Mean(), gives="theta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, rows = part(msg, "theta"), client.tokens
        labels = client.model.labels
        open_, o = unannotated(labels, rows), labels.index(OUTSIDE)  # [C]: O and the tags of T \ T_k
        if open_.sum() == 1:  # all types are annotated: an O is an O
            soft: Sequence[Encoded] = rows
        elif msg["round"] < self.warmup_rounds:
            soft = [softened(row, ALLOWED, hard(row, open_.size) + (row.labels == o)[:, None] * open_) for row in rows]
        else:
            said = client.logits(theta)  # the teacher: the model as it came, no gradient
            soft = [softened(row, TARGET, self.completed(row, z, open_, o)) for row, z in zip(rows, said, strict=True)]
        fitted = client.fit(theta, on=soft)
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def completed(self, row: Encoded, z: np.ndarray, open_: np.ndarray, o: int) -> np.ndarray:
        """[T, C]: y where the client says a type; p(c) / sum_{O, T \\ T_k} p over the open tags where it says O."""
        z = np.where(open_ > 0, z.astype(np.float64) / self.temperature, -np.inf)
        p = np.exp(z - z.max(-1, keepdims=True))
        blank = (row.labels == o)[:, None]
        return np.where(blank, p / p.sum(-1, keepdims=True), hard(row, open_.size))

    def merge(self, state: State, out) -> State:
        return {"theta": part(out.value, "theta"), "round": state["round"] + 1}


def _tags(row: Any) -> Sequence[int]:
    """The tags of a row as it is, or tokenized."""
    return [int(y) for y in np.unique(row.labels) if y != IGNORE] if isinstance(row, Encoded) else row["tags"]


def unannotated(labels: Sequence[str], rows: Sequence[Encoded]) -> np.ndarray:
    """[C]: 1 for O, and for tags of a type that no row shows."""
    seen = {entity_type(labels[y]) for row in rows for y in np.unique(row.labels) if y != IGNORE}
    return np.array([float(tag == OUTSIDE or entity_type(tag) not in seen) for tag in labels])


def hard(row: Encoded, classes: int) -> np.ndarray:
    """One-hot tags [T, C]; none where nothing is scored."""
    return (row.labels[:, None] == np.arange(classes)).astype(np.float64)


def softened(row: Encoded, name: str, tags: np.ndarray) -> Encoded:
    """The row with these tags [T, C] in the place of its own."""
    return replace(row, parts={name: tags}, pads={name: 0.0})
