"""DAGER: the exact text of a batch, by asking of every token and every beginning whether it lies in the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.audits._span import Span, clearest, inputs_at, passing, spans
from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.models.model import Model


@dataclass(frozen=True)
class Read:
    """What was read of an update, and what it hung on."""

    rows: list[list[int]]
    """Token ids of each row, as far as its inputs reach (the last token of a row is only a label)."""
    bag: list[int]
    rank: int
    """Directions of the first block that were seen: distinct inputs, where nothing hides them."""
    width: int
    """From so many inputs on nothing can be told: the layer's width, or the rank of its LoRA."""
    why: str
    """`leaks`; `full`: every vector passes (too many inputs in the sum, or noise); `nothing`: no layer was seen."""


@dataclass(frozen=True)
class DAGER(Knobs):
    """Petrov et al. 2024: tokens whose input to the first block lies in its gradient's span, then beginnings of rows
    whose input to the second block lies in that one's. The attacker knows the weights that the client was told.

    Positions that are added to embeddings are tried one by one: the places before a token do not change what the first
    block gets there.
    """

    card: ClassVar[Card] = Card(
        title="DAGER: exact text from gradients, by a span test",
        paper="Petrov, Dimitrov, Baader, Mueller, Vechev, DAGER: Exact Gradient Inversion for Large Language Models, "
              "NeurIPS 2024, arXiv 2405.15586",
        topic="attacks",
        sends="nothing: it reads the change of a model's first two blocks, in full or of their LoRA",
        needs="a causal model without dropout, one step of SGD, fewer distinct inputs in all of the sum than the layer "
              "is wide (LoRA: than its rank)",
        claim=Claim("reads at least 99 % of the input tokens of a batch of 1 from an unprotected gradient, in order",
                    rig="span", metric="rouge_l", holds=">=", threshold=0.99, seeds=5),
        evidence="The two levels and their thresholds follow the paper and its repository; rank is cut where rounding "
                 "of the weights stands, and decoders are read greedily. Encoders' search is not here.",
        also={
            "batch": Claim("and of a batch of 8 rows of 8 tokens", rig="span", metric="rouge_l", holds=">=",
                           threshold=0.99, seeds=5, options={"rows": 8, "length": 8}),
            "lora": Claim("and of one row of 8 tokens from the first upload of a LoRA of rank 16", rig="span",
                          metric="rouge_l", holds=">=", threshold=0.99, seeds=5, options={"rank": 16, "length": 8}),
            "smollm2": Claim("and of a sentence of 8 tokens from SmolLM2's first upload of a LoRA of rank 16, with all "
                             "49,152 tokens tried", rig="spoken", metric="rouge_l", holds=">=", threshold=0.99,
                             seeds=3),
            "smollm2_dp": Claim("under dp_sgd at epsilon 8 nothing of it", rig="spoken", metric="recall", holds="<=",
                                threshold=0.0, seeds=3, options={"layers": ("dp_sgd",)}),
            "dp": Claim("under dp_sgd at epsilon 8 no more than 5 points above a guess", rig="span",
                        metric="over_guess", holds="<=", threshold=0.05, seeds=5, options={"layers": ("dp_sgd",)}),
            "secagg": Claim("from a secagg sum of 8 clients with more inputs than the layer is wide no more than 5 "
                            "points above a guess", rig="span", metric="over_guess", holds="<=", threshold=0.05,
                            seeds=5, options={"layers": ("secagg",), "clients": 8, "length": 32}),
            "small_sum": Claim("from a secagg sum of 4 clients with fewer it reads as from one: sums hide nothing by "
                               "themselves", rig="span", metric="recall_of_all", holds=">=", threshold=0.99, seeds=5,
                               options={"layers": ("secagg",), "clients": 4, "length": 8})})

    tau1: float = knob(1e-3, "distance from the first block's span below which a token was there", gt=0, lt=1)
    tau2: float = knob(5e-3, "distance from the second block's span below which a beginning was there", gt=0, lt=1)
    beams: int = knob(64, "beginnings that are kept at each place", ge=1)
    longest: int = knob(64, "places that are read at most", ge=1)

    def read(self, model: Model, told: Tree, moved: Tree, base: Tree | None = None,
             vocabulary: Sequence[int] | None = None) -> Read:
        """The rows behind a change of the trainables `told`; `vocabulary` are the tokens to be tried (None: all)."""
        first, second = (clearest(spans(model, moved, told, block)) for block in (0, 1))
        if not first:
            seen = spans(model, moved, told, 0)
            widest = max(seen, key=lambda s: s.width, default=None)
            return Read([], [], widest.rank if widest else 0, widest.width if widest else 0,
                        "full" if seen else "nothing")
        words = list(vocabulary if vocabulary is not None else range(model.net.config.vocab_size))
        room = min(self.longest, model.positions - 1)
        moves = self._moves(first, model, told, base, words)
        bags: list[list[int]] = []
        for place in range(room if moves else 1):
            bag = [w for w, far in zip(words, passing(first, model, told, base, [
                [words[0]] * place + [w] for w in words], self.tau1, len(words)).tolist(), strict=True) if far < 1]
            if not bag:
                break
            bags.append(bag)
        rows = self._rows(second, model, told, base, bags, room) if second and bags else []
        bag = sorted({w for one in bags for w in one})
        return Read(rows or [[w] for w in bag], bag, first[0].rank, first[0].width, "leaks" if bag else "nothing")

    @staticmethod
    def _moves(found: Sequence[Span], model: Model, theta: Tree, base: Tree | None, words: Sequence[int]) -> bool:
        """Whether the first block gets the place of a token beside the token."""
        here, there = (inputs_at(model, theta, base, found[0].path, [[words[0]] * n]) for n in (1, 2))
        return not torch.allclose(here, there, rtol=1e-3, atol=1e-6)

    def _rows(self, second: Sequence[Span], model: Model, theta: Tree, base: Tree | None, bags: list[list[int]],
              room: int) -> list[list[int]]:
        """Beginnings grown token by token; one that no token continues is a row."""
        live: list[list[int]] = [[]]
        done: list[list[int]] = []
        for place in range(room):
            bag = bags[min(place, len(bags) - 1)] if len(bags) in (1, room) or place < len(bags) else []
            tries = [[*row, w] for row in live for w in bag]
            far = passing(second, model, theta, base, tries, self.tau2, len(tries)).tolist()
            kept = sorted((d, t) for d, t in zip(far, tries, strict=True) if d < 1)[: self.beams]
            grown = {tuple(t[:-1]) for _, t in kept}
            done += [row for row in live if row and tuple(row) not in grown]
            live = [t for _, t in kept]
            if not live:
                break
        found = [*done, *live]  # without added places a token that looks at itself alone gives the same at each place
        return [row for row in found if len({*row}) > 1 or not any(
            other[0] == row[0] and len({*other}) > 1 for other in found)]
