"""Attackers that keep to what a defense expects: riders with little noise, colluders at an honest length."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedllm.attacks.att_byzantine import AttByzantine
from fedllm.attacks.att_free_rider import AttFreeRider
from fedllm.core.errors import RecipeError
from fedllm.core.payload import norm, sub


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_a_rider_s_noise_is_the_share_that_it_is_told(noise):
    last = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    made = AttFreeRider(clients=1, kind="delta_noise", noise=noise).made_up(last, 1, np.random.default_rng(0))
    assert norm(sub(made, last)) / norm(last) == pytest.approx(noise, rel=0.03)


@pytest.mark.parametrize("kind", ["alie", "ipm"])
def test_colluders_are_as_long_as_honest_ones_and_point_where_they_would(kind):
    rng = torch.Generator().manual_seed(0)
    honest = [{"w": torch.randn(50, generator=rng) + 1, "b": torch.randn(5, generator=rng)} for _ in range(7)]
    plain = AttByzantine(clients=3, kind=kind, scale=9.0)
    loud, quiet = (a.together(honest, 10, 3) for a in (plain, replace(plain, honest_norm=True)))
    assert norm(quiet) == pytest.approx(sorted(map(norm, honest))[3], rel=1e-5)
    flat = [torch.cat([u["w"], u["b"]]) for u in (loud, quiet)]
    assert torch.cosine_similarity(*flat, dim=0) == pytest.approx(1, abs=1e-5)
    with pytest.raises(RecipeError, match="noise = 0 is not allowed"):
        AttFreeRider(clients=1, noise=0)
