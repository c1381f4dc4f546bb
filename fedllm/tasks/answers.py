"""When an answer is right: as a whole, by its number, its choice, its words, or by a function of one's own."""

from __future__ import annotations

import decimal
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence

from fedllm.core.errors import RecipeError

Judges = Callable[[str, str], float]
"""(what was said, what was wanted) -> 1.0 where it is right, 0.0 where not, or in between."""
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
FINAL = "####"
"""Stands before the answer of a GSM8K rationale."""
CALL = "call:"


def same_answer(said: str, wanted: str) -> bool:
    """Equal up to white space."""
    return re.sub(r"\s+", " ", said).strip() == re.sub(r"\s+", " ", wanted).strip()


def last_number(said: str, wanted: str) -> float:
    """Whether both come to the same number: that after the first `####`, or else the last (1,000 is 1000.0); wanted
    text without one counts as a whole."""
    want, got = number_in(wanted), number_in(said)
    return float(same_answer(said, wanted) if want is None else got == want)


def number_in(text: str) -> decimal.Decimal | None:
    """The number that a text comes to; None where it holds none."""
    # A model that goes on after its answer invents the next question: what counts is what stands behind the first mark.
    marked = NUMBER.search(text.split(FINAL)[1]) if FINAL in text else None
    found = [marked.group()] if marked else NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def choice(said: str, wanted: str) -> float:
    """Whether both choose the same letter: `B`, `(b)`, `B) Rome`, `The answer is B.`; else as a whole."""
    want = letter_in(wanted)
    return float(same_answer(said, wanted) if want is None else letter_in(said) == want)


def letter_in(text: str) -> str | None:
    """The letter that a text chooses; None where it names none."""
    named = re.findall(r"(?i:answer|choice|option)(?:\s+is)?\s*:?\s*\(?([A-Za-z])\b", text)
    first = re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", text)
    alone = re.findall(r"(?<![\w'])\(?([B-HJ-Z])\)?(?![\w'])", text)  # A and I are words
    found = named[-1] if named else first.group(1) if first else alone[0] if alone else None
    return found.upper() if found else None


class _Words:
    """Words in lower case, of any script: the tokenizer of `rouge-score` knows a to z alone."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge(said: str, wanted: str) -> float:
    """ROUGE-L, the F measure of the longest common subsequence of words (Lin 2004)."""
    return float(_rouge_l().score(wanted, said)["rougeL"].fmeasure)


@functools.cache
def _rouge_l():  # type: ignore[no-untyped-def]
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise RecipeError("evaluate.metric = 'rouge' needs the package rouge-score; pip install 'fedlm[rouge]'"
                          ) from None
    return RougeScorer(["rougeL"], tokenizer=_Words())


KNOWN: dict[str, Judges] = {"exact": lambda said, wanted: float(same_answer(said, wanted)), "last_number": last_number,
                            "choice": choice, "rouge": rouge}
NAMES = {"exact": "exact_match", "rouge": "rouge_l"}
"""What a metric is called among figures, where that is not its own name."""


def listed(metric: str | Sequence[str]) -> list[str]:
    """`evaluate.metric` as a list, each of a known form; a RecipeError names what is allowed. Nothing is imported."""
    names = [metric] if isinstance(metric, str) else list(metric)
    for name in names:
        module, _, function = name.removeprefix(CALL).partition(":")
        if name not in KNOWN and not (name.startswith(CALL) and module and function):
            raise RecipeError(f"evaluate.metric = {name!r:.200}: allowed are {', '.join(KNOWN)}, call:module:function, "
                              "or a list of them")
    calls = [n for n in names if n.startswith(CALL)]
    if not names or len(set(names)) < len(names) or len(calls) > 1:
        raise RecipeError(f"evaluate.metric = {metric!r}: allowed is one metric or a list of different ones, with one "
                          "call: at most")
    return names


def judges_of(metric: str | Sequence[str]) -> Mapping[str, Judges]:
    """What judges, by its name among figures, of all that `evaluate.metric` names."""
    return dict(judge_of(name) for name in listed(metric))


@functools.cache
def judge_of(metric: str) -> tuple[str, Judges]:
    """(its name among figures, what judges) of one metric; a RecipeError says what cannot be loaded."""
    listed(metric)
    if metric in KNOWN:
        if metric == "rouge":
            _rouge_l()
        return NAMES.get(metric, metric), KNOWN[metric]
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
