"""A malicious pipeline stage, and the redundant copies that find it out."""

import copy

import pytest
import torch
from torch import nn

from fedllm.attacks.att_pipeline import AttPipeline
from fedllm.defenses.pipeline_redundant import Pipeline, honest


class Residual(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(x)


def stack(seed):
    torch.manual_seed(seed)
    return [nn.Linear(8, 12), *(Residual() for _ in range(4)), nn.Linear(12, 3)]


def task(seed):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 8, generator=g)
    for _ in range(60):
        y = torch.randint(3, (32,), generator=g)
        yield centers[y] + torch.randn(32, 8, generator=g), y


def train(seed, attack=None, **options):
    """(mean loss of the last steps, attacks, lies found, false accusations, the pipeline)."""
    p = Pipeline(stack(seed), lambda q: torch.optim.Adam(q, 3e-3), **options)
    losses, attacks, found, wrong = [], 0, 0, 0
    for t, (x, y) in enumerate(task(seed)):
        liar = attack.draw(t, 6) if attack else None
        got = p.step(x, lambda z, y=y: nn.functional.cross_entropy(z, y), liar.send if liar else honest)
        losses.append(got.loss)
        attacks += liar is not None
        found += bool(liar and liar.stage in got.accused)
        wrong += bool(got.accused and not (liar and liar.stage in got.accused))
    return sum(losses[-15:]) / 15, attacks, found, wrong, p


def test_an_honest_pipeline_is_ordinary_training():
    p, whole = Pipeline(stack(0), lambda q: torch.optim.Adam(q, 3e-3)), nn.Sequential(*copy.deepcopy(stack(0)))
    optimizer = torch.optim.Adam(whole.parameters(), 3e-3)
    for x, y in task(0):
        p.step(x, lambda z, y=y: nn.functional.cross_entropy(z, y))
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(p.forward(x), whole(x), atol=1e-5, rtol=1e-4)


def test_copies_and_tries_that_were_given_up_are_counted():
    size = lambda stages: sum(q.numel() for s in stages for q in s.parameters())  # noqa: E731
    x, y = next(task(0))
    loss = lambda z: nn.functional.cross_entropy(z, y)  # noqa: E731
    bare, p = (Pipeline(stack(0), lambda q: torch.optim.Adam(q, 3e-3), redundant=r) for r in (False, True))
    once, twice = bare.step(x, loss).work, p.step(x, loss).work  # 2 operations a weight and token, and 4 back
    assert (once.tokens, once.flops) == (2 * 6 * 32, 6.0 * 32 * size(p.stages))
    assert twice.flops - once.flops == 6.0 * 32 * size(p.copies.values())
    lied = p.step(x, loss, lambda way, stage, z: -z if stage == 2 else z)
    assert lied.accused == {2, 3} and lied.work.tokens == 32 * (5 + 6 + 6)  # up to the lie; then without 2 and 3


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("relay", [True, False])
def test_every_lie_is_found_and_nobody_else_is_accused(way, relay):
    loss, attacks, found, wrong, p = train(1, AttPipeline(way=way, seed=1), relay=relay)
    assert attacks > 20 and found == attacks and wrong == 0
    for i, twin in p.copies.items():  # frozen together, so still equal to the bit
        assert all(torch.equal(a, b) for a, b in zip(p.stages[i].parameters(), twin.parameters(), strict=True))
    assert loss < 1.05 * train(1)[0] + 0.05


def test_noise_is_found_too():
    _, attacks, found, wrong, _ = train(2, AttPipeline(mode="noise", seed=2))
    assert attacks == found and wrong == 0


def test_without_copies_the_attack_costs():
    worse = 0
    for seed in range(3):
        clean, attacked = train(seed)[0], train(seed, AttPipeline(seed=seed), redundant=False)[0]
        worse += attacked > clean
    assert worse == 3
