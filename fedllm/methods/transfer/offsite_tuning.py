"""Offsite tuning: clients tune both ends of a model whose middle its owner keeps, over an emulator made once."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Moves, Trial, knob
from fedllm.methods._offsite import Offsite

ENDS = {"rig": "both_ends", "options": {"knobs": {"prealign_steps": 40}}}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class OffsiteTuning(Offsite):
    """A is the first `bottom_layers` and the last `adapter_layers` blocks; the emulator of the blocks between is made,
    and on public rows aligned, before the first round, and then stays.

    FedAvg of A. What is served is A plugged into the whole model, by block number.
    """

    card = Card(
        title="(Federated) offsite tuning",
        paper="Xiao, Lin, Han, Offsite-Tuning: Transfer Learning without Full Model, 2023, arXiv 2302.04870; federated "
              "in FederatedScope-LLM [33] and FATE-LLM [30]",
        topic="transfer", moves=Moves("adapters", "both", "owner", ("rows", "model", "compute")),
        sends="once, outside of the run: the emulator; down: A, and what the alignment changed of E; up: the change of "
              "A; never a block that was left out",
        needs="a language model of blocks; public rows at the server where the emulator is aligned; a space that "
              "trains within blocks",
        claim=Claim("two blocks at each end tuned over the emulator have a lower loss in the whole model than four at "
                    "the top", baseline="offsite_tuning", metric="plugin", relative="difference", holds="<",
                    threshold=0.0, grid=RATES, against={"knobs": {"prealign_steps": 40, "bottom_layers": 0,
                                                                  "adapter_layers": 4}}, **ENDS),
        also={"order": Claim("plugged in it is better than the model before, and worse than the same blocks tuned with "
                             "the whole model at hand (the smaller of the two gaps)", metric="order", holds=">",
                             threshold=0.0, kind="level", rig="both_ends",
                             options={"knobs": {"prealign_steps": 40}, "whole": True, "local": {"lr": 3e-3}}),
              "emulator": Claim("and better than what clients hold, the emulator with the same A", metric="margin",
                                holds=">", threshold=0.0, kind="level", rig="both_ends",
                                options={"knobs": {"prealign_steps": 40}, "local": {"lr": 3e-3}}),
              "exact": Claim("with no block left out, the emulator's loss is the whole model's (difference)",
                             metric="gap", holds="<=", threshold=1e-6, kind="exact", rig="both_ends",
                             options={"knobs": {"drop_ratio": 0.0, "prealign_steps": 0}, "rounds": 1})},
        evidence="Written from a dossier on both federated codes: blocks are spread by rounding, as in FATE (the other "
                 "floors), and put back by number, where one of them goes by the order of keys and is off by one block "
                 "after the first that was dropped. The alignment is fedbiot's (hidden states and predictions), once.",
    )
    trial = Trial({"bottom_layers": 0, "adapter_layers": 1, "drop_ratio": 0.0, "prealign_steps": 0})
    bottom_layers: int = knob(2, "blocks at the bottom that clients train; 0: at the top alone", ge=0)
    prealign_steps: int = knob(500, "steps that align the emulator before the first round; 0: it stays as cut", ge=0)
    align_steps: int = knob(0, "steps that align it again after every round (FedBiOT's way)", ge=0)
    lambda_c: float = knob(0.0, "how strongly A is held to where the round began", ge=0)

    @property
    def bottom(self) -> int:
        return self.bottom_layers

    def spread(self, middle: int, n: int) -> list[int]:
        return [round(i * (middle - 1) / (n - 1)) for i in range(n)] if n > 1 else [middle // 2]

    def kept(self, depth: int) -> list[int]:
        if self.bottom_layers + self.adapter_layers >= depth:
            raise CompositionError(
                f"method 'offsite_tuning' with bottom_layers = {self.bottom_layers} and adapter_layers = "
                f"{self.adapter_layers} leaves nothing of a model of {depth} blocks to stay with its owner; lower one "
                "of them")
        return super().kept(depth)
