"""A rig of a decentralized pipeline with a malicious stage: `RIGS["pipeline"](attack, seed, **options)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.rigs.trials import Metrics
from fedllm.attacks.att_pipeline import AttPipeline
from fedllm.defenses.pipeline_redundant import Pipeline, honest

STAGES, WIDTH, CLASSES, LAST, SPREAD = 6, 12, 3, 40, 0.7
"""Clouds overlap, so that there is a loss that no training goes below."""


class Block(nn.Module):
    """A residual block: what the message stands for goes on where the block is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def pipeline(attack: str, seed: int, *, steps: int = 300, mode: str = "reverse", way: str = "forward") -> Metrics:
    """Six stages, of which the four in the middle may lie in every second step; three clouds of points are told apart.

    `detected` is the share of lies found and `false` the steps in which somebody else was accused; `defended` and
    `undefended` are the loss of the last steps over that of the same training without a liar.
    """
    torch.set_num_threads(1)
    liar = AttPipeline.make({"mode": mode, "way": way, "seed": seed}, "knobs")
    clean = _trained(seed, steps, None, True)
    shielded, bare = (_trained(seed, steps, liar, redundant) for redundant in (True, False))
    return {"detected": shielded["found"] / max(1.0, shielded["lies"]), "false": shielded["wrong"],
            "lies": shielded["lies"], "clean": clean["loss"],
            "defended": shielded["loss"] / clean["loss"],
            "undefended": bare["loss"] / clean["loss"]}


def _trained(seed: int, steps: int, attack: AttPipeline | None, redundant: bool) -> Metrics:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [nn.Linear(8, WIDTH), *(Block() for _ in range(STAGES - 2)), nn.Linear(WIDTH, CLASSES)]
    run = Pipeline(stages, lambda p: torch.optim.Adam(p, 3e-3), redundant=redundant)
    rng = torch.Generator().manual_seed(seed)
    centers = SPREAD * torch.randn(CLASSES, 8, generator=rng)
    losses, lies, found, wrong = [], 0, 0, 0
    for t in range(steps):
        y = torch.randint(CLASSES, (32,), generator=rng)
        x = centers[y] + torch.randn(32, 8, generator=rng)
        liar = attack.draw(t, STAGES) if attack else None
        got = run.step(x, lambda z, y=y: F.cross_entropy(z, y), liar.send if liar else honest)
        hit = bool(liar and liar.stage in got.accused)
        losses.append(got.loss)
        lies, found, wrong = lies + bool(liar), found + hit, wrong + bool(got.accused and not hit)
    return {"loss": sum(losses[-LAST:]) / LAST, "lies": float(lies), "found": float(found), "wrong": float(wrong)}


RIGS = {"pipeline": pipeline}
