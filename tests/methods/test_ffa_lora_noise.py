"""DP noise in the product B A: linear in the noise on B when A is frozen, and worse than linear when both carry it."""

from __future__ import annotations

import pytest
import torch

from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.spaces.lora import factors

CLIP = 0.1


def product_noise(begin, method: str, z: float) -> float:
    """How far the deployed product is, after one round, from what it is without noise (root of summed squares)."""
    ends = []
    for noise in (0.0, z):
        layer = DPFedAvg(noise_multiplier=noise, clip_norm=CLIP, clip_lr=0.0, seed=3)
        run = begin(method, layers=(layer,)).go(1)
        theta = run.method.served(run.state)[0]
        ends.append({p: b @ a for p, (b, a) in factors(theta).items()})
    return float(sum((ends[1][p] - m).pow(2).sum() for p, m in ends[0].items()) ** 0.5)


@pytest.mark.parametrize("times", [8.0, 64.0])
def test_with_frozen_a_noise_is_linear(begin, times):
    assert product_noise(begin, "ffa_lora", times) == pytest.approx(times * product_noise(begin, "ffa_lora", 1.0),
                                                                    rel=1e-6)


def test_with_both_factors_noisy_it_grows_faster_and_the_gap_widens(begin):
    lora, ffa = ([product_noise(begin, m, z) for z in (1.0, 8.0, 64.0)] for m in ("fedit", "ffa_lora"))
    assert lora[1] > 8.5 * lora[0] and lora[2] > 20 * lora[1]  # towards the square
    ratio = [a / b for a, b in zip(lora, ffa, strict=True)]
    assert 1.0 <= ratio[0] < ratio[1] < ratio[2]


def test_noise_on_b_alone_leaves_a_as_it_was(begin):
    layer = DPFedAvg(noise_multiplier=1.0, clip_norm=CLIP, seed=0)
    run = begin("ffa_lora", layers=(layer,)).go(2)
    first = run.world.model.initial()
    assert all(torch.equal(t, first[n]) for n, t in run.state["theta"].items() if n.endswith("lora_A.weight"))
