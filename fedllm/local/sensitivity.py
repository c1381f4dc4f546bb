"""How much each trainable tells about the rows: the mean of its gradient, or of the gradient's size, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.core.payload import Tree
from fedllm.local.objectives.task import Task
from fedllm.local.private import example_grads
from fedllm.local.requests import Limits, Sensitivity
from fedllm.spaces.space import stack_lanes, tree_to


def run_sensitivities(requests: Sequence[Sensitivity], limits: Limits) -> list[Tree]:
    """For each request the mean over its rows of |d loss(row) / d w|, for every trainable w, in fp32; where it is
    `signed` of d loss(row) / d w, in the trainable's own type."""
    return [_one(r) for r in requests]


def _one(request: Sensitivity, most: int = 16) -> Tree:
    params = tree_to(stack_lanes([request.theta]), request.model.device)
    signed = request.signed
    total = {n: torch.zeros_like(t[0]) if signed else torch.zeros_like(t[0]).float() for n, t in params.items()}
    size = most if request.model.stackable else 1
    for i in range(0, len(request.rows), size):
        rows = request.rows[i : i + size]
        grads = example_grads(request.model, rows, [0] * len(rows), [request.theta], request.base, params, {}, Task(),
                              [{}] * len(rows))
        for name, g in grads.items():
            total[name] += (g.sum(0) if signed else g.abs().sum(0).float()) / len(request.rows)
    return tree_to(total, "cpu")
