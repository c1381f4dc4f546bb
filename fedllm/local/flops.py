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

from fedllm.data.encode import Encoded
from fedllm.local.generate import prompt_ids
from fedllm.local.policy import Improve, Rollout
from fedllm.local.requests import Booked, Complete, Fit, Generate, Outputs, Probe, Request, Sensitivity
from fedllm.local.segments import Backward, Forward
from fedllm.local.text import room
from fedllm.models.batch import IGNORE
from fedllm.models.endpoint import Usage
from fedllm.models.model import Model
from fedllm.models.sealed import opened
from fedllm.spaces.space import linear_size, output_heads

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
    """A request's work in local steps of the whole model: those of a fit, and for other work its rows by the batch. In
    an emulator of a share of its blocks a step takes that share."""
    share = request.model.share if isinstance(request.model, Model) and not isinstance(request, Booked) else 1.0
    return share * _steps(request, batch_size)


def _steps(request: Request, batch_size: int) -> float:
    if isinstance(request, Booked):
        return request.steps
    if isinstance(request, Fit):  # what goes beside a row passes through the model too
        return float(len(request.plan) * (1 + len(request.alongside)))
    if isinstance(request, Rollout):
        return request.most / batch_size * FORWARD
    if isinstance(request, Improve):
        return request.steps * len(request.actions) / batch_size
    if isinstance(request, Forward):  # a backward computes its forward again
        whole = 1.0 if isinstance(request, Backward) else FORWARD
        return len(request.mask) / batch_size * whole * request.segment.share
    said = isinstance(request, Generate | Complete)
    rows = len(request.prompts) if said else len(request.rows)  # type: ignore[attr-defined]
    rows *= len(request.thetas) if isinstance(request, Probe) else 1
    return rows / batch_size * (1.0 if isinstance(request, Sensitivity) else FORWARD)


def work_of(request: Request) -> Work:
    """The work in a request; a generation, or an episode, is counted as if it were as long as it may be. What an
    endpoint does is no work of the client's device, and stands in its ledger of tokens."""
    if isinstance(request, Booked):
        return Work(request.tokens, request.flops)
    if isinstance(request, Complete):
        return _said(request)
    if isinstance(request, Forward):
        return _through(request)
    cost, passes = cost_of(request.model, request.theta), len(request.thetas) if isinstance(request, Probe) else 1
    if isinstance(request, Generate):
        new = request.max_new_tokens
        return cost.of([(len(p) + new, new) for p in request.prompts], train=False)
    if isinstance(request, Rollout):
        return cost.of([(request.wide, 1)] * request.most, train=False)
    if isinstance(request, Improve):
        return cost.of([(1, 1)] * (request.steps * len(request.actions)), train=True)
    if isinstance(request, Outputs):
        return cost.of([(len(x), 1) for x in request.rows], train=False)
    done = cost.of([(len(e.ids), e.n_target) for e in _rows(request)], isinstance(request, Fit | Sensitivity))
    return Work(passes * done.tokens, passes * done.flops)


def book(ledger: Usage, request: Request, answer: Any) -> None:
    """Add what a request took to the ledger of its model: rows or prompts, tokens read, tokens said."""
    if isinstance(request, Booked):
        ledger.prompt_tokens += request.tokens
        return
    if isinstance(request, Complete):
        return ledger.book(answer)
    if isinstance(request, Generate):
        ledger.completion_tokens += sum(map(len, answer))
    passes = len(request.thetas) if isinstance(request, Probe) else 1
    read = request.prompts if isinstance(request, Generate) else _rows(request)
    ledger.calls += passes * len(read)
    ledger.prompt_tokens += passes * sum(len(r.ids) if isinstance(r, Encoded) else len(r) for r in read)


def _rows(request: Any) -> Sequence[Any]:
    """The rows that a request reads; those of a fit as often as it reads them."""
    if isinstance(request, Fit):
        return [v[i] for at in request.plan for i in at for v in (request.rows, *request.alongside)]
    return request.rows


def _said(request: Complete) -> Work:
    """A model of ours continues each prompt, and then reads its answer once more to say how likely it is."""
    model, new = opened(request.model), request.max_new_tokens
    if not isinstance(model, Model):
        return Work()
    rows = [(len(p) + new, new) for p in prompt_ids(request.prompts, model.tokenizer, room(model, new))]
    once = cost_of(model, request.theta).of(rows, train=False)
    return once + once


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
    model = opened(model)
    net, modules = model.net, {p: i for i, (p, _) in enumerate(model.net.named_modules())}
    placed = {model.space.place(n) for n in theta}
    owners = {n: _owner(model.space.place(n), modules) for n in theta}
    first = min((modules[p] for p in owners.values()), default=len(modules))
    heads, sizes = output_heads(net), {"body": 0.0, "head": 0.0}
    back, grad = dict(sizes), dict(sizes)
    for path, module in net.named_modules():
        if (size := linear_size(module)) and not path.startswith(model.resting):
            part, two = "head" if path in heads else "body", 2.0 * size[0] * size[1]
            sizes[part] += two
            back[part] += two * (modules[path] > first)  # the gradient flows down to the first that is trained
            grad[part] += two * (f"{path}.weight" in placed)
    own = {n for n, _ in net.named_parameters(remove_duplicate=False)}
    for name, t in theta.items():  # factors, bottlenecks and the like, which are no weights of the network
        if t.dim() > 1 and model.space.place(name) not in own and model.space.multiplied(name):
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
