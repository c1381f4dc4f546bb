"""Gradient inversion: the tokens of a row, from the gradient (or the part of it) that a curious server saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.core.errors import ModelError
from fedllm.core.method import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream
from fedllm.models.model import HeadedEncoder


@dataclass(frozen=True)
class Inversion(Knobs):
    """DLG (Zhu et al. 2019), with iDLG's label (Zhao et al. 2020), TAG's loss (Deng et al. 2021) or the cosine of
    Geiping et al. 2020, on the input embeddings of one row.

    The attacker knows the weights and how long the row is. It looks for embeddings whose gradient is like the one that
    it saw, entry by entry where it saw any, and reads each as the nearest token. Of a change after one step of SGD the
    gradient is the change / -lr.
    """

    loss: Literal["cos", "dlg", "tag"] = knob("cos", "distance of two gradients", options=("cos", "dlg", "tag"))
    steps: int = knob(200, "Adam steps", ge=1)
    lr: float = knob(0.02, "Adam's learning rate", gt=0)
    restarts: int = knob(1, "random starts; the nearest gradient wins", ge=1)
    seed: int = knob(0, "of the random starts")

    def recover(self, net: HeadedEncoder, seen: Mapping[str, tuple[Tensor, Tensor]], length: int) -> list[int]:
        """Token ids [length] of the row whose classification loss has this gradient.

        `seen[name]` is (gradient, which entries of it were seen) of a parameter of `net`; of names that are not there
        nothing was. Raises ModelError when nothing at all was seen.
        """
        visible = {n: (g, m) for n, (g, m) in seen.items() if bool(m.any())}
        if not visible:
            return []
        best, found = float("inf"), torch.zeros(length, net.config.hidden_size)
        for label in label_of(visible, net.classifier.out_features):
            for start in range(self.restarts):
                away, embeds = self._search(net, visible, length, label, start)
                if away < best:
                    best, found = away, embeds
        table = net.get_input_embeddings().weight.detach()
        return (F.normalize(found, dim=1) @ F.normalize(table, dim=1).T).argmax(1).tolist()

    def _search(self, net: HeadedEncoder, seen: Mapping[str, tuple[Tensor, Tensor]], length: int, label: int,
                start: int) -> tuple[float, Tensor]:
        """The nearest gradient's distance and its embeddings [length, hidden]."""
        table = net.get_input_embeddings().weight.detach()
        rng = torch_stream(self.seed, "inversion", label, start)
        e = (torch.randn(length, table.shape[1], generator=rng) * table.std()).requires_grad_()
        adam, best = torch.optim.Adam([e], lr=self.lr), (float("inf"), e.detach().clone())
        weights = {n: p.detach().clone().requires_grad_(n in seen) for n, p in net.named_parameters()}
        for _ in range(self.steps):
            adam.zero_grad()
            grads = torch.autograd.grad(loss_of(net, weights, e, label), [weights[n] for n in seen], create_graph=True)
            away = self._away(dict(zip(seen, grads, strict=True)), seen)
            if away.item() < best[0]:
                best = away.item(), e.detach().clone()
            away.backward(inputs=[e])
            adam.step()
        return best

    def _away(self, mine: Tree, seen: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for name, (g, m) in seen.items():
            a, b = mine[name][m], g[m]
            if self.loss == "cos":
                total = total + 1 - (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)
            else:
                total = total + (a - b).pow(2).sum()
                total = total + 0.01 * (a - b).abs().sum() if self.loss == "tag" else total
        return total


def loss_of(net: HeadedEncoder, weights: Mapping[str, Tensor], embeds: Tensor, label: int) -> Tensor:
    """Cross-entropy of one row, given by its input embeddings [length, hidden]."""
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    body = {n.removeprefix("body."): w for n, w in weights.items() if n.startswith("body.")}
    h = functional_call(net.body, body, (), {"inputs_embeds": embeds[None], "attention_mask": mask}).last_hidden_state
    z = F.linear(net.pool(h, mask), weights["classifier.weight"], weights["classifier.bias"])
    return F.cross_entropy(z, torch.tensor([label]))


def label_of(seen: Mapping[str, tuple[Tensor, Tensor]], classes: int) -> Sequence[int]:
    """iDLG: of one row the bias's gradient is negative at its label alone; every class where that was not seen."""
    g, m = seen.get("classifier.bias", (torch.zeros(classes), torch.zeros(classes, dtype=torch.bool)))
    if bool((m & (g < 0)).any()):
        return [int(torch.where(m, g, torch.inf).argmin())]
    return [c for c in range(classes) if not m[c]] or list(range(classes))


def tokens_of_rows(gradient: Tensor, visible: Tensor) -> list[int]:
    """Ids whose rows of the word embeddings' gradient are seen not to be zero: without any search, a row's tokens."""
    return ((gradient != 0) & visible).any(1).nonzero().flatten().tolist()


def bag_recall(found: Sequence[int], real: Sequence[int]) -> float:
    """Share of the row's tokens that were found, wherever they stand."""
    return sum((Counter(found) & Counter(real)).values()) / max(1, len(real))


def double_backward(net: nn.Module) -> None:
    """Raise ModelError when the network's attention has no second derivative."""
    kind = getattr(getattr(net, "config", None), "_attn_implementation", "eager")
    if kind != "eager":
        raise ModelError(f"gradient inversion needs second derivatives, which attention '{kind}' has not; load the "
                         "model with attn_implementation='eager'")
