"""What black-box methods share: clients that hold a sealed model, and the ledger of what was asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.client import ClientInfo
from fedllm.core.errors import BudgetSpent
from fedllm.core.method import Star, State, knob
from fedllm.core.payload import Tree
from fedllm.data.encode import IGNORE, Encoded
from fedllm.local.perturb import Directions, flat, unflat
from fedllm.models.sealed import sealed

SPENT = ("calls", "read", "said")
TOLD = ", ".join(f"note/{k}: count" for k in SPENT)
"""What a reply says of it beside what it holds."""


@dataclass(frozen=True)
class BlackBox(Star):
    """One call is one row scored, or one prompt continued. Tokens are those read and those said."""

    only_fits = False
    budget: int | None = knob(None, "most calls of the whole run; a round that would exceed it does not begin. "
                                    "None: no limit", ge=1)
    price: float = knob(0.0, "of a million tokens, in whatever money", ge=0)

    def at_client(self, model: Any) -> Any:
        return sealed(model)

    def calls(self, rows: int) -> int:
        """The most calls of one round of a client with so many rows."""
        raise NotImplementedError

    def afford(self, state: State, clients: Sequence[Any]) -> None:
        """Raise BudgetSpent when this round could ask more than is left."""
        need, spent = sum(self.calls(c.n) for c in clients), int(state["queries"]["calls"])
        if self.budget is not None and spent + need > self.budget:
            raise BudgetSpent(f"one more round may take {need} calls of the model; {spent} of the budget of "
                              f"{self.budget} are spent")

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        """One asking of all; `state` counts `round` and `queries`."""
        self.afford(state, clients)
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        return {**self.merge(state, out), "round": state["round"] + 1, "queries": self.booked(state, out)}

    def booked(self, state: State, out: Replies) -> dict[str, int]:
        """The ledger after these replies: a client whose answer did not count has paid all the same, at its place."""
        return {k: int(state["queries"][k]) + sum(int(note[k]) for note in out.notes.values()) for k in SPENT}

    def report(self, state: State) -> Mapping[str, Any]:
        spent = state["queries"]
        return {"queries": {**spent, "cost": (spent["read"] + spent["said"]) * self.price / 1e6, "budget": self.budget}}


def empty_ledger() -> dict[str, int]:
    """Nothing asked yet."""
    return dict.fromkeys(SPENT, 0)


class Meter:
    """Scores rows for a client and counts; the counts leave it as notes beside the reply."""

    def __init__(self, client: Any) -> None:
        self.client, self.calls, self.read, self.said = client, 0, 0, 0

    def losses(self, thetas: Sequence[Any], rows: Sequence[Any]) -> list[float]:
        """Mean loss of the rows under each of these trainables."""
        self.calls += len(thetas) * len(rows)
        self.read += len(thetas) * sum(len(r.ids) for r in rows)
        return [got.mean for got in self.client.probe(thetas, on=rows)]

    def outputs(self, texts: Sequence[Tensor]) -> Tensor:
        """Class logits [texts, classes] of texts that are given as embeddings."""
        self.calls += len(texts)
        self.read += sum(map(len, texts))
        return self.client.outputs(texts)

    def misses(self, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]], new: int) -> np.ndarray:
        """For each text put in front of these rows' prompts, how far each answer is from the one wanted, [texts, rows];
        of a client whose model reads and says text, and does nothing else."""
        texts = [f"{p}\n{row['prompt']}" for p in prompts for row in rows]
        said = self.client.complete(texts, new)
        self.calls += len(texts)
        self.read += sum(c.prompt_tokens for c in said)
        self.said += sum(c.completion_tokens for c in said)
        far = [miss(c.text, row["response"]) for c, row in zip(said, [*rows] * len(prompts), strict=True)]
        return np.reshape(far, (len(prompts), len(rows)))

    @property
    def notes(self) -> dict[str, int]:
        """`note/calls`, `note/read`, `note/said`."""
        return {f"note/{k}": v for k, v in zip(SPENT, (self.calls, self.read, self.said), strict=True)}


def noisy(rows: Sequence[Encoded], rate: float, client: Any) -> list[Encoded]:
    """The rows with this share of their words replaced by random ones; special tokens and what is learned stay."""
    rng, words = client.rng("noisy"), usual_ids(client.model)
    if client.model.tokenizer is None:  # who knows whether the ids above stand for anything
        words = words[: 1 + max(int(row.ids.max()) for row in rows)]
    out = []
    for row in rows:
        learned = row.labels != IGNORE if isinstance(row.labels, np.ndarray) else np.zeros(len(row.ids), bool)
        hit = (rng.random(len(row.ids)) < rate) & ~learned & np.isin(row.ids, words)
        out.append(replace(row, ids=np.where(hit, rng.choice(words, len(row.ids)), row.ids)))
    return out


def usual_ids(model: Any) -> np.ndarray:
    """The ids of all tokens that are not special, int32, in order."""
    tokenizer, size = model.tokenizer, len(model.words)
    if tokenizer is None:
        return np.arange(size, dtype=np.int32)
    return np.setdiff1d(np.arange(min(len(tokenizer), size), dtype=np.int32), sorted(tokenizer.all_special_ids))


def prompt(z: Tensor, first: Tree, scale: float, seed: int) -> Tree:
    """p_0 + A z, where column j of A is scale times direction j."""
    p = flat(first).clone()
    Directions(seed, len(p)).add(p, {j: scale * float(x) for j, x in enumerate(z.tolist())})
    return unflat(p, first)


def fp32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


def miss(said: str, wanted: str) -> float:
    """How far an answer is from the wanted one: 1 - F1 of their words, 0 for the same words, 1 for none of them."""
    a, b = Counter(said.lower().split()), Counter(wanted.lower().split())
    return 1 - 2 * (a & b).total() / max(1, a.total() + b.total()) if a or b else 0.0
