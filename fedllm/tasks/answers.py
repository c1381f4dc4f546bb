"""When an answer is right: as a whole, by its last number, by its choice, or by a function of one's own."""

from __future__ import annotations

import decimal
import importlib
import re
from collections.abc import Callable

from fedllm.core.errors import RecipeError
from fedllm.tasks.generation import same_answer

Judges = Callable[[str, str], float]
"""(what was said, what was wanted) -> 1.0 where it is right, 0.0 where not, or in between."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
CALL = "call:"


def last_number(said: str, wanted: str) -> float:
    """Whether the last number of both is the same (1,000 is 1000.0); wanted text without one counts as a whole."""
    want, got = _number(wanted), _number(said)
    return float(same_answer(said, wanted) if want is None else got == want)


def _number(text: str) -> decimal.Decimal | None:
    found = NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def choice(said: str, wanted: str) -> float:
    """Whether both choose the same letter: `B`, `(b)`, `B) Rome`, `The answer is B.`; else as a whole."""
    want = _letter(wanted)
    return float(same_answer(said, wanted) if want is None else _letter(said) == want)


def _letter(text: str) -> str | None:
    named = re.findall(r"(?i:answer|choice|option)(?:\s+is)?\s*:?\s*\(?([A-Za-z])\b", text)
    first = re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", text)
    alone = re.findall(r"(?<![\w'])\(?([B-HJ-Z])\)?(?![\w'])", text)  # A and I are words
    found = named[-1] if named else first.group(1) if first else alone[0] if alone else None
    return found.upper() if found else None


KNOWN: dict[str, Judges] = {"exact": lambda said, wanted: float(same_answer(said, wanted)), "last_number": last_number,
                            "choice": choice}
NAMES = {"exact": "exact_match"}
"""What a metric is called among figures, where that is not its own name."""


def check_metric(metric: str) -> None:
    """RecipeError for what is no metric; a function of one's own is not loaded yet."""
    if metric not in KNOWN and not (metric.startswith(CALL) and all(metric.removeprefix(CALL).partition(":")[::2])):
        raise RecipeError(f"evaluate.metric = {metric!r:.200}: allowed are {', '.join(KNOWN)}, call:module:function")


def judge_of(metric: str) -> tuple[str, Judges]:
    """(its name among figures, what judges) of `evaluate.metric`; a RecipeError names what is allowed."""
    if metric in KNOWN:
        return NAMES.get(metric, metric), KNOWN[metric]
    check_metric(metric)
    module, _, function = metric.removeprefix(CALL).partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(f"evaluate.metric = {metric!r} cannot be loaded: {error}; allowed is a function of a module "
                          "that can be imported here") from None

    def judged(said: str, wanted: str) -> float:
        got = found(said, wanted)
        if not isinstance(got, bool | int | float) or not 0 <= got <= 1:
            raise RecipeError(f"evaluate.metric = {metric!r} gave {got!r}; allowed is True, False or a number from 0 "
                              "to 1")
        return float(got)

    return "judged", judged
