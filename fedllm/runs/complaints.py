"""Reads a recipe's YAML, edits it by key path, and says what is wrong with it in words of the recipe."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import hint_of
from fedllm.data.strict import half_character

SHORT = {"model": "name", "data": "source", "method": "name", "space": "name", "engine": "kind",
         "select": "name"}
"""Sections that may be given as one word, and the key that the word is for."""


LONGEST, LARGEST, MOST, DEEPEST = 1 << 20, 100_000, 20, 64
"""Characters of a YAML text, values in it with its aliases written out, complaints that are told at once, and how deep
values lie in one another."""


MERGE, INT, FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("merge", "int", "float"))


class Yaml(yaml.SafeLoader):
    """YAML in which a number is what people expect, and a key given twice is an error.

    `3e-3` is a number; `010` and `1:30` are texts, and not 8 and 90 as in YAML 1.1. `<<: *other` takes in a mapping.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value:
            plain = isinstance(key, yaml.ScalarNode) and key.style is None
            if plain and node.flow_style and ":" in key.value[:-1] and value.value == "":
                first, _, rest = key.value.partition(":")
                raise yaml.MarkedYAMLError(problem_mark=key.start_mark, problem=(
                    f"'{key.value}' has no value; write a space after the colon, as in '{first}: {rest}'"))
            name = "<<" if key.tag == MERGE else str(self.construct_object(key, deep=True))
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{name}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


