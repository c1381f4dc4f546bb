"""Attribute reconstruction: a sensitive attribute of known records, from a client's change after a whole epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.audits.att_gradient_inversion import loss_of
from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob
from fedllm.core.rng import torch_stream
from fedllm.models.model import HeadedEncoder


@dataclass(frozen=True)
class Attribute(Knobs):
    """Cos-matching (Chen et al. 2022) on texts: every record has one slot, whose value the attacker wants.

    The attacker knows the weights before and after, the rest of the records, their labels and the slot's possible
    values. Each record's gradient is a mixture of those that the values would give; the mixtures are moved until the
    records' mean gradient points where the weights moved to, epoch or not.
    """

    card: ClassVar[Card] = Card(
        title="Practical attribute reconstruction attack against federated learning (cos-matching)",
        paper="Chen, Lyu, Yu, Chen, Practical Attribute Reconstruction Attack Against Federated Learning, IEEE Trans. "
              "Big Data 2022 [7]",
        topic="attacks",
        sends="nothing: it reads a client's change after an epoch of minibatches",
        needs="records known but for one slot each, and the weights before and after",
        claim=Claim("after an epoch of minibatches cos-matching gets at least 80 % of 20 records' attributes right",
                    rig="attribute", metric="accuracy", holds=">=", threshold=0.8, seeds=3),
        evidence="The paper's records are tables and its model an MLP; here both are text. Its second stage, a "
                 "classifier for records that were never trained on, is left out. Where it misses, what it names fits "
                 "the change better than the truth does (four seeds of four, also without the smallest entries): four "
                 "steps on unknown batches are no longer one mean gradient, and a better search would not help.",
        also={
            "l2": Claim("at least 15 points above matching by the squared distance", rig="attribute",
                        metric="over_l2", holds=">=", threshold=0.15, seeds=3),
            "secagg": Claim("from the sum of 8 clients under secagg at most 70 %", rig="attribute",
                            metric="accuracy", holds="<=", threshold=0.7, seeds=3,
                            options={"layers": ("secagg",), "clients": 8}),
            "dp": Claim("under dp_sgd at epsilon 8 at most 10 points above the commonest value", rig="attribute",
                        metric="over_majority", holds="<=", threshold=0.1, seeds=3, options={"layers": ("dp_sgd",)})})

    loss: Literal["cos", "l2"] = knob("cos", "how far two directions or two gradients are apart",
                                      options=("cos", "l2"))
    steps: int = knob(600, "Adam steps", ge=1)
    lr: float = knob(0.1, "Adam's learning rate", gt=0)
    restarts: int = knob(3, "random starts; the nearest wins", ge=1)
    seed: int = knob(0, "of the random starts")

    def recover(self, net: HeadedEncoder, gradient: Mapping[str, Tensor], rows: Tensor, slots: Sequence[int],
                values: Sequence[int], labels: Sequence[int]) -> list[int]:
        """The value of each record's slot: rows [n, T] of token ids, the place of each one's slot, and what could stand
        there. `gradient` is the change / -(lr * steps), and `net` best stands halfway between before and after."""
        names = [n for n, _ in net.named_parameters() if n in gradient and "word_embeddings" not in n]
        u = torch.cat([gradient[n].reshape(-1) for n in names]).double()
        each = torch.stack([self._gradient(net, names, row, slot, value, label)
                            for row, slot, label in zip(rows, slots, labels, strict=True) for value in values])
        gram, along, size = each @ each.T, each @ u, u.pow(2).sum()  # [n V, n V], [n V]: all that the search needs
        best: tuple[float, Tensor] = (float("inf"), torch.zeros(len(rows), len(values)))
        for start in range(self.restarts):
            rng = torch_stream(self.seed, "attribute", start)
            z = (0.1 * torch.randn(len(rows), len(values), generator=rng, dtype=torch.float64)).requires_grad_()
            adam = torch.optim.Adam([z], lr=self.lr)
            for _ in range(self.steps):
                s = z.softmax(1).reshape(-1) / len(rows)  # the mean gradient is sum_iv s_iv g_iv
                away = self._away(s @ gram @ s, s @ along, size)
                if away.item() < best[0]:
                    best = away.item(), z.detach().clone()
                adam.zero_grad()
                away.backward()
                adam.step()
        return [values[i] for i in self._flipped(best[1].argmax(1).tolist(), len(values), gram, along, size)]

    def _flipped(self, picks: list[int], values: int, gram: Tensor, along: Tensor, size: Tensor) -> list[int]:
        """Other values of single records, while one brings the gradients nearer."""

        def away(p: list[int]) -> float:
            at = torch.arange(len(p)) * values + torch.tensor(p)
            return float(self._away(gram[at][:, at].mean(), along[at].mean(), size))

        while True:
            tries = [[*picks[:i], v, *picks[i + 1 :]] for i in range(len(picks)) for v in range(values)]
            best = min(tries, key=away)
            if not away(best) < away(picks):
                return picks
            picks = best

    def _gradient(self, net: HeadedEncoder, names: Sequence[str], row: Tensor, slot: int, value: int, label: int
                  ) -> Tensor:
        """Of this record's loss, if the value stood in its slot, over all these weights [d]."""
        filled = row.clone()
        filled[slot] = value
        weights = {n: p.detach().clone().requires_grad_(n in names) for n, p in net.named_parameters()}
        loss = loss_of(net, weights, net.get_input_embeddings().weight.detach()[filled][None], [label])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [weights[n] for n in names])]).double()

    def _away(self, square: Tensor, along: Tensor, size: Tensor) -> Tensor:
        """Of a mean gradient g and the change u, from |g|^2, <g, u> and |u|^2."""
        if self.loss == "l2":
            return square - 2 * along + size
        return 1 - along / (square * size).clamp(min=1e-30).sqrt()
