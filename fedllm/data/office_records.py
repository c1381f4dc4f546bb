"""Office records: one person, one firm, one reference and so on, told in one of many kinds and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from fedllm.data import office_words as words

KINDS: Mapping[str, tuple[str, ...]] = {
    "invoice": (
        "{firm} bills {person} {amount} for {item}, payable by {date}",
        "please pay {amount} to {firm} for the {item}",
        "amount due {amount}, billed to {person} by {firm}",
    ),
    "complaint": (
        "{person} is unhappy with the {item} from {firm}",
        "the {item} arrived broken and {person} of {city} is angry",
        "{person} protests that {firm} was rude on {date}",
    ),
    "appointment": (
        "{person} will see the advisor in {city} on {date}",
        "a visit is booked for {person} on {date}",
        "{firm} expects {person} at the {city} desk on {date}",
    ),
    "shipment": (
        "the {item} left {city} by truck on {date}",
        "{firm} sent the {item} to {city}, in transit since {date}",
        "a parcel of {item} is on its way to {person} in {city}",
    ),
    "leave": (
        "{person} asks for days off from {date}",
        "{person} wants a holiday in {city} from {date}",
        "{person} will be absent from {firm} after {date}",
    ),
    "meeting": (
        "{person} and the board of {firm} discussed the {item}",
        "minutes of {date}: {person} spoke about the {item}",
        "the team met in {city} on {date}, chaired by {person}",
    ),
    "repair": (
        "the {item} in {city} do not work, {person} asks to fix them",
        "{person} found a fault in the {item} on {date}",
        "a technician must mend the {item} at {firm}",
    ),
    "prescription": (
        "{person} takes two tablets a day from {date}",
        "the doctor in {city} gave {person} a new medicine",
        "the pharmacy hands {person} the pills on {date}",
    ),
    "contract": (
        "{person} and {firm} agree on terms until {date}",
        "{firm} signed with {person} in {city}, worth {amount}",
        "the parties {firm} and {person} are bound from {date}",
    ),
    "order": (
        "{person} of {city} wants to buy {item} for {amount}",
        "{firm} requests {item}, to be delivered by {date}",
        "please supply {item} to {person} at {amount}",
    ),
    "refund": (
        "{firm} gives {amount} back to {person}",
        "{person} gets the money back for the {item}",
        "{amount} was returned to {person} of {city} on {date}",
    ),
    "inspection": (
        "{person} checked the {item} at {firm} for safety",
        "the safety visit to {firm} in {city} passed on {date}",
        "{person} examined the site in {city} on {date}",
    ),
    "training": (
        "{person} teaches a course on {item} in {city}",
        "the class for {person} at {firm} begins on {date}",
    ),
    "application": (
        "{person} of {city} applies for a job at {firm}",
        "{person} hopes to work for {firm} from {date}",
    ),
    "survey": (
        "{person} rates the {item} of {firm} as good",
        "{firm} asked {person} in {city} for an opinion on {date}",
    ),
    "donation": (
        "{person} gives {amount} to charity in {city}",
        "{firm} presents {item} to the school in {city}",
    ),
}
"""Each kind of record and its ways of telling; a kind's own name is shown only by some layouts."""

FIELDS = ("ref", "person", "firm", "city", "date", "amount", "item")
MARKS = ("ref", "no.", "file", "case", "number", "id", "#", "dossier")
LAYOUTS = ("prose", "lead", "lines", "list", "memo", "letter", "tail", "table")


@dataclass(frozen=True)
class Style:
    """How an office writes: its layout, its word for a reference number and its way with capitals."""

    layout: str
    mark: str
    titled: bool = False


@dataclass(frozen=True)
class Record:
    """One office record: its kind, its text, and the fields that can be read off the text."""

    kind: str
    text: str
    shown: Mapping[str, str]


def draw_style(rng: Random) -> Style:
    """Pick a way of writing."""
    return Style(rng.choice(LAYOUTS), rng.choice(MARKS), rng.random() < 0.3)


def draw_digits(rng: Random, least: int, most: int) -> str:
    """A string of digits that does not begin with zero."""
    length = rng.randint(least, most)
    return str(rng.randint(1, 9)) + "".join(rng.choice("0123456789") for _ in range(length - 1))


def draw_date(rng: Random) -> str:
    """A date, written in one of four ways."""
    day, month = rng.randint(1, 28), rng.randint(1, 12)
    name = words.MONTH[month - 1]
    return rng.choice((f"{day} {name}", f"{name} {day}", f"2025-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}"))


def draw_amount(rng: Random) -> str:
    """A sum of money, written in one of four ways."""
    value = draw_digits(rng, 2, 4)
    return rng.choice((f"{value} euros", f"{value} dollars", f"EUR {value}", f"${value}.{rng.randint(10, 99)}"))


def draw_fields(rng: Random, least: int = 3, most: int = 6) -> dict[str, str]:
    """Everything a record may mention."""
    person = f"{rng.choice(words.FIRST)} {rng.choice(words.LAST)}"
    item = rng.choice(words.ITEM)
    return {
        "ref": draw_digits(rng, least, most),
        "person": person,
        "firm": f"{rng.choice(words.LAST)} {rng.choice(words.SUFFIX)}",
        "city": rng.choice(words.CITY),
        "date": draw_date(rng),
        "amount": draw_amount(rng),
        "item": f"{rng.choice(words.ADJECTIVE)} {item}" if rng.random() < 0.5 else item,
    }


def draw_record(rng: Random, kind: str | None = None, style: Style | None = None, digits: int | None = None) -> Record:
    """Write one record; what is not given is drawn."""
    kind = kind or rng.choice(tuple(KINDS))
    style = style or draw_style(rng)
    fields = draw_fields(rng, digits or 3, digits or 6)
    told = rng.choice(KINDS[kind])
    shown = {name: value for name, value in fields.items() if name == "ref" or "{" + name + "}" in told}
    story = told.format(**fields)
    return Record(kind, _lay_out(rng, kind, story, fields, shown, style), shown)


def _lay_out(rng: Random, kind: str, story: str, fields: Mapping[str, str], shown: dict[str, str], style: Style) -> str:
    """Set a story in a layout; what the layout adds is entered in `shown`."""
    title = kind.upper() if style.titled else kind.capitalize()
    upper = story[0].upper() + story[1:]
    marked = f"{style.mark}{'' if style.mark == '#' else ' '}{fields['ref']}"
    if style.layout == "prose":
        return f"{upper} ({marked})."
    if style.layout == "lead":
        return f"{title} {marked}: {story}."
    if style.layout == "tail":
        return f"{upper}. {title}, {marked}."
    if style.layout == "list":
        return f"{marked}; {title}; {story}"
    if style.layout == "memo":
        return f"MEMO {marked}\n{upper}."
    extra = rng.choice([name for name in FIELDS if name not in shown] or ["ref"])
    shown[extra] = fields[extra]
    if style.layout == "letter":
        return f"{fields[extra]}, {marked}. {upper}."
    if style.layout == "table":
        return f"{title} | {marked} | {fields[extra]} | {story}"
    rows = [f"Type: {title}", f"{style.mark.capitalize()}: {fields['ref']}", f"{extra.capitalize()}: {fields[extra]}"]
    return "\n".join([*rows, f"Note: {story}"])
