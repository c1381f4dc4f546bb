"""Gradient inversion: the tokens of a row, from the gradient (or the part of it) that a curious server saw."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.core.card import Card, Claim
from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream
from fedllm.models.model import HeadedEncoder
from fedllm.spaces.twice import twice

Prior = Callable[[Tensor], float]
"""Token ids [rows, length] -> mean negative log-likelihood of a token in public text."""
Seen = Mapping[str, tuple[Tensor, Tensor]]
"""Parameter -> (its gradient, which entries of it the attacker saw)."""


@dataclass(frozen=True)
class Inversion(Knobs):
    """Looks for input embeddings whose gradient is like the one that was seen, and reads each as the nearest token.

    `variant` gives the knobs of DLG (Zhu et al. 2019), iDLG (Zhao et al. 2020), Inverting Gradients (Geiping et al.
    2020), TAG (Deng et al. 2021) and LAMP (Balunovic et al. 2022). The attacker knows the weights and how long the rows
    are. Of a change after one step of SGD the gradient is the change / -lr.
    """

    card: ClassVar[Card] = Card(
        title="Gradient inversion: DLG, iDLG, Inverting Gradients, TAG and LAMP",
        paper="Zhu et al., Deep Leakage from Gradients, NeurIPS 2019; Balunovic et al., LAMP, NeurIPS 2022, "
              "arXiv 2202.08827; in FedSecurity [25, 26]",
        topic="attacks",
        sends="nothing: it reads a client's gradient",
        needs="a classifier whose attention has a second derivative (eager), one step of SGD",
        claim=Claim("recovers at least 90 % of a row's tokens from an unprotected gradient of batch 1",
                    rig="reading", metric="recall", holds=">=", threshold=0.9, seeds=5),
        evidence="From one random start two rows of five stay in a local minimum (5 and 6 of 8 tokens); the nearest "
                 "of four starts reads both whole. LAMP's language model is here a table of bigrams of public text, "
                 "and it tries fewer moves. DLG is here by Adam with every label tried; the paper optimizes a soft "
                 "label along with the input, by L-BFGS.",
        also={
            "dp": Claim("under dp_sgd at epsilon 8 no more than 5 points above a guess", rig="reading",
                        metric="over_guess", holds="<=", threshold=0.05, seeds=5, options={"layers": ("dp_sgd",)}),
            "secagg": Claim("from the sum of 8 clients under secagg no more than 5 points above a guess",
                            rig="reading", metric="over_guess", holds="<=", threshold=0.05, seeds=5,
                            options={"layers": ("secagg",), "clients": 8}),
            "batch": Claim("a batch of 4 gives less of its rows away than one row of itself", rig="reading",
                           metric="less_than_one", holds=">", threshold=0.0, seeds=3, options={"rows": 4}),
            "tag": Claim("TAG recovers at least 90 %", rig="reading", metric="recall", holds=">=", threshold=0.9,
                         seeds=3, options={"variant": "tag"}),
            "dlg": Claim("DLG, which tries every label, recovers at least 90 %", rig="reading", metric="recall",
                         holds=">=", threshold=0.9, seeds=3, options={"variant": "dlg"}),
            "idlg": Claim("iDLG, which reads the label off the bias, recovers at least 90 %", rig="reading",
                          metric="recall", holds=">=", threshold=0.9, seeds=3, options={"variant": "idlg"}),
            "lamp": Claim("on 4 rows LAMP's bigrams and moves put tokens into a better order than Inverting Gradients",
                          rig="reading", metric="order_gain", holds=">", threshold=0.0, seeds=3,
                          options={"variant": "lamp", "rows": 4})})

    loss: Literal["cos", "dlg", "tag"] = knob("cos", "distance of two gradients", options=("cos", "dlg", "tag"))
    labels: Literal["bias", "search"] = knob("bias", "of one row: off the bias's gradient (iDLG), or all are tried",
                                             options=("bias", "search"))
    steps: int = knob(200, "Adam steps", ge=1)
    lr: float = knob(0.02, "Adam's learning rate", gt=0)
    restarts: int = knob(4, "random starts; the nearest gradient wins", ge=1)
    candidates: int = knob(1, "random starts of which the best is begun with (LAMP)", ge=1)
    c_reg: float = knob(0.0, "weight of (mean norm of an embedding - usual norm)^2 (LAMP)", ge=0)
    c_ppl: float = knob(0.2, "weight of the prior among moves (LAMP)", ge=0)
    swap_every: int = knob(0, "steps between tries of other orders (LAMP); 0: none", ge=0)
    moves: int = knob(20, "other orders tried each time", ge=1)
    seed: int = knob(0, "of the random starts")

    @classmethod
    def variant(cls, name: str, **knobs: Any) -> Inversion:
        """The attack of this name: dlg, idlg, cos (Inverting Gradients), tag, lamp."""
        if name not in VARIANTS:
            raise RecipeError(f"variant = {name!r} is unknown; allowed are {', '.join(VARIANTS)}")
        return cls(**{**VARIANTS[name], **knobs})

    def recover(self, net: HeadedEncoder, seen: Seen, length: int) -> list[int]:
        """Token ids [length] of the one row whose classification loss has this gradient; none where none was seen."""
        return next(iter(self.recover_rows(net, seen, length)), [])

    def recover_rows(self, net: HeadedEncoder, seen: Seen, length: int, rows: int = 1,
                     labels: Sequence[int] | None = None, prior: Prior | None = None,
                     views: Mapping[str, Tensor] | None = None) -> list[list[int]]:
        """Token ids of so many rows of this length, given their mean loss's gradient.

        Of the weights in `views` not the gradient G [o, i] was seen but G V [o, r]: of a LoRA's B it is G A^T.

        `labels` are theirs, where the attacker knows them; of more than one row it must. Of names that are not in
        `seen`, nothing was.
        """
        visible = {n: (g, m) for n, (g, m) in seen.items() if bool(m.any())}
        if not visible:
            return []
        classes = net.classifier.out_features
        known = [list(labels)] if labels is not None else [[c] for c in (
            label_of(visible, classes) if self.labels == "bias" else range(classes))]
        if any(len(one) != rows for one in known):
            raise RecipeError(f"att_gradient_inversion reads one row's label; of {rows} rows 'labels' must be given")
        best, found = float("inf"), torch.zeros(rows, length, net.config.hidden_size)
        for y in known:
            for start in range(self.restarts):
                away, embeds = self._search(net, visible, length, y, start, prior, views or {})
                if away < best:
                    best, found = away, embeds
        return nearest_tokens(net, found).tolist()

    def _search(self, net: HeadedEncoder, seen: Seen, length: int, labels: Sequence[int], start: int,
                prior: Prior | None, views: Mapping[str, Tensor]) -> tuple[float, Tensor]:
        """The nearest gradient's distance and its embeddings [rows, length, hidden]."""
        table = net.get_input_embeddings().weight.detach()
        usual = float(table.norm(dim=1).mean())
        rng = torch_stream(self.seed, "inversion", *labels, start)
        weights = {n: p.detach().clone().requires_grad_(n in seen) for n, p in net.named_parameters()}

        def away_of(e: Tensor, graph: bool = False) -> Tensor:
            loss = loss_of(net, weights, e, labels)
            grads = torch.autograd.grad(loss, [weights[n] for n in seen], create_graph=graph)
            return self._away({n: g @ views[n] if n in views else g for n, g in zip(seen, grads, strict=True)}, seen)

        tries = [torch.randn(len(labels), length, table.shape[1], generator=rng) * table.std()
                 for _ in range(self.candidates)]
        e = min(tries, key=lambda t: float(away_of(t))) if len(tries) > 1 else tries[0]
        e = e.clone().requires_grad_()
        adam, best = torch.optim.Adam([e], lr=self.lr), (float("inf"), e.detach().clone())
        for step in range(self.steps):
            if self.swap_every and step % self.swap_every == 0 and step >= self.steps // 10:
                self._move(net, e, away_of, prior, rng)
            adam.zero_grad()
            away = away_of(e, True)
            if away.item() < best[0]:
                best = away.item(), e.detach().clone()
            total = away + self.c_reg * (e.norm(dim=-1).mean() - usual).pow(2) if self.c_reg else away
            total.backward(inputs=[e])
            adam.step()
        return best

    def _move(self, net: HeadedEncoder, e: Tensor, away_of: Callable[..., Tensor], prior: Prior | None,
              rng: torch.Generator) -> None:
        """LAMP's discrete step: of some other orders of a row's tokens keep the best, judged by gradient and prior."""

        def score(x: Tensor) -> float:
            nll = self.c_ppl * prior(nearest_tokens(net, x)) if prior else 0.0
            return float(away_of(x)) + nll

        now, best = e.detach().clone(), score(e.detach())
        for _ in range(self.moves):
            row = int(torch.randint(len(e), (1,), generator=rng))
            other = now.clone()
            other[row] = now[row][moved(e.shape[1], rng)]
            if (s := score(other)) < best:
                best, now = s, other
        e.data.copy_(now)

    def _away(self, mine: Tree, seen: Seen) -> Tensor:
        total = torch.zeros(())
        for name, (g, m) in seen.items():
            a, b = mine[name][m], g[m]
            if self.loss == "cos":
                total = total + 1 - (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)
            else:
                total = total + (a - b).pow(2).sum()
                total = total + 0.01 * (a - b).abs().sum() if self.loss == "tag" else total
        return total


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dlg": {"loss": "dlg", "labels": "search"}, "idlg": {"loss": "dlg"}, "cos": {"loss": "cos"},
    "tag": {"loss": "tag"},
    "lamp": {"loss": "cos", "candidates": 20, "c_reg": 1.0, "swap_every": 40}}


