"""What the command line says of keys and their values: `space.name=lora,ia3`, `local.lr=1e-3,3e-3`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.runs.complaints import SHORT, parse_yaml

FIXED = ("seed", "name", "record", "plugins", "versions", "track", "method")
"""Sections that do not vary: cells have seeds and names of their own, and methods an option of theirs."""
LONGEST = 80
"""Characters of a folder's name that are made of a label."""


def axes(given: Sequence[str], option: str) -> dict[str, list[Any]]:
    """Key -> values, of `key=a,b` once for each key; a value may be a YAML list or mapping."""
    out: dict[str, list[Any]] = {}
    for text in given:
        key, sign, values = (part.strip() for part in text.partition("="))
        if not sign or not key or not values:
            raise RecipeError(f"{option} {text!r}: write key=value,value, for example local.lr=1e-3,3e-3")
        if key in out:
            raise RecipeError(f"{option} {key} is given twice; list its values in one")
        out[key] = parse_yaml(f"[{values}]", f"{option} {key}")
        if any(out[key].count(v) > 1 for v in out[key]):
            raise RecipeError(f"{option} {text!r}: a value is listed twice")
        if any(v is None for v in out[key]):
            raise RecipeError(f"{option} {text!r}: a value is missing")
        check_varies(key, option)
    return out


def check_varies(key: str, option: str) -> None:
    """RecipeError for a key that a comparison sets itself."""
    section, _, knob = key.partition(".")
    if section in FIXED and not (section == "method" and knob not in ("", "name")):
        better = "; methods are listed with --methods" if section == "method" else ""
        raise RecipeError(f"{option} {key}: a comparison does not vary this key{better}")


def named(key: str, value: Any) -> tuple[str, tuple[str, Any]]:
    """The label of a value, and the edit that it is; another space comes without the knobs of the first."""
    section, _, rest = key.partition(".")
    if SHORT.get(section) == "name" and rest in ("", "name"):
        part = {"name": value} if isinstance(value, str) else value
        name, *more = [part.get("name", section), *(f"{k}={v}" for k, v in part.items() if k != "name")] if isinstance(
            part, Mapping) else [value]
        return " ".join([str(name), *more]), (section, part)
    return f"{key.rpartition('.')[2]}={value}", (key, value)


def words(rates: Mapping[str, Any]) -> str:
    """`lr=0.001 steps=4`; keys of equal last name stand whole."""
    last = [k.rpartition(".")[2] for k in rates]
    return " ".join(f"{k if last.count(short) > 1 else short}={v}"
                    for (k, v), short in zip(rates.items(), last, strict=True)) or "as it is"


def slug(label: str) -> str:
    """A label as a part of a folder's name."""
    plain = (c if (c.isascii() and c.isalnum()) or c in "-_.+" else "-" for c in label.replace("=", ""))
    name = "".join(plain).strip(".-")
    mark = hashlib.sha256(label.encode()).hexdigest()[:8]
    return name if name and len(name) <= LONGEST else f"{name[:LONGEST]}-{mark}"
