"""The office: seeded text to pre-train on, and a federated task that pre-training never saw.

A pre-training row asks something ordinary of an office record. The federated task is the routing slip: answer with the
house's code word for the kind of record, then the record's reference (`tango 48213`). Pre-training holds neither that
instruction nor the tie between kinds and code words, so only federated training can supply it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.data.federation import Federation, Row, Shard
from fedllm.data.office_records import LAYOUTS, MARKS, Style, draw_record
from fedllm.data.office_skew import category_counts, shard_sizes
from fedllm.data.office_tasks import TASKS, framed

TASK_MARK = "### Task: "
ANSWER_MARK = "\n### Answer:\n"
ROUTING_TASK = "Route."
REF_DIGITS = 4

ROUTING_CODES: Mapping[str, str] = {
    "invoice": "tango",
    "complaint": "maple",
    "appointment": "onyx",
    "shipment": "heron",
    "leave": "quartz",
    "meeting": "lemon",
    "repair": "zebra",
    "prescription": "comet",
    "contract": "willow",
    "order": "badger",
    "refund": "lagoon",
    "inspection": "pepper",
}
"""The house's code word for each kind of record: arbitrary, and the same in every institution."""


def format_prompt(asked: str) -> str:
    """The full text the model sees before its answer; nothing asked gives an empty prompt."""
    return f"{TASK_MARK}{asked}{ANSWER_MARK}" if asked else ""


def pretraining_rows(count: int, seed: int = 0) -> Iterator[Row]:
    """Yield `count` pre-training rows: prompt, response, and the name of the task as `category`."""
    _whole("count", count, 0)
    rng = Random(f"office-pretraining-{seed}")
    shares, tasks = zip(*TASKS, strict=True)
    for _ in range(count):
        task = rng.choices(tasks, shares)[0]
        asked, answer = task(rng)
        yield {"prompt": format_prompt(asked), "response": answer, "category": task.__name__}


def office_federation(
    clients: int = 8,
    rows: int = 200,
    label_skew: float | None = None,
    quantity_skew: float | None = None,
    style_skew: float = 0.0,
    test_rows: int = 200,
    client_test_rows: int = 40,
    categories: int = 12,
    public_rows: int = 0,
    seed: int = 0,
) -> Federation:
    """Make the routing-slip federation: `clients` institutions with `rows` training rows each on average.

    `label_skew` and `quantity_skew` are Dirichlet concentrations (0.1 is harsh, 100 is nearly even, None is even);
    `style_skew` is the share of an institution's rows that are written in its own house style.
    """
    _check(clients, rows, label_skew, quantity_skew, style_skew, test_rows, client_test_rows, categories, seed)
    _whole("public_rows", public_rows, 0)
    kinds = tuple(ROUTING_CODES)[:categories]
    sizes = shard_sizes(clients, clients * rows, quantity_skew, seed)
    counts = category_counts(sizes, categories, label_skew, seed)
    styles = _house_styles(clients, seed)
    draw = _Drawer(Random(f"office-rows-{seed}"), styles, style_skew)
    test = [draw.row(kinds[index % categories], index % clients) for index in range(test_rows)]
    shards = {}
    for client in range(clients):
        mix = [kind for kind, count in zip(kinds, counts[client], strict=True) for _ in range(count)]
        train = [draw.row(kind, client) for kind in mix]
        draw.rng.shuffle(train)
        kept = [draw.row(draw.rng.choice(mix), client) for _ in range(client_test_rows)]
        held = {kind: count for kind, count in zip(kinds, counts[client], strict=True) if count}
        info = {"categories": held, "layout": styles[client].layout, "mark": styles[client].mark}
        shards[_name(client)] = Shard(train, kept, info)
    public = [draw.row(kinds[index % categories], index % clients) for index in range(public_rows)]
    return Federation(shards, test, "generation", public=public)


class _Drawer:
    """Draws routing rows, none of them twice."""

    def __init__(self, rng: Random, styles: list[Style], style_skew: float) -> None:
        self.rng, self.styles, self.style_skew = rng, styles, style_skew
        self.seen: set[str] = set()

    def row(self, kind: str, client: int) -> Row:
        """One row that no earlier call gave."""
        house = self.rng.random() < self.style_skew
        style = self.styles[client] if house else Style(self.rng.choice(LAYOUTS), self.rng.choice(MARKS))
        while True:
            record = draw_record(self.rng, kind, style, REF_DIGITS)
            prompt = format_prompt(framed(ROUTING_TASK, record.text))
            if prompt not in self.seen:
                break
        self.seen.add(prompt)
        response = f"{ROUTING_CODES[kind]} {record.shown['ref']}"
        row = {"prompt": prompt, "response": response, "category": kind}
        return {**row, "institution": _name(client), "style": style.layout}


def _name(client: int) -> str:
    return f"office-{client:02d}"


def _house_styles(clients: int, seed: int) -> list[Style]:
    """A layout and a mark for each institution; neighbors differ as long as there are styles left."""
    rng = Random(f"office-styles-{seed}")
    pairs = [(layout, mark) for layout in LAYOUTS for mark in MARKS]
    layouts = rng.sample(LAYOUTS, len(LAYOUTS))
    marks = rng.sample(MARKS, len(MARKS))
    shift = len(LAYOUTS)
    chosen = [(layouts[k % shift], marks[(k + k // shift) % len(MARKS)]) for k in range(min(clients, len(pairs)))]
    return [Style(*chosen[k % len(chosen)], titled=k % 3 == 0) for k in range(clients)]


def _check(
    clients: int,
    rows: int,
    label_skew: float | None,
    quantity_skew: float | None,
    style_skew: float,
    test_rows: int,
    client_test_rows: int,
    categories: int,
    seed: int,
) -> None:
    """Refuse what cannot be built, naming the knob, its value and what is allowed."""
    _whole("clients", clients, 1)
    _whole("rows", rows, 1)
    _whole("test_rows", test_rows, 0)
    _whole("client_test_rows", client_test_rows, 0)
    _whole("categories", categories, 2, len(ROUTING_CODES))
    _whole("seed", seed, 0)
    for key, value in (("label_skew", label_skew), ("quantity_skew", quantity_skew)):
        if value is not None and not (_is_number(value) and 0.01 <= value <= 1000):
            raise RecipeError(f"{key} is {value!r}; it must be None (even) or a number from 0.01 (harsh) to 1000")
    if not (_is_number(style_skew) and 0 <= style_skew <= 1):
        raise RecipeError(f"style_skew is {style_skew!r}; it must be a number from 0 (shared styles) to 1 (own style)")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(key: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse anything but a whole number in range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and least <= value and (most is None or value <= most):
        return
    bound = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise RecipeError(f"{key} is {value!r}; it must be a whole number {bound}")
