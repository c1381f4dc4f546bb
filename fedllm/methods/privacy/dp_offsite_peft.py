"""DP + offsite tuning + PEFT: LoRA over an emulator, under a layer of differential privacy. Composition, no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.errors import CompositionError
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, Moves, Trial, knob
from fedllm.methods._offsite import Offsite

LAYER = {"example": "dp_sgd", "user": "dp_fedavg"}


@dataclass(frozen=True)
class DPOffsitePEFT(Offsite):
    """Clients keep their rows, the owner keeps its model, and what is learned of a row (or client) is bounded.

    The alignment reads public rows alone and spends nothing; choosing knobs by private scores would.
    """

    card = Card(
        title="Federated learning with differential privacy, offsite tuning and PEFT",
        paper="Zhao, Privacy-preserving Fine-tuning of Artificial Intelligence Foundation Models with Federated "
              "Learning, Differential Privacy, Offsite Tuning, and Parameter-Efficient Fine-Tuning, TechRxiv 2023",
        topic="privacy", moves=Moves("adapters", "both", "owner", ("rows", "model", "compute")),
        sends="as fedbiot: down LoRA of A and E, up the change of A's (of B alone with freeze_a), noisy",
        needs="a layer of differential privacy: dp_sgd (dp_level example) or dp_fedavg, dp_ftrl (user); public rows",
        claim=Claim("at an example-level epsilon of 8 the plugged-in model is better than before tuning",
                    rig="private_offsite", metric="share", holds=">", threshold=0.0, seeds=3, wins=3),
        evidence="A position paper: the method is the composition. Its parts are fedbiot's and the privacy layers'.",
    )
    trial = Trial({"adapter_layers": 1, "drop_ratio": 0.0, "prealign_steps": 0, "align_steps": 0, "dp_level": "none"})
    dp_level: Literal["none", "example", "user"] = knob(
        "example", "what the layers must protect: single rows, whole clients, or nothing (for comparison)",
        options=("none", "example", "user"))

    def check_layers(self, layers: Sequence[Any]) -> None:
        """The privacy that the method's name promises must be in the stack."""
        levels = {"user" if x.algebra.needs == "sum" else "example" for x in layers if x.algebra.kind == "dp"}
        if self.dp_level != "none" and self.dp_level not in levels:
            raise CompositionError(
                f"method 'dp_offsite_peft' with dp_level = {self.dp_level} and the layers "
                f"{[name_of(x) for x in layers]} do not fit together: none of them gives it; list "
                f"{LAYER[self.dp_level]}, or set method.dp_level = none")
