"""A model is examined when it is loaded: on a few rows it must say what the plain network of transformers says.

Compared are losses and gradients of two clients with different trainables and rows of unequal lengths, and the words
that follow when texts are continued. Where a quicker way differs it is not taken; what differs even without is refused.
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.core.rng import torch_own
from fedllm.models.exam import Exam, what
from fedllm.models.hidden import WINDOWS
from fedllm.models.model import Model
from fedllm.models.taken_for import check
from fedllm.models.verdicts import keep, kept
from fedllm.models.ways import WORDS, Ways
from fedllm.spaces.mask import Mask
from fedllm.spaces.params import Params
from fedllm.spaces.prefix import Prefix


def examine(model: Model, cache: bool = True) -> None:
    """Settle in which ways this model runs; `model.said` tells what its user must know.

    Raises ModelError naming the module that says something else than in transformers, whatever way is taken.
    """
    if model.loss is not None or model.rules.net == "policy":
        return  # a network of our own: transformers has no plain form of it
    if cache and (known := kept(model)) is not None:
        ways, model.silent, said = known
        if ways != model.ways:
            model.go(ways)
        return model.tell(said)
    said = []
    with torch_own():
        exam = Exam.of(model)
        check(exam)
        said += _settle(model, exam)
        exam.saves(model)
        if model.head is not None:
            said += _settle_speech(model, exam)
    if cache:
        keep(model, said)
    model.tell(said)


def _settle(model: Model, exam: Exam) -> list[str]:
    """Find the quickest ways that are right; gives a sentence where some are not."""
    asked, first = model.ways, exam.differs(model)
    if not first:
        return []
    least = replace(Ways(*[False] * len(WORDS)), sites=not isinstance(model.space, Params | Mask))
    model.go(least)
    if wrong := exam.differs(model):
        raise exam.refusal(model, wrong)
    best = least
    for way in ("sites", "uneven", "together", "cut", "quick", "fused", "dense"):
        if vars(best)[way] or not vars(asked)[way] or (way == "together" and not (best.sites and best.uneven)):
            continue
        model.go(replace(best, **{way: True}))
        if not exam.differs(model):
            best = model.ways
    best = replace(best, padded=asked.padded, cached=asked.cached)
    model.go(best)
    left = ", ".join(WORDS[w] for w in best.without(asked) if (w != "together" or best.sites) and (
        w != "cut" or best.uneven))
    return [f"{what(model)} runs more slowly than others, for it is right only so: {left} (otherwise "
            f"{first[0]} differs from transformers)"]


def _settle_speech(model: Model, exam: Exam) -> list[str]:
    asked = model.ways
    apart = {"padded": False}  # windows go by distance, and a prefix lies before the padding
    for change in ({} if not _windows_behind_a_prefix(model) else apart, apart, {**apart, "cached": False}):
        model.ways = replace(asked, **change)
        if not (wrong := exam.speaks_otherwise(model)):
            left = ", ".join(WORDS[w] for w in change)
            return [f"{what(model)} is right only so: {left}"] if change else []
    model.ways = asked
    model.silent = (f"{what(model)} cannot continue texts here ({wrong}); with evaluate.exact_match = false it can be "
                    "trained and tested by its loss")
    return [model.silent]


def _windows_behind_a_prefix(model: Model) -> bool:
    config = model.net.config.get_text_config().to_dict()
    return isinstance(model.space, Prefix) and any(config.get(k) for k in WINDOWS)
