"""An update told as a few synthetic inputs: steps on them that can be made again, and inputs that lead to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.models.model import Model
from fedllm.spaces.space import tree_to
from fedllm.spaces.twice import twice


def replayed(model: Model, theta: Mapping[str, Tensor], x: Tensor, y: Tensor, log_a: Tensor, steps: int,
             graph: bool = False) -> dict[str, Tensor]:
    """theta after so many steps of gradient descent on the same texts: x [M, T, d] embeddings, y [M, C] logits of their
    labels, exp(log_a) the step size. With `graph` the steps can be differentiated, and the end lies where the model
    does; without, where theta does."""
    home, there = next(iter(theta.values())).device, model.device
    w = {n: t.detach().to(there, copy=True).requires_grad_() for n, t in theta.items()}
    x, y, log_a = (t.to(there) for t in (x, y, log_a))
    mask, wanted = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), y.softmax(-1)
    for _ in range(steps):
        with model.using([w]), twice():
            z = model.outputs(x, mask)  # [M, C]
            loss = -(wanted * z.log_softmax(-1)).sum(-1).mean()
        slopes = torch.autograd.grad(loss, list(w.values()), create_graph=graph, allow_unused=True)
        a = log_a.exp()
        w = {n: t if g is None else t - a.to(t.dtype) * g for (n, t), g in zip(w.items(), slopes, strict=True)}
        if not graph:
            w = {n: t.detach().requires_grad_() for n, t in w.items()}
    return w if graph else {n: t.detach().to(home) for n, t in w.items()}


def told_by_inputs(model: Model, theta: Tree, update: Tree, shape: tuple[int, int, int], classes: int, steps: int,
                   tries: int, lr: float, draw: torch.Generator, go_on: Callable[[], None] = lambda: None
                   ) -> tuple[Tensor, Tensor, Tensor, float]:
    """(x, y, log_a) whose replay ends near theta + update, and the cosine of the two changes.

    min ||(w~ - theta) - u||^2 / ||u||^2 over all three, by Adam; the best of all steps is given back.
    """
    kind, there = next(iter(theta.values())).dtype, model.device
    theta, update = tree_to(theta, there), tree_to(update, there)
    table = model.net.get_input_embeddings().weight  # type: ignore[operator]
    spread = float(table.detach().float().std())
    x = (spread * torch.randn(shape, generator=draw)).to(there, kind).requires_grad_()
    y = (0.1 * torch.randn(shape[0], classes, generator=draw)).to(there, kind).requires_grad_()
    log_a = torch.tensor(-1.0, dtype=kind).to(there).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [x], "lr": lr * max(spread, 1e-3)}, {"params": [y, log_a], "lr": lr}])
    size = sum(float(t.double().pow(2).sum()) for t in update.values())
    best, kept = float("inf"), (x, y, log_a)
    for _ in range(tries):
        go_on()
        w = replayed(model, theta, x, y, log_a, steps, graph=True)
        far = sum(((w[n] - theta[n] - u) ** 2).sum() for n, u in update.items()) / max(size, 1e-30)
        now = float(far.detach())  # type: ignore[union-attr]
        if now < best:
            best, kept = now, (x.detach().clone(), y.detach().clone(), log_a.detach().clone())  # type: ignore[arg-type]
        optimizer.zero_grad()
        far.backward()  # type: ignore[union-attr]
        optimizer.step()
    x, y, log_a = (t.detach() for t in kept)
    return x.cpu(), y.cpu(), log_a.cpu(), cosine(replayed(model, theta, x, y, log_a, steps), theta, update)


def cosine(w: Tree, theta: Tree, update: Tree) -> float:
    """Of the change that a replay makes, and the change that was meant."""
    mine = {n: (w[n] - theta[n]).double() for n in update}
    dot = sum(float((mine[n] * u.double()).sum()) for n, u in update.items())
    sizes = [sum(float(t.double().pow(2).sum()) for t in tree.values()) ** 0.5 for tree in (mine, update)]
    return dot / max(sizes[0] * sizes[1], 1e-30)