Yaml.yaml_implicit_resolvers = {first: [(tag, form) for tag, form in forms if tag not in (INT, FLOAT)]
                                for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Yaml.add_implicit_resolver(INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789"))
Yaml.add_implicit_resolver(FLOAT, re.compile(
    r"^([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; a RecipeError names the place and the line of what cannot be read."""
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: it has {len(text)} characters, allowed are {LONGEST}")
    try:
        if (count := _written_out(yaml.compose(text, Loader=Yaml), {})) > LARGEST:
            raise RecipeError(f"{where}: it has {min(count, 10**12)} values with its aliases written out, allowed are "
                              f"{LARGEST}")
        return yaml.load(text, Loader=Yaml)
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise RecipeError(f"{where}: not YAML that can be read ({type(error).__name__}: {error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None


def check_values(value: Any, path: str = "", depth: int = 0) -> None:
    """RecipeError for what no key may hold: NaN, infinity, numbers of hundreds of digits, texts that no file can hold,
    nesting without an end."""
    why = ""
    if isinstance(value, float) and not math.isfinite(value):
        why = f"{value} is no number that anything can be"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        why = "a number of so many digits stands for nothing here"
    elif isinstance(value, str) and ("\0" in value or half_character(value) is not None):
        why = "the text holds a NUL or half a character, which no file can"
    elif depth > DEEPEST:
        why = f"it is nested more than {DEEPEST} deep"
    if why:
        raise RecipeError(f"{path[:200] or 'the recipe'}: {why}")
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inner:
        check_values(key, path, depth + 1)
        check_values(part, f"{path}.{key}" if path else str(key), depth + 1)


def _written_out(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML tree has when each alias stands for what it names."""
    if node is None or id(node) in known:
        return known.get(id(node), 0)
    known[id(node)] = LARGEST + 1  # one that holds itself has no end
    parts = node.value if isinstance(node.value, list) else ()
    inner = [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]
    known[id(node)] = 1 + sum(_written_out(x, known) for x in inner)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file; give a recipe in YAML") from None
    except OSError as error:
        near = difflib.get_close_matches(path.name, _beside(path), n=1)
        if (path / "recipe.yaml").is_file():
            raise RecipeError(f"{path} is the folder of a run: `fedllm resume {path}` goes on with it, and "
                              f"{path / 'recipe.yaml'} is its recipe") from None
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
        if path.parts[:1] == ("recipes",) and not Path("recipes").is_dir():
            hint = ("; the folder recipes/ lies in a checkout of fedllm, and `fedllm demo` leaves a recipe in its "
                    "run's folder")
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error.strerror}{hint}") from None
    value = parse_yaml(text, str(path))
    if value is None or not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, and this is {type(value).__name__}")
    return value


def _beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []


def parse_override(text: str) -> tuple[str, Any]:
    """`local.lr=3e-3` -> ("local.lr", 0.003)."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"{text[:200]!r} is no override; write key.path=value, for example local.lr=3e-3")
    return key.strip(), parse_yaml(value, f"the value of {key.strip()}")


def edit(raw: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set one value by its key path, in place; mappings are merged, unless they name another part."""
    steps = key.split(".")
    at: Any = raw
    for i, step in enumerate(steps[:-1]):
        path = ".".join(steps[: i + 1])
        child = at[_index(at, step, path)] if isinstance(at, list) else at.get(step)
        if isinstance(child, str) and ((i == 0 and step in SHORT) or (i == 1 and steps[0] in ("layers", "models"))):
            child = {"name" if i else SHORT[step]: child}
        if child is not None and not isinstance(child, dict | list):
            raise RecipeError(f"{key}: '{path}' is {child!r} and holds no keys")
        child = {} if child is None else child.copy()
        at[int(step) if isinstance(at, list) else step] = child
        at = child
    last = steps[-1]
    if isinstance(at, list):
        at[_index(at, last, key)] = value
    else:
        at[last] = _merged(at.get(last), value, last)


def _index(at: Sequence[Any], step: str, path: str) -> int:
    if not step.isdigit() or int(step) >= len(at):
        raise RecipeError(f"{path}: it is a list of {len(at)}; allowed are 0 to {len(at) - 1}")
    return int(step)


def _merged(old: Any, new: Any, key: str) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    name = "kind" if key == "partition" else "name"
    if name in new and new[name] != old.get(name):
        return dict(new)  # another method's, space's or partition's knobs mean nothing to this one
    return {**old, **{k: _merged(old.get(k), v, k) for k, v in new.items()}}


def fill(raw: MutableMapping[str, Any]) -> None:
    """`method: {server_lr: 0.5}` without a name means the default method; the same for space and selector."""
    for section, name in (("method", "fedavg"), ("space", "lora"), ("select", "uniform")):
        if isinstance(raw.get(section), dict):
            raw[section] = {"name": name, **raw[section]}


def complaints(root: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> str:
    """All that pydantic refused, one line for each key (its complaints about the branches of a union are joined)."""
    lines: dict[str, str] = {}
    for one in errors[: 10 * MOST]:
        if len(lines) == MOST:
            break
        head, colon, text = complaint(root, one).partition(": ")
        lines[head + colon] = f"{lines[head + colon]}, or {text}" if head + colon in lines else text
    more = f"\nand more: {len(errors)} complaints in all" if len(lines) == MOST and len(errors) > MOST else ""
    return "\n".join(head + text for head, text in lines.items()) + more


def complaint(root: type[BaseModel], one: Mapping[str, Any]) -> str:
    """One line on one thing that pydantic refused: the key's path, the value, and what is allowed."""
    loc, model = _known(root, one["loc"])
    path = ".".join(str(p) for p in loc)
    text = one["msg"].removeprefix("Value error, ")
    text = text if len(text) <= 2000 else f"{text[:2000]}..."  # it may hold the value
    if one["type"] == "extra_forbidden":
        key = str(loc[-1])
        hint = hint_of(key, list(model.model_fields), path.rpartition(".")[0])
        if "here it is" not in hint and len(loc) == 1 and (inside := _inside(root, key.replace("-", "_"))):
            hint = f"; here it is '{inside}'."
        return f"{path}: unknown key{hint} Allowed here: {', '.join(model.model_fields)}"
    if one["type"] == "missing":
        return f"{path}: this key is needed"
    if one["type"] == "value_error" and text.startswith(f"{loc[0]}."):
        return text  # it names its key already
    return f"{path} = {one['input']!r:.200}: {text[0].lower() + text[1:]}"


def _inside(root: type[BaseModel], key: str) -> str:
    """The path of the one section's key that is called so; empty where there is none."""
    from fedllm.local.spec import LocalSpec

    sections = {name: set(inner.model_fields) for name, field in root.model_fields.items()
                if (inner := _section(field.annotation)) and get_origin(field.annotation) not in (dict, list)}
    sections["local"] = set(LocalSpec.knobs())
    return next((f"{name}.{key}" for name, keys in sections.items() if key in keys and key != "name"), "")


def _known(root: type[BaseModel], loc: Sequence[Any]) -> tuple[list[Any], type[BaseModel]]:
    """The part of pydantic's location that is the user's (no union tags), and the section that it ends in."""
    model, out, key = root, [], False
    for i, step in enumerate(loc):
        out.append(step)
        if key:  # of a mapping of sections
            key = False
            continue
        field = model.model_fields.get(step) if isinstance(step, str) else None
        if field is None and not (isinstance(step, int) or i == len(loc) - 1):
            return out, model
        if field is not None:
            inner = _section(field.annotation)
            if inner is None:  # what follows are indices, a mapping's keys, and tags of pydantic's own
                mapping = get_origin(field.annotation) is dict
                return out + [s for s in loc[i + 1 :] if mapping or isinstance(s, int)], model
            model, key = inner, get_origin(field.annotation) is dict
    return out, model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `Spec | None` or `list[Spec]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)
