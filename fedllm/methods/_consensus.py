"""One answer of several owners' vectors: maps that align them, a graph over which they are passed, and a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream


@dataclass(frozen=True)
class Consensus:
    """z_k = A_k h_k; (z_k <- z_k + relu(sum_j S_kj z_j W)) in each layer; logits = mean_k z_k H + b.

    `owners` in their order; `edges` say who is joined where the graph is given. S is a softmax of learned scores, or
    even over an owner and those it is joined with; with `drop` who has no part is no node.
    """

    owners: tuple[str, ...]
    align: str
    graph: str
    layers: int
    missing: str
    edges: frozenset[frozenset[str]] = frozenset()

    def start(self, d: int, classes: int, seed: int, like: torch.dtype) -> Tree:
        """All that the server learns; every A_k begins as the identity."""
        n, rng = len(self.owners), torch_stream(seed, "consensus")
        draw = lambda *size: torch.randn(size, generator=rng, dtype=torch.float64).to(like) / size[0] ** 0.5  # noqa: E731
        net = {"head": draw(d, classes), "bias": torch.zeros(classes, dtype=like)}
        if self.align != "none":
            net |= {f"A/{k}": torch.eye(d, dtype=like) for k in self.owners}
        if self.graph != "none":
            net |= {f"W/{i}": 0.1 * draw(d, d) for i in range(self.layers)}
        if self.graph == "learned" and self.layers:
            net["E"] = torch.zeros(n, n, dtype=like)
        return net

    @property
    def matches(self) -> bool:
        """Whether neurons are matched before the first step."""
        return self.align in ("hungarian", "sinkhorn")

    def operations(self, h: Tensor) -> float:
        """Floating-point operations of a forward over h [n, B, d]."""
        return 2.0 * h.numel() * (h.shape[-1] * (1 + self.layers) + len(self.owners) * self.layers)

    def learns(self, name: str) -> bool:
        """Whether gradients move this part of the net: what was matched by the Hungarian method rests."""
        return not (name.startswith("A/") and self.align == "hungarian")

    def matched(self, net: Tree, h: Tensor, has: Tensor, by: int) -> Tree:
        """The net with owners' neurons matched to those of owner `by` by how they go together over things that both
        have: h [n, B, d], has [n, B]."""
        out = dict(net)
        for k, owner in enumerate(self.owners):
            both = has[by] & has[k]
            one, other = (_standard(h[i, both].double()) for i in (by, k))
            c = one.T @ other / max(1, int(both.sum()))  # corr(neuron i of `by`, neuron j of k)
            if self.align == "sinkhorn":
                out[f"A/{owner}"] = (5 * c).to(net["head"])
                continue
            i, j = linear_sum_assignment(-c.numpy())
            a = torch.zeros_like(c)
            a[i, j] = 1.0
            out[f"A/{owner}"] = a.to(net["head"])
        return out

    def logits(self, net: Mapping[str, Tensor], h: Tensor, has: Tensor) -> Tensor:
        """[B, C] from what owners said, h [n, B, d], and of what they have a part, has [n, B]."""
        there = has.to(h)[..., None]  # [n, B, 1]
        z = math.sqrt(h.shape[-1]) * h
        if self.align != "none":
            maps = [net[f"A/{k}"] for k in self.owners]
            z = torch.einsum("kij,kbj->kbi", torch.stack([sinkhorn(a) for a in maps] if self.align == "sinkhorn"
                                                         else maps), z)
        count = there.sum(0).clamp(min=1)
        z = there * z
        if self.missing == "mean":
            z = z + (1 - there) * (z.sum(0) / count)
        nodes = there if self.missing == "drop" else torch.ones_like(there)
        for i in range(self.layers if self.graph != "none" else 0):
            s = self.adjacency(net).to(h)[..., None] * nodes[..., 0]  # [n, n, B], of who is a node
            s = s / s.sum(1, keepdim=True).clamp(min=1e-9)
            z = z + F.relu(torch.einsum("kjb,jbd->kbd", s, z) @ net[f"W/{i}"])
        return (nodes * z).sum(0) / nodes.sum(0).clamp(min=1) @ net["head"] + net["bias"]

    def adjacency(self, net: Mapping[str, Tensor]) -> Tensor:
        """S [n, n], whose rows sum to 1."""
        if self.graph == "learned":
            return net["E"].softmax(-1)
        joined = torch.tensor([[float(a == b or frozenset((a, b)) in self.edges) for b in self.owners]
                               for a in self.owners])
        return joined / joined.sum(1, keepdim=True)

    def slopes(self, net: Tree, h: Tensor, has: Tensor, g: Tensor) -> tuple[Tree, Tensor]:
        """dL/dnet and dL/dh [n, B, d] from dL/dlogits [B, C]."""
        live = {n: t.clone().requires_grad_() for n, t in net.items() if self.learns(n)}
        leaf = h.clone().requires_grad_()
        with torch.enable_grad():
            z = self.logits({**net, **live}, leaf, has)
        got = torch.autograd.grad(z, [*live.values(), leaf], g.to(z))
        return dict(zip(live, got, strict=False)), got[-1]


def _standard(x: Tensor) -> Tensor:
    """Each column with mean 0 and deviation 1; one that never moves stays 0."""
    x = x - x.mean(0)
    return x / x.std(0, correction=0).clamp(min=1e-9) if len(x) else x


def sinkhorn(a: Tensor, times: int = 8) -> Tensor:
    """exp(a) with rows and columns scaled, by turns, to sums of 1."""
    for _ in range(times):
        a = a - a.logsumexp(1, keepdim=True)
        a = a - a.logsumexp(0, keepdim=True)
    return a.exp()


def stepped(net: Tree, g: Tree, kept: Tree, lr: float) -> tuple[Tree, Tree]:
    """One step of Adam; `kept` holds its moments, and how many steps were made."""
    t = float(kept.get("t", torch.zeros(()))) + 1
    out, after = dict(net), {"t": torch.tensor(t, dtype=torch.float64)}
    for n, x in g.items():
        m = 0.9 * kept.get(f"m/{n}", torch.zeros_like(x)) + 0.1 * x
        v = 0.999 * kept.get(f"v/{n}", torch.zeros_like(x)) + 0.001 * x * x
        out[n] = net[n] - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        after |= {f"m/{n}": m, f"v/{n}": v}
    return out, after
