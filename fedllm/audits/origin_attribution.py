"""Origin attribution: which of some models wrote a text, or none of them, by its likelihood under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedllm.audits.membership import row_scores
from fedllm.core.card import Card, Claim
from fedllm.core.errors import DataError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.requests import Limits
from fedllm.models.model import Model

ORIGIN = {"rig": "origin", "kind": "level"}


@dataclass(frozen=True)
class Origin(Knobs):
    """A text is the model's under which it is likelier than under all others and under a reference, by a margin that
    texts of nobody pass in one case of a hundred.

    The margin is calibrated on texts that none of the models wrote. A text that was rewritten by another model is that
    model's; a model that never was a candidate is `none`.
    """

    card: ClassVar[Card] = Card(
        title="Origin attribution of generated text",
        paper="Wang et al., Where Did I Come From? Origin Attribution of AI-Generated Images, NeurIPS 2023 [71]",
        topic="LLMs for federated learning: responsible use",
        sends="nothing: it reads texts and models",
        needs="language models that can be asked for likelihoods, one of them as a reference; texts that none of them "
              "wrote, to calibrate on",
        claim=Claim("of texts of three small models at least 90 % are laid at the door of the one that wrote them",
                    metric="accuracy", holds=">=", threshold=0.9, **ORIGIN),
        also={"false": Claim("and of texts that none of them wrote at most 2 % are laid at anybody's",
                             metric="false", holds="<=", threshold=0.02, **ORIGIN)},
        evidence="The paper inverts image generators and tests the residual; the text counterpart is the dossier's "
                 "likelihood ratio. Watermarks are left out: who generates here is mostly a model whose sampling is "
                 "not ours to change.")

    false_positives: float = knob(0.01, "share of nobody's texts that may be laid at some model's door", gt=0, lt=1)

    def margin(self, nobody: np.ndarray, reference: np.ndarray) -> float:
        """The least lead that counts: `nobody` [texts, models] and `reference` [texts] are log-likelihoods of texts
        that none of the models wrote.

        Raises DataError for fewer texts than one false one would need.
        """
        if len(nobody) < (least := int(np.ceil(1 / self.false_positives))):
            raise DataError(f"{len(nobody)} texts that no model wrote cannot tell a rate of {self.false_positives:g}; "
                            f"needed are {least}, or a larger false_positives")
        lead, _ = leads(nobody, reference)
        return max(0.0, float(np.quantile(lead, 1 - self.false_positives, method="higher")))

    def attribute(self, said: np.ndarray, reference: np.ndarray, margin: float) -> list[int | None]:
        """Whose each text is (an index), or None; `said` [texts, models], `reference` [texts]."""
        lead, best = leads(said, reference)
        return [int(b) if gap > margin else None for gap, b in zip(lead, best, strict=True)]


def leads(said: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the likeliest model is ahead of all others and of the reference, and which it is."""
    best = said.argmax(1)
    rest = np.where(np.arange(said.shape[1]) == best[:, None], -np.inf, said).max(1, initial=-np.inf)
    return said.max(1) - np.maximum(rest, reference), best


def likelihood(model: Model, theta: Tree, base: Tree | None, rows: Sequence[Encoded], sizes: Sequence[int],
               limits: Limits) -> np.ndarray:
    """Log-likelihood of each row over its size, which is one for all models (characters): tokenizers differ."""
    mean = row_scores(model, theta, base, rows, limits)["loss"]
    count = np.array([max(1, int((np.asarray(r.labels)[1:] >= 0).sum())) for r in rows])
    return mean * count / np.maximum(1, np.asarray(sizes))
