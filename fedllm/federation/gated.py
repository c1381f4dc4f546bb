"""The gate at a site: its own demands over those of the run, its own book of verdicts, and no text around it."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import PayloadError, RecipeError, RunError
from fedllm.core.layer import name_of
from fedllm.core.payload import Payload
from fedllm.engines.far.leaving import Words, held_back
from fedllm.engines.far.reasons import Refused
from fedllm.gate.verdict import KEY, judged, spoken
from fedllm.privacy.responsible_gate import ResponsibleGate

GATE = "responsible_gate"
BOOK = "gate.jsonl"
"""In a site's store: every verdict, whatever the coordinator kept of it."""


def demanded(gate: Mapping[str, Any], detector: str | None) -> ResponsibleGate:
    """The gate as a site's settings have it (`gate`, `gate_detector`); RecipeError for what they say wrongly."""
    made = ResponsibleGate.make({k: tuple(v) if isinstance(v, list) else v for k, v in gate.items()}, "gate")
    if detector is not None:
        module, _, name = detector.partition(":")
        try:
            object.__setattr__(made, "detector", tried(getattr(importlib.import_module(module), name)))
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise RecipeError(f"gate_detector = {detector!r} is not allowed ({error}); it must be "
                              "module:function of a module that is installed here") from None
    return made


def tried(detector: Any) -> Any:
    """The function, if what it says of a text are findings; TypeError or ValueError where it says anything else."""
    for begin, end, kind in detector("A word."):
        if not (isinstance(begin, int) and isinstance(end, int) and isinstance(kind, str)):
            raise TypeError("of 'A word.' it says what is no list of (begin, end, TYPE)")
    return detector


def gated(method: Any, layers: Sequence[Any], gate: Mapping[str, Any], detector: str | None) -> list[Any]:
    """The layers with a site's demands in their gate; `Refused` where the method sends text and there is none."""
    if not any(isinstance(x, ResponsibleGate) for x in layers):
        if "text" in method.card.kinds:
            raise Refused("gate", f"method '{name_of(method)}' sends text; the run must list {GATE}")
        return list(layers)
    mine = demanded(gate, detector)
    return [x.under(mine) if isinstance(x, ResponsibleGate) else x for x in layers]


def only_judged(reply: Payload, words: Words, sealed: bool, tells: Sequence[str], store: Path, run: str, phase: str
                ) -> None:
    """`Refused` where a reply holds text that no verdict is about; the verdicts are written down before it leaves."""
    if KEY not in reply:
        if held_back(reply, words, sealed, tells) and any(True for _ in spoken(reply)):
            raise Refused("gate", "the gate did not look at this reply")
        return
    try:
        verdicts, _ = judged(reply)
    except PayloadError as error:
        raise Refused("gate", str(error)) from None
    line = {"time": time.time(), "run": run, "phase": phase, "items": [v.listed() for v in verdicts]}
    try:
        with open(store / BOOK, "ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")  # who was killed as it wrote has a line of its own
            file.write(json.dumps(line).encode() + b"\n")
    except OSError as error:
        raise RunError(f"{store / BOOK} cannot be written: {error.strerror}; no text leaves without its verdict on "
                       "record") from None
