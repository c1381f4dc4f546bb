"""How much work a request is: tokens without padding, floating-point operations, local steps.

A linear map costs 2 operations a weight and token; its backward as much again for the gradient of its input, and once
more for its weight's. Trained whole a model costs about 6 operations a weight and token, under a frozen base 4, and
forward 2; attention (4 t^2 d a layer) and the head, which sees only what is learned, are counted beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedllm.local.requests import Fit, Generate, Probe, Request, Sensitivity
from fedllm.local.segments import Backward, Forward
from fedllm.models.batch import IGNORE
from fedllm.models.model import Model
from fedllm.spaces.space import PEFT, linear_size, output_heads

FORWARD = 1 / 3
"""Of a training step in time: a forward pass takes 2 operations a weight and token, the backward 4 more."""


@dataclass(frozen=True)
class Work:
    """What a request took."""

    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True)
class Cost:
    """Operations of one pass with a gradient; each has its share for the forward alone."""

    body: float
    """A token through all linear maps but the head."""
    body_forward: float
    head: float
    """A target (generation) or a row (classification) through the head."""
    head_forward: float
    attention: float
    """A row's squared length."""
    attention_forward: float
    ahead: int
    """Virtual tokens in front of each row."""

    def of(self, rows: Sequence[tuple[int, int]], train: bool) -> Work:
        """The work of rows given as (tokens, targets)."""
        n = np.array(rows, float).reshape(-1, 2)
        t = n[:, 0] + self.ahead
        body, head, attention = (self.body, self.head, self.attention) if train else (
            self.body_forward, self.head_forward, self.attention_forward)
        flops = body * t.sum() + head * n[:, 1].sum() + attention * (t * t).sum()
        return Work(int(n[:, 0].sum()), float(flops))


def steps_of(request: Request, batch_size: int) -> float:
    """A request's work in local steps: those of a fit, and for other work its rows by the batch."""
    if isinstance(request, Fit):
        return float(len(request.plan))
    if isinstance(request, Forward):  # a backward computes its forward again
        whole = 1.0 if isinstance(request, Backward) else FORWARD
        return len(request.mask) / batch_size * whole * request.segment.share
    rows = len(request.prompts) if isinstance(request, Generate) else len(request.rows)  # type: ignore[attr-defined]
    rows *= len(request.thetas) if isinstance(request, Probe) else 1
    return rows / batch_size * (1.0 if isinstance(request, Sensitivity) else FORWARD)


def work_of(request: Request) -> Work:
    """The work in a request; a generation is counted as if it used all the tokens that it may."""
    if isinstance(request, Forward):
        return _through(request)
    cost, passes = cost_of(request.model, request.theta), len(request.thetas) if isinstance(request, Probe) else 1
    if isinstance(request, Generate):
        new = request.max_new_tokens
        return cost.of([(len(p) + new, new) for p in request.prompts], train=False)
    rows = [request.rows[i] for at in request.plan for i in at] if isinstance(request, Fit) else (
        request.rows)  # type: ignore[attr-defined]
    done = cost.of([(len(e.ids), e.n_target) for e in rows], isinstance(request, Fit | Sensitivity))
    return Work(passes * done.tokens, passes * done.flops)


def _through(request: Forward) -> Work:
    """The work in one segment: its linear maps, its blocks' share of the attention, and the head over the targets."""
    model, segment, train = request.model, request.segment, isinstance(request, Backward)
    lengths = request.mask.sum(1)
    labels = request.labels if isinstance(request, Backward) else None
    targets = 0 if labels is None else int((labels[:, 1:] != IGNORE).sum())
    own = {n for n, _ in model.net.named_parameters(remove_duplicate=False)}
    passes = 1 + train * (1 + any(n in own for n in request.theta))  # forward, gradient of x, gradient of the weights
    attention = _attention(model.net) * (segment.stop - segment.start) / segment.of * float((lengths**2).sum())
    tokens = int(lengths.sum())
    return Work(tokens, passes * segment.operations(model, tokens, targets) + (1 + 2 * train) * attention)


def cost_of(model: Model, theta: Mapping[str, Tensor]) -> Cost:
    """What a pass of this model with these trainables costs; a net without linear maps costs what is trained."""
    net, modules = model.net, {p: i for i, (p, _) in enumerate(model.net.named_modules())}
    owners = {n: _owner(n.removeprefix(PEFT), modules) for n in theta}
    first = min((modules[p] for p in owners.values()), default=len(modules))
    heads, sizes = output_heads(net), {"body": 0.0, "head": 0.0}
    back, grad = dict(sizes), dict(sizes)
    for path, module in net.named_modules():
        if size := linear_size(module):
            part, two = "head" if path in heads else "body", 2.0 * size[0] * size[1]
            sizes[part] += two
            back[part] += two * (modules[path] > first)  # the gradient flows down to the first that is trained
            grad[part] += two * (f"{path}.weight" in theta)
    own = {n for n, _ in net.named_parameters(remove_duplicate=False)}
    for name, t in theta.items():  # factors, bottlenecks and the like, which are no weights of the network
        if t.dim() > 1 and name not in own and model.space.multiplies:
            for x in (sizes, back, grad):
                x["head" if owners[name] in heads else "body"] += 2.0 * t.numel()
    if not sizes["body"] + sizes["head"]:
        sizes["body"] = back["body"] = grad["body"] = 2.0 * sum(t.numel() for t in theta.values())
    attention, share = _attention(net), back["body"] / sizes["body"] if sizes["body"] else 0.0
    total = {p: sizes[p] + back[p] + grad[p] for p in sizes}
    return Cost(total["body"], sizes["body"], total["head"], sizes["head"], attention * (1 + 2 * min(1.0, share)),
                attention, model.space.virtual)


def _owner(name: str, modules: Mapping[str, Any]) -> str:
    """The module that a trainable belongs to, by its name."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _attention(net: nn.Module) -> float:
    """Operations of all layers' scores and sums, a squared token: 4 heads * head_dim each."""
    config = getattr(net, "config", None)
    layers, heads = (getattr(config, k, 0) or 0 for k in ("num_hidden_layers", "num_attention_heads"))
    width = heads * (getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads))
    return 4.0 * layers * width
