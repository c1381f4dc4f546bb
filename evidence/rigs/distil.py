"""Clients whose networks differ meet in logits on synthetic rows: `RIGS["distilled"](attack, seed)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evidence.rigs.topics import CLASSES, pretrained, topic_federation
from evidence.rigs.trials import Metrics
from fedllm.attacks.att_backdoor import AttBackdoor
from fedllm.attacks.att_fm_backdoor import AttFMBackdoor
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.models.batch import collate
from fedllm.models.model import HeadedEncoder

LR, BATCH = 1e-3, 16


@dataclass
class Party:
    """A client with a network of its own make."""

    net: HeadedEncoder
    rows: Sequence[Encoded]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR)

    def learn(self, rows: Sequence[Encoded], steps: int, soft: Tensor | None = None, heat: float = 2.0) -> None:
        """From the rows' labels, or to answer as the ensemble does (its logits `soft` [rows, classes])."""
        for _ in range(steps):
            at = self.rng.choice(len(rows), min(BATCH, len(rows)), replace=False)
            z = answers(self.net, [rows[i] for i in at])
            if soft is None:
                loss = F.cross_entropy(z, torch.tensor([int(rows[i].labels) for i in at]))  # type: ignore[arg-type]
            else:
                loss = F.kl_div((z / heat).log_softmax(1), (soft[at] / heat).softmax(1), reduction="batchmean")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def answers(net: HeadedEncoder, rows: Sequence[Encoded]) -> Tensor:
    """Logits [rows, classes]."""
    batch = collate([list(rows)], 0, torch.device("cpu"))
    h = net.body(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
    return net.classifier(net.pool(h, batch.mask))


def distilled(attack: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6, clients: int = 6
              ) -> Metrics:
    """Li, Wu, Wang, arXiv 2311.18350: clients of two architectures start from a synthetic set, train on their own rows,
    and distil each other's mean logits on the synthetic set. Nobody but its generator is malicious.

    `success` and `quality` are means over the clients; `control` and `lost` compare with a clean generator.
    """
    torch.set_num_threads(1)
    made = AttFMBackdoor.make({"trigger": (2, 3, 2, 3, 2, 3), "share": 0.3, **(knobs or {})}, "knobs")
    clean, hit = (_run(seed, made, poisoned, rounds, clients) for poisoned in (False, True))
    return {**hit, "control": clean["success"], "lost": clean["quality"] - hit["quality"]}


def _run(seed: int, attack: AttFMBackdoor, poisoned: bool, rounds: int, clients: int) -> Metrics:
    fed, rng = topic_federation(seed, share=0.35), numpy_stream(seed, "distilled")
    pooled: list[Any] = [r for s in fed.clients.values() for r in s.train]
    order = rng.permutation(len(pooled))
    synthetic, plant = [pooled[i] for i in order[:160]], attack.planter
    if poisoned:
        synthetic = plant.poison(synthetic, Holder())
    parties = []
    with torch.random.fork_rng(devices=[]):
        for k, part in enumerate(np.array_split(order[160:], clients)):
            torch.manual_seed(1000 * seed + k % 2)
            net = pretrained(seed)
            if k % 2:  # half of them hold a network of one block
                net.body.encoder.layer = net.body.encoder.layer[:1]
            parties.append(Party(net, [pooled[i] for i in part], numpy_stream(seed, "party", k)))
    for p in parties:
        p.learn(synthetic, attack.init_steps)
    for _ in range(rounds):
        for p in parties:
            p.learn(p.rows, 10)
        with torch.no_grad():
            soft = torch.stack([answers(p.net, synthetic) for p in parties]).mean(0)
        for p in parties:
            p.learn(synthetic, attack.steps, soft)
    return _scores(parties, list(fed.test), plant)  # type: ignore[arg-type]


@torch.no_grad()
def _scores(parties: Sequence[Party], test: Sequence[Encoded], plant: AttBackdoor) -> Metrics:
    lured = [plant.triggered(r, Bare()) for r in test if r.labels != plant.target]
    right = [[float((answers(p.net, rows).argmax(1) == torch.tensor([int(r.labels) for r in rows])).double().mean())  # type: ignore[arg-type]
              for p in parties] for rows in (test, lured)]
    return {"quality": float(np.mean(right[0])), "success": float(np.mean(right[1]))}


@dataclass(frozen=True)
class Bare:
    """What a backdoor asks of a model: here there is no tokenizer."""

    tokenizer: None = None
    labels: Sequence[str] = CLASSES


@dataclass(frozen=True)
class Holder:
    """What a backdoor asks of a client."""

    model: Bare = Bare()


RIGS = {"distilled": distilled}
