"""Values of a recipe that are no plain number: shares, laws by which clients draw, and short forms."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
)


def _share(value: Any) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (1 <= value <= 10**9 if isinstance(value, int) else 0 < value <= 1):
        raise ValueError("allowed is a count (a whole number from 1) or a share (a decimal above 0, up to 1.0)")
    return value


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 <= value <= 1e15


def _law(value: Any) -> Any:
    """A number for all, a list that is dealt in order, or a law by which each client draws its own."""
    kinds = {"lognormal": 1, "uniform": 2, "choice": None}
    ok = _positive(value)
    if isinstance(value, list):
        ok = bool(value) and all(map(_positive, value))
    elif isinstance(value, dict) and len(value) == 1 and next(iter(value)) in kinds:
        ((kind, given),) = value.items()
        given = given if isinstance(given, list) else [given]
        ok = (all(map(_positive, given)) and kinds[kind] in (None, len(given))
              and (kind != "uniform" or given[0] <= given[-1]))
    if not ok:
        raise ValueError("allowed is a number above 0, a list of such (dealt in order), {lognormal: sigma}, "
                         "{uniform: [low, high]} or {choice: [...]}, all above 0 (from 1e-9 to 1e15)")
    return value


def short(key: str) -> Any:
    """`method: fedavg` is short for `method: {name: fedavg}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


Names = Annotated[list[str], Field(min_length=1)]
Share = Annotated[int | float, PlainValidator(_share)]
Law = Annotated[Any, PlainValidator(_law)]
