"""The limits of `fedllm audit RUN`, and what its measures are claimed to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob

DP1 = {"epsilon": 1.0}


@dataclass(frozen=True)
class PrivacyAudit(Knobs):
    """What an audit lets pass; a run with a figure above one of these fails."""

    card: ClassVar[Card] = Card(
        title="Audit of a finished run",
        paper="Yeom et al. 2018; Carlini et al. 2019 (Secret Sharer) and 2022 (LiRA, arXiv 2112.03570); Shi et al. "
              "2023 (Min-K%, arXiv 2310.16789); Steinke et al. 2023 (one training run, arXiv 2305.08846)",
        topic="audit",
        sends="nothing: it asks the model that a run ended with",
        needs="the run's rows, held-out rows, and canaries planted by coins for exposure and empirical epsilon",
        claim=Claim("members of an overfitted run are told from others with AUC >= 0.7", rig="membership",
                    metric="auc", holds=">=", threshold=0.7, seeds=5),
        evidence="Steinke et al.'s bound for (eps, delta) was written down from their theorem 5.2.",
        also={
            "dp": Claim("under dp_sgd at epsilon 1 AUC is within 0.05 of chance", rig="membership",
                        metric="off_chance", holds="<=", threshold=0.05, seeds=5, options=DP1),
            "untrained": Claim("an untrained model tells no members: AUC within 0.06 of chance", rig="membership",
                               metric="off_chance_before", holds="<=", threshold=0.06, seeds=5),
            "lira": Claim("on a run that has half overfitted LiRA's 8 shadows do no worse than the loss",
                          rig="membership", metric="lira_gain", holds=">=", threshold=0.0, seeds=3,
                          options={"epochs": 10, "shadows": 8}),
            "exposure": Claim("a row that was trained on is exposed by at least 5 bits more than one that was not",
                              rig="membership", metric="exposure_gain", holds=">=", threshold=5.0, seeds=5),
            "epsilon": Claim("one run without privacy refutes every epsilon up to 3", rig="membership",
                             metric="epsilon_low", holds=">", threshold=3.0, seeds=5),
            "epsilon_dp": Claim("under dp_sgd at epsilon 2 no more than 2 is refuted", rig="membership",
                                metric="epsilon_low", holds="<=", threshold=2.0, seeds=5, options={"epsilon": 2.0}),
            "paraphrase": Claim("embeddings find paraphrases of private rows that 5-gram overlap misses: share found, "
                                "over the share of 5-grams", rig="paraphrases", metric="gain", holds=">=",
                                threshold=0.5, seeds=1)})

    max_auc: float = knob(0.7, "best membership score's AUC", ge=0.5, le=1)
    max_exposure: float = knob(5.0, "mean exposure of planted canaries, in bits (1.44 is chance)", gt=0)
    max_memorized: float = knob(0.1, "training rows said word for word, over the share of held-out rows", ge=0, le=1)
    max_leak: float = knob(0.2, "F1 of a client's tokens read from its messages, over a guess from public text", ge=0,
                           le=1)
