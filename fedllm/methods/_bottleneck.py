"""A conditional information bottleneck: what a picture says beside a text's state, in few numbers that are paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream

Net = Mapping[str, Tensor]


def state(model: Any, batch: Any) -> Tensor:
    """For `client.measure`: each row's pooled state [N, d] of the frozen encoder, of length sqrt(d)."""
    r = model.pooled(batch)
    return F.layer_norm(r, r.shape[-1:])


def start(pixels: int, d: int, dim: int, hidden: int, classes: int, seed: int) -> Tree:
    """Encoder q(w | v, c), prior p(z | c), projector and head; the posterior begins near the prior."""
    rng = torch_stream(seed, "bottleneck")
    draw = lambda o, i: torch.randn(o, i, generator=rng) / i**0.5  # noqa: E731
    return {"q/v": draw(hidden, pixels), "q/c": draw(hidden, d), "q/b": torch.zeros(hidden),
            "q/mu": 0.1 * draw(dim, hidden), "q/log": torch.zeros(dim, hidden), "q/width": torch.full((dim,), -1.0),
            "p/mu": torch.zeros(dim, d), "p/log": torch.zeros(dim, d), "u": draw(hidden, dim), "x": draw(hidden, d),
            "b": torch.zeros(hidden), "head": draw(classes, hidden), "bias": torch.zeros(classes)}


def posterior(net: Net, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log deviation of w [n, dim], z told in the prior's own measure: z = m(c) + s(c) w. So what the card says
    already costs in w and not in z: KL(q(z | v, c) || p(z | c)) = KL(q(w | v, c) || N(0, 1))."""
    h = F.relu(v @ net["q/v"].T + c @ net["q/c"].T + net["q/b"])
    return h @ net["q/mu"].T, (net["q/width"] + h @ net["q/log"].T).clamp(-5, 2)


def logits(net: Net, x: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """[n, classes] of a text's state under its card x, the card's state c, and the latent w."""
    z = c @ net["p/mu"].T + (c @ net["p/log"].T).clamp(-3, 3).exp() * w
    return F.relu(x @ net["x"].T + z @ net["u"].T + net["b"]) @ net["head"].T + net["bias"]


def kl(mu: Tensor, log: Tensor) -> Tensor:
    """KL(N(mu, exp(log)^2) || N(0, 1)) of each row [n], in nats."""
    return (0.5 * (mu**2 + (2 * log).exp() - 1) - log).sum(-1)


def loss(net: Net, x: Tensor, c: Tensor, v: Tensor, y: Tensor, noise: Tensor, beta: float, latent: bool
         ) -> tuple[Tensor, Tensor]:
    """Mean of -log p(y | x, c, z) + beta KL, and the KL; without a latent w is 0."""
    mu, log = posterior(net, v, c)
    rate = kl(mu, log).mean() * latent
    w = (mu + log.exp() * noise) * latent
    return F.cross_entropy(logits(net, x, c, w), y) + beta * rate, rate


def trained(net: Tree, client: Any, seen: Sequence[Tensor], beta: float, latent: bool) -> tuple[Tree, float, float]:
    """The net after a client's steps over (x, c, v, y); the mean loss and KL."""
    params = {n: t.clone().requires_grad_() for n, t in net.items()}
    optimizer, rng = client.training.optimizer_over(list(params.values())), client.rng("bottleneck")
    plan = client.batches(client.training.count(client.n))
    size, dim = sum(t.numel() for t in net.values()), len(net["q/width"])
    client.book(tokens=0, steps=0, flops=6.0 * size * sum(map(len, plan)))
    told = np.zeros(2)
    for rows in plan:
        noise = torch.from_numpy(rng.normal(0, 1, (len(rows), dim))).to(net["u"])
        with torch.enable_grad():
            total, rate = loss(params, *(t[rows] for t in seen), noise, beta, latent)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        told += [float(total.detach()), float(rate.detach())]
    return {n: t.detach() for n, t in params.items()}, *(told / max(1, len(plan))).tolist()


def judged(net: Net, seen: Sequence[Tensor], client: Any, latent: bool, tries: int = 8) -> dict[str, float]:
    """Figures of trials (x, c, v, y); without tries the loss alone."""
    x, c, v, y = seen
    noise = torch.from_numpy(client.rng("bottleneck").normal(0, 1, (tries, len(y), len(net["q/width"])))).to(net["u"])
    with torch.no_grad():
        mu, log = posterior(net, v, c)
        z, bare = logits(net, x, c, mu * latent), logits(net, x, c, 0 * mu)
        if not tries:
            return {"loss": float(F.cross_entropy(z, y))}
        p = torch.stack([logits(net, x, c, (mu + log.exp() * e) * latent).softmax(-1) for e in noise]).mean(0)
        right = lambda z: float((z.argmax(-1) == y).double().mean())  # noqa: E731
        return {"loss": float(F.cross_entropy(z, y)), "accuracy": right(z), "card_accuracy": right(bare),
                "agree": float((p**2).sum(-1).mean()), "kl": float(kl(mu, log).mean()) * latent}
