"""A malicious stage of a decentralized pipeline: it corrupts the activations or gradients that it passes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob
from fedllm.core.rng import numpy_stream, torch_stream


@dataclass(frozen=True)
class AttPipeline(Knobs):
    """Lu et al., Position: Exploring the Robustness of Pipeline-Parallelism-Based Decentralized Training, ICML 2024.

    In each optimizer step, with probability `rate`, one stage between the first and the last (which are trusted) is
    malicious: it sends -x, or noise from [0, 1). There are no updates to aggregate, so this is no layer of a round.
    """

    card: ClassVar[Card] = Card(
        title="A malicious stage of a decentralized pipeline, and redundant stages that find it",
        paper="Lu et al., Position: Exploring the Robustness of Pipeline-Parallelism-Based Decentralized Training, "
              "ICML 2024 [43]",
        topic="attacks",
        sends="a corrupted activation or gradient in the place of the honest one",
        needs="a pipeline of residual stages; the defense a copy of each stage at the next one",
        claim=Claim("redundant stages find every lie of a stage that lies in half of the steps", rig="pipeline",
                    metric="detected", holds=">=", threshold=1.0, kind="exact"),
        evidence="Abstract, code and the dossier. Stages are small residual blocks in one process.",
        also={"false": Claim("and accuse nobody else", rig="pipeline", metric="false", holds="<=", threshold=0.0,
                             kind="exact"),
              "loss": Claim("training with them ends within 5 % of the loss without a liar", rig="pipeline",
                            metric="defended", holds="<=", threshold=1.05, seeds=5),
              "undefended": Claim("without them it ends with a higher loss", rig="pipeline", metric="undefended",
                                  holds=">", threshold=1.0, seeds=5, wins=4),
              "backward": Claim("lies about gradients are all found too", rig="pipeline", metric="detected",
                                holds=">=", threshold=1.0, kind="exact", options={"way": "backward"})})

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
