"""A malicious stage of a decentralized pipeline: it corrupts the activations or gradients that it passes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedllm.core.method import Knobs, knob
from fedllm.core.rng import numpy_stream, torch_stream


@dataclass(frozen=True)
class AttPipeline(Knobs):
    """Lu et al., Position: Exploring the Robustness of Pipeline-Parallelism-Based Decentralized Training, ICML 2024.

    In each optimizer step, with probability `rate`, one stage between the first and the last (which are trusted) is
    malicious: it sends -x, or noise from [0, 1). There are no updates to aggregate, so this is no layer of a round.
    """

    rate: float = knob(0.5, "probability that a step is attacked", ge=0, le=1)
    mode: Literal["reverse", "noise"] = knob("reverse", "what is sent in the place of x", options=("reverse", "noise"))
    way: Literal["forward", "backward"] = knob("forward", "activations, or gradients (the paper's code names these and "
                                                          "has no attack on them)", options=("forward", "backward"))
    seed: int = knob(0, "seed of the draws", ge=0)

    def draw(self, step: int, stages: int) -> Liar | None:
        """Who is malicious in this step, if anybody."""
        rng = numpy_stream(self.seed, "att_pipeline", step)
        if rng.random() >= self.rate or stages < 3:
            return None
        return Liar(int(rng.integers(1, stages - 1)), self.way, self.mode, torch_stream(self.seed, "noise", step))


@dataclass
class Liar:
    """The malicious stage of one step."""

    stage: int
    way: str
    mode: str
    rng: torch.Generator = field(repr=False)

    def send(self, way: str, stage: int, x: Tensor) -> Tensor:
        """What this stage sends where x would be right."""
        if stage != self.stage or way != self.way:
            return x
        return -x if self.mode == "reverse" else torch.rand(x.shape, generator=self.rng, dtype=x.dtype)
