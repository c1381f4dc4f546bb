"""`make models`: which architectures are right with which spaces, judged by plain transformers and PEFT.

`python -m evidence.models [NAME ...]` writes docs/results/models.md (for all of them) or prints the cells of some.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from evidence.zoo.cell import Verdict, judge
from evidence.zoo.configs import TASKS

PAGE = Path(__file__).parents[1] / "docs" / "results" / "models.md"
SPACES = ("lora", "soft_prompt", "prefix", "adapter", "ia3", "bias", "head", "full", "layers", "mask")
MARKS = {"right": ".", "refused": "R", "WRONG": "**W**", "broken": "**T**", "no model": "-"}
LETTERS = {"sites": "w", "together": "1", "uneven": "r", "cut": "m", "quick": "k", "fused": "h", "padded": "g",
           "cached": "c", "silent": "n"}
"""What stands in a cell that falls back, a letter for each way that is left out."""
FAST = (("llama", ("lora", "full", "prefix")), ("gemma2", ("lora", "soft_prompt")), ("gpt2", ("lora", "mask")),
        ("cohere", ("lora",)), ("granite", ("full",)), ("mixtral", ("lora",)), ("mamba", ("full", "lora")),
        ("opt", ("full",)), ("gemma", ("full",)), ("nemotron", ("bias",)), ("bert", ("lora", "full")),
        ("deberta-v2", ("lora", "full")), ("xlnet", ("lora",)), ("masked_words:bert", ("lora",)),
        ("masked_words:roberta", ("head",)),
        ("masked_words:nystromformer", ("lora",)), ("image_text:clip", ("lora", "full")),
        ("image_text:siglip", ("lora", "bias")))
"""Cells that CI judges: one of each kind of trouble."""
TITLES = {"generation": "Language models", "classification": "Encoders under a classifier",
          "masked_words": "Models of hidden words", "image_text": "Image-text models"}


def named(name: str) -> tuple[str, str]:
    """`TASK:NAME` or a name of a language model or an encoder -> task and architecture; SystemExit for an unknown."""
    task, _, own = name.rpartition(":")
    for known in [task] if task in TASKS else ["generation", "classification"]:
        if own in TASKS[known][0]:
            return known, own
    raise SystemExit(f"{name!r} is no architecture of evidence/zoo/configs.py; write NAME or TASK:NAME, with a task of "
                     f"{', '.join(TASKS)}")


def judged(names: Sequence[tuple[str, str]], spaces: Sequence[str] = SPACES) -> Iterator[Verdict]:
    """Every cell of these architectures."""
    for task, name in names:
        for space in spaces:
            yield judge(name, space, task)


def mark(v: Verdict) -> str:
    """What stands in the table."""
    return MARKS.get(v.outcome) or "".join(LETTERS[w] for w in v.ways)


def page(verdicts: Sequence[Verdict], seconds: float) -> str:
    """The table and what is behind it, as Markdown."""
    cells = {(v.task, v.name, v.space): v for v in verdicts}
    count = Counter(v.outcome for v in verdicts)
    tally = ", ".join(f"{n} {o}" for o, n in count.most_common())
    lines = [
        "# Any Hugging Face model: right or refused", "",
        f"`make models`, {len({(v.task, v.name) for v in verdicts})} tiny random architectures (two layers, width 32 "
        f"or less) with {len(SPACES)} spaces, {seconds / 60:.0f} minutes on one core; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}. Each cell: two clients with "
        "unequal rows and one round of two SGD steps in both engines, fp64 (fp32, marked so, where transformers has no "
        "fp64); the loss, every changed trainable, and three greedy words after each text are compared with a loop in "
        "plain transformers and PEFT that takes one row at a time, without padding. Written by "
        "`evidence/models.py`.", "",
        f"**{tally}.**", "",
        "`.` right · `R` refused in a sentence · **W** wrong · **T** traceback · `-` transformers cannot build it · "
        "letters: right, and slower than others, for the model was examined when it was loaded: `1` one client at a "
        "time, `w` weights put into the network for the time of a forward, `k` the network's own kernels, `h` its own "
        "logits, `m` right padding masked, `r` texts of one length at a time, `g` so where it generates, `c` without a "
        "cache there, `n` trains and does not generate.", ""]
    for task, (names, _) in TASKS.items():
        lines += [f"## {TITLES[task]}", "", f"| architecture | {' | '.join(SPACES)} |",
                  "|---" * (1 + len(SPACES)) + "|"]
        for name in names:
            row = [cells[task, name, s] for s in SPACES if (task, name, s) in cells]
            narrow = " (fp32)" if any(v.dtype == "float32" for v in row) else ""
            if row:
                lines.append(f"| {name}{narrow} | {' | '.join(mark(v) for v in row)} |")
        lines.append("")
    lines += ["## Why", "", "What is refused, by its reason; a name stands for the architecture.", ""]
    reasons: dict[str, list[str]] = {}
    for v in verdicts:
        if v.outcome not in ("right", "falls back"):
            reasons.setdefault(_reason(v), []).append(f"{v.name}/{v.space}")
    lines += [f"- {why}: {', '.join(where[:8])}{f' and {len(where) - 8} more' if len(where) > 8 else ''}"
              for why, where in sorted(reasons.items(), key=lambda item: -len(item[1]))]
    return "\n".join([*lines, ""])


def _reason(v: Verdict) -> str:
    why = v.why.replace(repr(v.name), "NAME").replace(repr(v.space), "SPACE").replace("|", "/")
    for what, short in (("; it has .*", ""), (r"\w+(Model|ForCausalLM) (keeps|learns)", r"CLASS \2"),
                        (r" \(\d+\.\d+, not \d+\.\d+\)", ""), (r"NAME \(\w+\)", "NAME"),
                        (r"decoder \(\w+\)", "decoder"), (r"in \w+LMHeadModel", "in CLASS")):
        why = re.sub(what, short, why)
    return f"{v.outcome}: {why[:230]}"


def main() -> None:
    """Judge, then print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; none: all, and the page is written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    begun, verdicts = time.monotonic(), []
    every = [(task, name) for task, (names, _) in TASKS.items() for name in names]
    for v in judged([named(n) for n in given.names] or every):
        verdicts.append(v)
        print(f"{v.name:20} {v.space:12} {mark(v):6} {v.why if v.outcome != 'right' else ''}"[:300],  # noqa: T201
              flush=True)
    if not given.names:
        PAGE.write_text(page(verdicts, time.monotonic() - begun))
    if bad := [v for v in verdicts if v.outcome in ("WRONG", "broken")]:
        raise SystemExit(f"{len(bad)} cells are wrong: {[(v.name, v.space) for v in bad]}")


if __name__ == "__main__":
    main()
