"""FILM: which words a batch held, read off the word embeddings' gradient, and put into order by the model itself."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.requests import Limits
from fedllm.models.batch import collate
from fedllm.models.model import Model


@dataclass(frozen=True)
class FILM(Knobs):
    """Gupta et al. 2022: a bag of words, a beam search through the trained model, and a reordering of what it wrote.

    The attacker knows the weights after training and the change of the word embeddings. Words are tokens whose rows
    changed; where all change (one embedding for input and output, noise), those count whose change is `cutoff` standard
    deviations above the mean of the log norms.
    """

    card: ClassVar[Card] = Card(
        title="FILM: recovering private text in federated learning of language models",
        paper="Gupta et al., Recovering Private Text in Federated Learning of Language Models, NeurIPS 2022, "
              "arXiv 2205.08514 [24]",
        topic="attacks",
        sends="nothing: it reads the change of the word embeddings, and the model",
        needs="word embeddings that are trained, and a causal model",
        claim=Claim("the rows of an untied embedding that change are the batch's input tokens, all and none other",
                    rig="film", metric="bag_errors", holds="<=", threshold=0.0, kind="exact"),
        evidence="The bag follows the paper and its repository's cutoff rule. Reordering swaps and moves words for the "
                 "loss alone: the gradient norm that the paper adds to it costs a backward pass a try.",
        also={
            "tied": Claim("with one embedding for input and output at least 80 % of the tokens are found",
                          rig="film", metric="recall", holds=">=", threshold=0.8, seeds=3, options={"tied": True}),
            "order": Claim("batch 1 of a model that has overfitted is written down with ROUGE-L >= 0.8",
                           rig="film", metric="rouge_l", holds=">=", threshold=0.8, seeds=3,
                           options={"rows": 1, "overfit": True}),
            "unseen": Claim("and with ROUGE-L <= 0.3 by a model that never saw the text", rig="film",
                            metric="rouge_l", holds="<=", threshold=0.3, seeds=3, options={"rows": 1}),
            "frozen": Claim("with LoRA on attention nothing is found", rig="film", metric="recall", holds="<=",
                            threshold=0.0, kind="exact", options={"space": "lora"})})

    beams: int = knob(16, "sentences that are kept at each step", ge=1)
    cutoff: float = knob(1.5, "standard deviations above the mean log norm (tied embeddings)", gt=0)
    repeats: int = knob(4, "times that a word may come in a row: the bag does not say how often", ge=1)
    swaps: int = knob(100, "tries of the reordering", ge=0)

    def bag(self, moved: Tensor, tied: bool) -> list[int]:
        """Token ids whose rows [V, h] of the embeddings' change say that they were there."""
        size = moved.float().norm(dim=1)
        moving = size.nonzero().flatten()
        if not tied and len(moving) < len(size):  # noise moves all
            return moving.tolist()
        logs, cutoff = size.clamp(min=1e-30).log(), self.cutoff
        while cutoff > 1e-3:
            found = (logs > logs.mean() + cutoff * logs.std()).nonzero().flatten().tolist()
            if found:
                return found
            cutoff *= 0.8
        return []

    def write(self, model: Model, theta: Tree, base: Tree | None, words: Sequence[int], length: int,
              first: Sequence[int] = ()) -> list[int]:
        """The likeliest sequence of this length over these words; begins with one of `first` (none: any)."""
        vocabulary = sorted(set(words))
        beams: list[tuple[float, list[int]]] = [(0.0, [w]) for w in (first or vocabulary)]
        while beams and len(beams[0][1]) < length and (grown := self._grow(model, theta, base, beams, vocabulary)):
            beams = grown
        return self._reorder(model, theta, base, beams[0][1]) if beams else []

    def _grow(self, model: Model, theta: Tree, base: Tree | None, beams: list[tuple[float, list[int]]],
              vocabulary: Sequence[int]) -> list[tuple[float, list[int]]]:
        rows = [Encoded(torch.tensor(b).numpy(), torch.tensor(b).numpy(), len(b)) for _, b in beams]
        batch = collate([rows], model.pad, model.device)
        with torch.no_grad(), model.using([theta], base):
            model.stack.rows = len(rows)
            logp = model.logits_of(model.hidden(batch)[:, -1:])[:, 0].float().log_softmax(-1)[:, list(vocabulary)]
        grown = []
        for (score, row), p in zip(beams, logp.tolist(), strict=True):
            used = Counter(row)
            pairs = set(itertools.pairwise(row))
            grown += [(score + q, [*row, w]) for w, q in zip(vocabulary, p, strict=True)
                      if used[w] < self.repeats and (row[-1], w) not in pairs]
        return sorted(grown, key=lambda g: -g[0])[: self.beams]

    def _reorder(self, model: Model, theta: Tree, base: Tree | None, row: list[int]) -> list[int]:
        """Swaps of two words, and words moved elsewhere, while the loss falls."""
        rng = torch.Generator().manual_seed(0)
        tries = [row]
        for _ in range(self.swaps):
            i, j = torch.randint(len(row), (2,), generator=rng).tolist()
            other = list(row)
            if i % 2:
                other[i], other[j] = other[j], other[i]
            else:
                other.insert(j, other.pop(i))
            tries.append(other)
        losses = _losses(model, theta, base, tries)
        return tries[min(range(len(tries)), key=losses.__getitem__)]


def _losses(model: Model, theta: Tree, base: Tree | None, rows: Sequence[Sequence[int]]) -> list[float]:
    from fedllm.local.forward import run_losses
    from fedllm.local.requests import Losses

    coded = []
    for row in rows:
        labels = torch.tensor(row).numpy().copy()
        labels[0] = -100
        coded.append(Encoded(torch.tensor(row).int().numpy(), labels, len(row) - 1))
    got = run_losses([Losses("film", model, theta, base, coded)], Limits())[0]
    return [t / max(1.0, c) if math.isfinite(t) else math.inf for t, c in zip(got.total, got.count, strict=True)]
