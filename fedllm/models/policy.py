"""A small policy: observations in, one logit an action out; no language model, and nothing to download."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from fedllm.core.rng import torch_stream
from fedllm.models.load import DTYPES, place_of
from fedllm.models.model import Model
from fedllm.spaces.space import Space

POLICY = "policy"
"""The model's name in a recipe."""


def make_policy(observation: int, actions: int, hidden: Sequence[int], space: Space, *, seed: int = 0,
                dtype: str = "float32", device: str = "cpu") -> Model:
    """Linear maps with tanh between them; without hidden layers the policy is a table where observations are one-hot.

    Its last layer starts at zero, so that at first every action is as likely.
    """
    widths, rng = [observation, *hidden, actions], torch_stream(seed, "policy")
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for layer in (m for m in net if isinstance(m, nn.Linear)):
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=rng)
            layer.bias.zero_()
        net[-1].weight.zero_()
    return Model(net.to(DTYPES[dtype]).to(place_of(device)), None, "environment", space, seed=seed,
                 fast_kernels=False, name=POLICY)