def moved(length: int, rng: torch.Generator) -> list[int]:
    """An order: two places swapped, one moved, a span moved, or the beginning put last."""
    order = list(range(length))
    kind, i, j = (int(torch.randint(n, (1,), generator=rng)) for n in (4, length, length))
    if kind == 0:
        order[i], order[j] = order[j], order[i]
    elif kind == 1:
        order.insert(j, order.pop(i))
    elif kind == 2:
        i, j = sorted((i, j))
        span, rest = order[i : j + 1], order[:i] + order[j + 1 :]
        at = int(torch.randint(len(rest) + 1, (1,), generator=rng))
        order = rest[:at] + span + rest[at:]
    else:
        order = order[i:] + order[:i]
    return order


def bigrams(public: Sequence[Sequence[int]], vocabulary: int) -> Prior:
    """A table of bigrams of public text, one added to every count."""
    counts = torch.ones(vocabulary, vocabulary)
    for row in public:
        for a, b in itertools.pairwise(row):
            counts[a, b] += 1
    nll = -(counts / counts.sum(1, keepdim=True)).log()
    return lambda ids: float(nll[ids[:, :-1], ids[:, 1:]].mean())


def nearest_tokens(net: HeadedEncoder, e: Tensor) -> Tensor:
    """Embeddings [rows, length, hidden] -> the token ids [rows, length] of largest cosine."""
    table = net.get_input_embeddings().weight.detach()
    return (F.normalize(e, dim=-1) @ F.normalize(table, dim=1).T).argmax(-1)


def loss_of(net: HeadedEncoder, weights: Mapping[str, Tensor], embeds: Tensor, labels: Sequence[int]) -> Tensor:
    """Mean cross-entropy of rows given by their input embeddings [rows, length, hidden]."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    body = {n.removeprefix("body."): w for n, w in weights.items() if n.startswith("body.")}
    with twice():
        h = functional_call(net.body, body, (), {"inputs_embeds": embeds, "attention_mask": mask}).last_hidden_state
    z = F.linear(net.pool(h, mask), weights["classifier.weight"], weights["classifier.bias"])
    return F.cross_entropy(z, torch.tensor(list(labels)))


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
