"""A recipe family: one YAML file that holds a base recipe, what varies over it, and what that is to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedllm.core.errors import RecipeError
from fedllm.data.spec import Spec
from fedllm.runs.complaints import check_values, complaints, read_yaml

Edits = dict[str, Any]
"""Key path of the recipe -> value."""


class FamilySetting(Spec):
    """One table of the family: other data or another task, in which its arms are compared among themselves."""

    about: str = ""
    """What it stands for."""
    set: Edits = Field(default_factory=dict)
    """Keys of the base recipe to change."""
    methods: list[str] = Field(default_factory=list)
    """In the place of the family's."""
    arms: dict[str, Edits] = Field(default_factory=dict)
    """In the place of the family's."""
    baseline: str | None = None
    """The arm against which the others are held; None: the first."""


class Family(Spec):
    """All that one line compares."""

    title: str
    """What it is called."""
    paper: str
    """Whose benchmark or pipeline it is."""
    shows: Annotated[list[str], Field(min_length=1)]
    """What it must show."""
    about: str = ""
    """Where it differs from the paper, and why."""
    base: dict[str, Any]
    """The recipe that all share."""
    real: Edits = Field(default_factory=dict)
    """Keys of the base recipe to change for a run on the real model (`--real`)."""
    methods: list[str] = Field(default_factory=list)
    """Methods by name; none: the recipe's."""
    arms: dict[str, Edits] = Field(default_factory=dict)
    """Label -> keys of the recipe to change; each goes with each method."""
    settings: dict[str, FamilySetting] = Field(default_factory=dict)
    """Name -> a table of its own."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Key -> values from which each arm gets its best, on seeds that are not measured."""
    seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many, where the command says none."""
    baseline: str | None = None
    """The arm against which the others are held; None: the first."""

    @property
    def tables(self) -> Mapping[str, FamilySetting]:
        """The settings, with the family's methods, arms and baseline where they have none of their own; one that is
        named "" where there are none."""
        def whole(s: FamilySetting) -> FamilySetting:
            own = bool(s.methods or s.arms)
            return s.model_copy(update={"methods": s.methods if own else self.methods,
                                        "arms": s.arms if own else self.arms,
                                        "baseline": s.baseline if own or s.baseline else self.baseline})
        return {name: whole(s) for name, s in (self.settings or {"": FamilySetting()}).items()}


def is_family(raw: Mapping[str, Any]) -> bool:
    """Whether a YAML file's mapping is a family, and no recipe: a recipe has no `base`."""
    return "base" in raw


def read_family(path: Path) -> Family | None:
    """The family in this file; None where it is a recipe. RecipeError with one line for each thing that is wrong."""
    raw = read_yaml(path)
    if not is_family(raw):
        return None
    check_values(raw)
    try:
        return Family.model_validate({**raw, "base": {"name": path.stem, **_mapping(raw["base"], path)}})
    except ValidationError as error:
        raise RecipeError(f"{path}: {complaints(Family, error.errors())}") from None


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: base = {value!r:.100}: allowed is a recipe, as a mapping of its keys")
    return value
