"""Personal data in a text: patterns with their checksums, those that a site adds, and its own detector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from fedllm.core.errors import RecipeError

Finding = tuple[int, int, str]
"""Where it begins, where it ends, and what it is."""
Detector = Callable[[str], Iterable[Finding]]
NAME = re.compile(r"[A-Z][A-Z0-9_]{0,39}")
DATE = re.compile(r"(?:19|20)\d\d[-./]\d\d?[-./]\d\d?|\d\d?[-./]\d\d?[-./](?:19|20)\d\d")


def luhn(text: str) -> bool:
    """Whether the digits end in the check digit of cards (ISO/IEC 7812-1)."""
    digits = [int(c) for c in reversed(text) if c.isdecimal()]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0 and any(digits)


def mod97(text: str) -> bool:
    """Whether the number of an account is one (ISO 13616): its remainder by 97 is 1."""
    plain = text.replace(" ", "").upper()
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def dialed(text: str) -> bool:
    """Whether it is as long as a telephone number, and no date."""
    count = sum(c.isdecimal() for c in text)
    return (9 if text[0] not in "+(" else 7) <= count <= 15 and not DATE.fullmatch(text)


OWN: Mapping[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "EMAIL": (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), lambda t: True),
    "IBAN": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b"), mod97),
    "CARD": (re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])"), luhn),
    "US_SSN": (re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b"), lambda t: True),
    "IP": (re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"),
           lambda t: all(int(x) < 256 for x in t.split("."))),
    "PHONE": (re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,5}"
                         r"(?:[ .-]\d{2,5}){1,4}(?![\w-])"), dialed),
    "PERSON": (re.compile(r"\b(?:Mrs|Mr|Ms|Dr|Prof|Herr|Frau|Mme|Sir)\.? [^\W\d_a-z]\w+(?: [^\W\d_a-z]\w+)?"),
               lambda t: True),
}
"""Type -> what it looks like, and whether a text that does is one. Names without a title need a detector."""


def own_patterns(told: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """`TYPE=regular expression` of each; RecipeError where it is none."""
    out = {}
    for text in told:
        name, equals, pattern = text.partition("=")
        try:
            if not (equals and pattern and NAME.fullmatch(name)):
                raise re.error("it has no form")
            out[name] = re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"patterns: {text[:80]!r} is not allowed ({error}); it must be TYPE=REGULAR EXPRESSION, "
                              r"as in RECORD=\bMRN-\d{6}\b") from None
    return out


def personal(text: str, patterns: Mapping[str, re.Pattern[str]] | None = None, detector: Detector | None = None
             ) -> list[Finding]:
    """What of a person stands in a text, from its beginning on; of findings that overlap the longest counts."""
    found = [(m.start(), m.end(), kind) for kind, (pattern, is_one) in OWN.items()
             for m in pattern.finditer(text) if is_one(m.group())]
    found += [(m.start(), m.end(), kind) for kind, p in (patterns or {}).items() for m in p.finditer(text) if m.group()]
    found += [(int(a), int(b), str(kind)) for a, b, kind in (detector(text) if detector else ())]
    out: list[Finding] = []
    order = [*(patterns or {}), *OWN]
    rank = {kind: i for i, kind in enumerate(order)}
    for one in sorted(found, key=lambda f: (f[0] - f[1], f[0], rank.get(f[2], -1))):
        if all(one[1] <= a or one[0] >= b for a, b, _ in out):
            out.append(one)
    return sorted(out)


def redacted(text: str, found: Sequence[Finding]) -> str:
    """The text with `<TYPE>` in the place of each finding."""
    for a, b, kind in reversed(found):
        text = f"{text[:a]}<{kind}>{text[b:]}"
    return text
