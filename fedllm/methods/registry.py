"""Methods by name: a file `<chapter>/<id>.py` of this folder, an installed package's entry point, or a plugin file."""

from __future__ import annotations

import inspect
from typing import Any

from fedllm.core.card import CARRIERS, DIRECTIONS, IMPROVED, SPARED
from fedllm.core.errors import RecipeError
from fedllm.core.found import Room
from fedllm.core.method import Method

METHODS: Room[Method] = Room("methods", lambda kind: issubclass(kind, Method) and "card" in kind.__dict__,
                             "fedllm.methods", chapters=True)


def modules() -> dict[str, str]:
    """Method id -> dotted module name of those that come with fedllm, without importing any of them."""
    return METHODS.ours


def method_class(name: str) -> type[Method]:
    """The method of this id; an unknown one is refused with the nearest."""
    return METHODS.find(name, "method.name")


def make_method(name: str, **knobs: Any) -> Method:
    """A method by its id with these knobs."""
    return method_class(name).make({k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}, "method")


def source_of(name: str) -> str:
    """Path of the method's file."""
    return inspect.getsourcefile(method_class(name)) or ""


MOVES = {"carrier": CARRIERS, "direction": DIRECTIONS, "improves": IMPROVED, "spares": SPARED}
"""What can be asked of how knowledge moves, and the answers."""


def moving(**wanted: str | None) -> list[str]:
    """Ids of the methods whose card says this of how knowledge moves between an owner's model and clients, as in
    `moving(carrier="logits", direction="both")`; where nothing is wanted, all ids."""
    asked = {key: value for key, value in wanted.items() if value is not None}
    for key, value in asked.items():
        if value not in MOVES[key]:
            raise RecipeError(f"{key} = {value!r:.60} is not allowed; it must be one of {', '.join(MOVES[key])}")
    cards = {name: method_class(name).card.moves for name in sorted(METHODS)}
    return [name for name, moves in cards.items() if not asked or (moves is not None and all(
        value in (moves.spares if key == "spares" else [vars(moves)[key]]) for key, value in asked.items()))]
