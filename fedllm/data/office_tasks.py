"""The instructions of pre-training: read off, name, rewrite, look up, reckon and repeat, never the routing slip."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fedllm.data import office_words as words
from fedllm.data.office_records import KINDS, Record, draw_digits, draw_record

ASK = {
    "ref": ("reference", "reference number", "number of the record", "file number"),
    "person": ("person", "name", "full name of the person"),
    "firm": ("firm", "company", "business"),
    "city": ("city", "town", "place"),
    "date": ("date", "day", "calendar date"),
    "amount": ("amount", "sum of money", "price"),
    "item": ("item", "goods", "thing"),
}
READ = ("Give the {0}.", "What is the {0}?", "Copy the {0}.", "Find the {0}.", "Only the {0}.", "Say the {0}.", "{0}?")
NAME = ("What kind of record is this?", "Name the type of record.", "Which kind?", "Classify the record.", "Type?")
BOTH = ("Give the {0} and the {1}.", "Write the {0}, then the {1}.", "{0} and {1}?", "Copy {0}, {1}.")

Pair = tuple[str, str]  # what is asked (instruction and record), and the answer


def framed(instruction: str, text: str) -> str:
    """Put an instruction above what it is about."""
    return f"{instruction}\n{text}" if text else instruction


def read_one(rng: Random) -> Pair:
    """Copy one field out of a record; the reference is asked for more often than the rest."""
    record = draw_record(rng)
    name = "ref" if rng.random() < 0.35 else rng.choice(tuple(record.shown))
    return framed(rng.choice(READ).format(rng.choice(ASK[name])), record.text), record.shown[name]


def read_two(rng: Random) -> Pair:
    """Copy two fields, in the order asked, or one field after the kind."""
    record = draw_record(rng)
    values = {**record.shown, "kind": record.kind}
    first, second = rng.sample(tuple(values), 2)
    asked = [rng.choice(ASK.get(name, ("kind", "type"))) for name in (first, second)]
    return framed(rng.choice(BOTH).format(*asked), record.text), f"{values[first]} {values[second]}"


def kind_and_ref(rng: Random) -> Pair:
    """Name the kind, then copy a field."""
    record = draw_record(rng)
    name = rng.choice(("ref", rng.choice(tuple(record.shown))))
    ask = rng.choice(("Kind and {0}.", "Name the type, then the {0}.", "Type with {0}?"))
    return framed(ask.format(rng.choice(ASK[name])), record.text), f"{record.kind} {record.shown[name]}"


def name_kind(rng: Random) -> Pair:
    """Say in a plain word what kind of record it is."""
    record = draw_record(rng)
    return framed(rng.choice(NAME), record.text), record.kind


def prefixed(rng: Random) -> Pair:
    """Answer with a word that the instruction gives, then a field."""
    record, word = draw_record(rng), rng.choice(words.CODE)
    name = rng.choice(("ref", rng.choice(tuple(record.shown))))
    ask = rng.choice(("Say {1} and the {0}.", "Write {1}, then the {0}.", "Begin with {1}. Then give the {0}."))
    return framed(ask.format(rng.choice(ASK[name]), word), record.text), f"{word} {record.shown[name]}"


def look_up(rng: Random) -> Pair:
    """Replace the kind by the word that a list in the instruction gives it: another list in every example."""
    record = draw_record(rng)
    kinds = {record.kind, *rng.sample(tuple(KINDS), rng.randint(1, 3))}
    listed = sorted(kinds, key=lambda _: rng.random())
    codes = dict(zip(listed, rng.sample(words.CODE, len(listed)), strict=True))
    table = ", ".join(f"{kind} = {code}" for kind, code in codes.items())
    if rng.random() < 0.5:
        return framed(f"{table}. Which word?", record.text), codes[record.kind]
    return framed(f"{table}. Word and reference.", record.text), f"{codes[record.kind]} {record.shown['ref']}"


def rewrite(rng: Random) -> Pair:
    """Put a short text into capitals, another order, or a polite form."""
    record = draw_record(rng)
    name = rng.choice(tuple(record.shown))
    value, way = record.shown[name], rng.randrange(4)
    if way == 0:
        return framed(f"Put the {rng.choice(ASK[name])} in capitals.", record.text), value.upper()
    if way == 1:
        return framed("Make it formal.", f"send {value} now"), f"Would you kindly send {value}."
    if way == 2:
        return framed("Make it short.", record.text), f"{record.kind}: {record.shown['ref']}"
    parts = [rng.choice(words.ITEM), rng.choice(words.CITY), draw_digits(rng, 2, 4)]
    return framed(rng.choice(("Reverse the order.", "Last first.")), "; ".join(parts)), "; ".join(reversed(parts))


def reckon(rng: Random) -> Pair:
    """Add or take away small numbers."""
    first, second = rng.randint(1, 40), rng.randint(1, 20)
    thing = rng.choice(words.ITEM)
    if rng.random() < 0.5:
        return f"{first} {thing} plus {second} {thing}?", str(first + second)
    first, second = max(first, second), min(first, second)
    return f"{first} {thing} minus {second} {thing}?", str(first - second)


def yes_or_no(rng: Random) -> Pair:
    """Say whether something holds of a record."""
    record = draw_record(rng)
    if rng.random() < 0.5:
        kind = record.kind if rng.random() < 0.5 else rng.choice(tuple(KINDS))
        return framed(f"Is this of type {kind}?", record.text), "yes" if kind == record.kind else "no"
    city = rng.choice(words.CITY)
    if "city" in record.shown and rng.random() < 0.6:
        city = record.shown["city"]
    return framed(f"Is {city} mentioned?", record.text), "yes" if city in record.text else "no"


def repeat(rng: Random) -> Pair:
    """Say a string of words and digits again, or the part that follows a given word."""
    pool = (words.CODE, words.ITEM, words.CITY, words.FIRST, words.ADJECTIVE)
    parts = [draw_digits(rng, 2, 6) if rng.random() < 0.4 else rng.choice(rng.choice(pool)) for _ in range(5)]
    if rng.random() < 0.5:
        return framed(rng.choice(("Repeat.", "Copy this.", "Say it again.")), " ".join(parts)), " ".join(parts)
    spot = rng.randrange(4)
    return framed(f"What follows {parts[spot]}?", " ".join(parts)), parts[spot + 1]


def plain(rng: Random) -> Pair:
    """A record by itself, with nothing asked."""
    record: Record = draw_record(rng)
    return "", record.text


TASKS: tuple[tuple[float, Callable[[Random], Pair]], ...] = (
    (0.26, read_one),
    (0.11, read_two),
    (0.10, kind_and_ref),
    (0.09, name_kind),
    (0.09, prefixed),
    (0.09, look_up),
    (0.06, rewrite),
    (0.04, reckon),
    (0.04, yes_or_no),
    (0.08, repeat),
    (0.04, plain),
)
"""Each task and its share of the stream."""
