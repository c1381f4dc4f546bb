"""Every key of a recipe with its type, default and meaning, read off the classes that check it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedllm.local.spec import LocalSpec
from fedllm.runs.recipe import Recipe
from fedllm.spaces.registry import SPACES

HEAD = """# All keys of a recipe

Written by `fedllm recipe --keys`. `SECTION.KEY` is the key's path, as in `fedllm run recipe.yaml SECTION.KEY=VALUE`.
The knobs of a method (`method.KEY`) are shown by `fedllm methods ID`; those of a layer, a selector or a kind of
partition stand in its own file.
"""


BIG = 10**6
"""A bound from here on only guards against slips, and is not told."""
WORDS: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "see there"}


def listed() -> list[dict[str, str]]:
    """Every key in the page's order."""
    return [dict(zip(("key", "type", "default", "does"), row, strict=True))
            for rows in _sections().values() for row in rows]


def _sections() -> dict[str, list[tuple[str, str, str, str]]]:
    sections: dict[str, list[tuple[str, str, str, str]]] = {"": []}
    for path, kind, default, doc in _keys(Recipe, ""):
        sections.setdefault(path.rpartition(".")[0], []).append((path, kind, default, doc))
    sections["local"] = list(_knobs("local", LocalSpec.knobs()))
    sections["space (name: lora)"] = list(_knobs("space", SPACES["lora"].knobs()))
    return sections


def page() -> str:
    """The page in Markdown."""
    out = [HEAD]
    for section, rows in _sections().items():
        out.append(f"\n## {section or 'At the top'}\n\n| key | type | default | what it does |\n|---|---|---|---|\n")
        out += [f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(doc)} |\n" for key, kind, default, doc in rows]
    return "".join(out)


def _keys(model: type[BaseModel], path: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        here = f"{path}.{name}" if path else name
        inner = _section(field.annotation)
        named = inner is not None and "name" in inner.model_fields  # a name with knobs, which stand elsewhere
        if inner is not None and (inner.model_config.get("extra") == "forbid" or not named):
            doc = field.description or (inner.__doc__ or "").strip().splitlines()[0]
            many = f"{here}.N" if _holds_many(field.annotation) else here
            yield here, "section", "", doc
            yield from _keys(inner, many)
            continue
        default = "needed" if field.is_required() else _shown(
            field.default_factory() if field.default_factory else field.default)  # type: ignore[call-arg]
        yield here, _type(field.annotation) + _limits(field.metadata), default, field.description or ""


def _limits(given: Iterable[Any]) -> str:
    """`, >= 1, < 10`, from what pydantic holds of a field's range."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f", {sign} {getattr(m, key):,}" for m in given for key, sign in signs.items()
             if getattr(m, key, None) is not None and not (key in ("le", "lt") and getattr(m, key) >= BIG)]
    return "".join(found)


def _knobs(path: str, knobs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    for name, k in knobs.items():
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        limits = "".join(f", {sign} {k[key]}" for key, sign in signs.items() if k.get(key) is not None)
        kind = ", ".join(map(str, k["options"])) if k.get("options") else str(k["type"]) + limits
        yield f"{path}.{name}", kind, _shown(k["default"]), str(k.get("doc", ""))


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _holds_many(annotation: Any) -> bool:
    return get_origin(annotation) in (list, dict)


def _type(annotation: Any) -> str:
    """`str or list of str`, from an annotation with whatever pydantic hangs on it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0]) + _limits(m for x in args[1:] for m in getattr(x, "metadata", ()))
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in args if a is not NoneType))
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping to {_type(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "name, or name and knobs"
    return WORDS.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _shown(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
