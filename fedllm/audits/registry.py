"""Audits are found like methods: a file `<id>.py` in this room with one class that has a card.

So are attacks and defenses that are no layer of a round, such as those of a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.core.card import Card
from fedllm.core.found import Room
from fedllm.core.knobs import Knobs
from fedllm.core.layer import Layer

AUDITS: Room[Knobs] = Room("audits", lambda kind: not issubclass(kind, Layer) and isinstance(
    kind.__dict__.get("card"), Card), "fedllm.audits", "fedllm.attacks", "fedllm.defenses")


def audit_classes() -> Mapping[str, type[Knobs]]:
    """Audit id -> class."""
    return AUDITS
