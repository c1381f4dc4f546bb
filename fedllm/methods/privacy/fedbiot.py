"""FedBiOT: clients tune the top of a model that its owner keeps, over an emulator that the owner aligns every round."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.method import Card, Claim, Moves, Trial
from fedllm.methods._offsite import Offsite


@dataclass(frozen=True)
class FedBiOT(Offsite):
    """Two levels: clients min_A L(A, E) + lambda_c ||A - A_t||^2; the server min_E of E's distance from the model."""

    card = Card(
        title="FedBiOT: bi-level offsite tuning",
        paper="Wu, Li, Li, Ding, Gao, FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model, "
              "KDD 2024, arXiv 2406.17706; Xiao, Lin, Han, Offsite-Tuning, arXiv 2302.04870",
        topic="privacy", moves=Moves("adapters", "both", "owner", ("rows", "model", "compute")),
        sends="once, outside of the run: the emulator; down: LoRA of A and E; up: the change of A's",
        needs="a language model of blocks; public rows at the server; a space that trains within blocks",
        claim=Claim("aligning the emulator closes 30 % or more of what static offsite tuning loses, plugged into the "
                    "whole model, against an adapter trained with the whole model",
                    rig="offsite", metric="closed", holds=">=", threshold=0.3, seeds=5, wins=4,
                    options={"rounds": 6, "knobs": {"prealign_steps": 100}}),
        evidence="Authors' code read by the dossier: spread of the kept blocks, both terms of the alignment and its "
                 "gamma, lambda_c. A is mapped back by block number, where that code went by the order of keys.",
    )
    trial = Trial({"adapter_layers": 1, "drop_ratio": 0.0, "prealign_steps": 0, "align_steps": 0})
