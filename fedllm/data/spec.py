"""A part of what people write down (recipes, settings): checked key by key, and nothing in it is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Spec(BaseModel):
    """Unknown keys are refused, and so is whatever is not of a key's own type: infinities, and truth values for numbers
    (which Python takes for 0 and 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True,
                              allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if kinds & {int, float} and bool not in kinds and _truth_in(value):
            raise ValueError("true and false are no numbers")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation names."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _truth_in(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(x, bool) for x in value))
