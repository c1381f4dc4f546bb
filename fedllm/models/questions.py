"""Questions and answers as text: numbers as multisets, hashes to match by, the answer in a rationale, and the vote."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from fedllm.tasks.answers import NUMBER

CHOICE = re.compile(r"\(([A-Z])\)")
LONE_CHOICE = re.compile(r"\b([A-Z])\b(?!')")
HASH = 32
"""Hexadecimal digits of a hash."""


def one_line(text: str) -> str:
    """The text with single spaces: a line break in a question could pass for a turn of the prompt."""
    return " ".join(text.split())


def one_turn(text: str) -> str:
    """What the model said for itself, before it goes on to invent the next question."""
    return one_line(text.split("\nQ:")[0])


def plain(number: str) -> str:
    """A number's one spelling: "5", "5.0", "05" are 5; "1,000" is 1000."""
    value = format(Decimal(number.replace(",", "")), "f")
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return "0" if value in ("-0", "") else value


def numbers(text: str) -> tuple[str, ...]:
    """The multiset of numbers written in digits, as a sorted tuple; number words do not count."""
    return tuple(sorted(plain(n) for n in NUMBER.findall(text)))


def mask(text: str) -> str:
    """The wording alone: lower case, every number a #."""
    return one_line(NUMBER.sub("#", text).lower())


def skeleton(text: str) -> tuple[str, str]:
    """Two hashes of a question: equal for questions with the same numbers; equal for those that differ in them alone.

    A question without numbers stands for its set of words, or else all such questions would match.
    """
    words = " ".join(sorted(set(re.findall(r"\w+", text.lower()))))
    keys = ("same:" + (" ".join(numbers(text)) or words), "pattern:" + mask(text))
    same, pattern = (hashlib.sha256(k.encode()).hexdigest()[:HASH] for k in keys)
    return same, pattern


def parse(said: str, question: str = "", before: str = "") -> str | None:
    """The answer: the LAST number, or the last choice where the question offers choices, or else all that was said.

    "$5", "5.0" and "5 apples" are all "5". `before` is the rationale, read when `said` holds neither number nor
    choice. None when nothing was said.
    """
    for text in (said, before):
        if CHOICE.search(question):
            if picked := CHOICE.findall(text) or LONE_CHOICE.findall(text):
                return picked[-1]
        elif found := NUMBER.findall(text):
            return plain(found[-1])
    return one_line(re.sub(r"[^\w\s]", " ", said)).lower() or None


def pooled(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The questions that a client is willing to share: its rows' prompts, apart from rows marked `withheld`."""
    return [one_line(row["prompt"]) for row in rows if not row.get("withheld")]


@dataclass(frozen=True)
class Entry:
    """A question of the pool: whose it is, its two hashes, its text, and what was voted on it, if it was."""

    client: str
    same: str  # equal for questions with the same numbers
    pattern: str  # equal for questions that differ in numbers alone
    text: str | None = None  # None: not asked for yet
    answer: str | None = None
    rationale: str = ""
    agreement: float = 0.0  # 0: not voted on


@dataclass(frozen=True)
class Thought:
    """One wording, thought through: what was said, the answer in it, log p of that answer, and the tokens spent."""

    question: str
    rationale: str = ""
    answer: str | None = None  # None abstains
    logprob: float | None = None
    tokens: tuple[int, int] = (0, 0)  # read, said
    author: str | None = None  # the client whose words they are; None: the question itself


@dataclass(frozen=True)
class Voted:
    """A question's answer by the majority, a rationale that led to it, and the share of wordings that agree.

    `thoughts` are all wordings in the order asked; `demos` the worked examples that stood in front.
    """

    question: str
    answer: str | None
    rationale: str = ""
    agreement: float = 0.0
    thoughts: tuple[Thought, ...] = ()
    demos: tuple[Voted, ...] = ()
    author: str | None = None  # the client whose question it is, where it stands as an example

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose words the answer rests on: the wordings that agree with it, and the examples in front of them."""
        agreed = [t.author for t in self.thoughts if t.answer == self.answer]
        shown = [c for d in self.demos for c in (d.author, *d.clients)]
        return tuple(sorted({c for c in (*agreed, *shown) if c is not None}))

    @property
    def cost(self) -> dict[str, int]:
        """Questions put to the model for this answer and its examples, calls (to think, to extract), and tokens."""
        spent = [*self.thoughts, *(t for d in self.demos for t in d.thoughts)]
        read, said = (sum(t.tokens[i] for t in spent) for i in (0, 1))
        return {"questions": len(spent), "calls": 2 * len(spent), "prompt_tokens": read, "completion_tokens": said}


def vote(thoughts: Sequence[Thought], tiebreak: Literal["logprob", "first"] = "first") -> Voted:
    """The answer that most thoughts gave; of equally many the likeliest in sum, or else the first asked."""
    cast = [t for t in thoughts if t.answer is not None]
    question = thoughts[0].question
    if not cast:
        return Voted(question, None, thoughts=tuple(thoughts))
    count = Counter(t.answer for t in cast)
    tied = [a for a in count if count[a] == max(count.values())]  # in the order asked
    rivals = [(t.answer, t.logprob) for t in cast if t.answer in tied]
    if tiebreak == "logprob" and all(lp is not None for _, lp in rivals):
        support = {a: sum(lp for b, lp in rivals if b == a and lp is not None) for a in tied}
        tied.sort(key=lambda a: -support[a])  # stable: equals stay in the order asked
    won = next(t for t in cast if t.answer == tied[0])
    return Voted(question, won.answer, won.rationale, count[won.answer] / len(thoughts), tuple(thoughts))


def stated(said: str, pattern: str) -> str | None:
    """The answer that a text states in so many words: the pattern's first filled group where it matches last.

    None where it states none. It is never guessed, as `parse` does: a number in passing is no answer.
    """
    found = [next((g for g in m.groups() if g), None) for m in re.finditer(pattern, said)]
    last = found[-1] if found else None
    return None if last is None else plain(last) if NUMBER.fullmatch(last) else one_line(last).lower()
