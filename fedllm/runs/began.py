"""What a run began with: rows, base weights, the folder it was begun in. It goes on with the same, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm.core.errors import DataError, RunError
from fedllm.data.federation import Row
from fedllm.models.model import Model
from fedllm.runs.build import Parts
from fedllm.runs.complaints import read_yaml
from fedllm.runs.folder import RunFolder

FILE, RECIPE = "began.json", "recipe"
COURSE = ("method", "space", "local", "layers", "clients", "select", "seed")
EACH = 1000
"""Up to so many clients each is known by itself, so that an error can name the one whose rows are others."""
LOOKED_AT = 64
"""Values of each frozen weight that count: another checkpoint differs everywhere."""


def write_began(folder: RunFolder, stands_on: Mapping[str, str]) -> None:
    """Kept before the first round."""
    folder.write_json(FILE, {**stands_on, "in": os.getcwd(), RECIPE: _course(folder)})


def same_as_began(folder: RunFolder, now: Mapping[str, str]) -> None:
    """RunError where rows or base weights are others than the run began with (a run of before this was kept: none)."""
    path = folder.path / FILE
    if not path.is_file():
        return
    kept = folder.read(FILE)
    if not isinstance(kept, dict):
        raise RunError(f"{path} is damaged; bring it back from a copy, or run the recipe again")
    if other := next(_others(kept.get(RECIPE, {}), _course(folder)), None):
        raise RunError(f"{folder.path / 'recipe.yaml'} has other {other} than the run began with: what came out would "
                       "be neither a run of the old nor of the new; bring the file back, or run the recipe anew")
    if differ := [name for name in [*kept, *(n for n in now if n not in kept)]
                  if name not in ("in", RECIPE) and kept.get(name) != now.get(name)]:
        raise RunError(f"{folder.path} began with other {differ[0]}" + (f" (and {len(differ) - 1} more)" if
                       len(differ) > 1 else "") + ": what came out would be neither a run of the old nor of the new; "
                       "bring back what it began with, or run the recipe anew")


def _course(folder: RunFolder) -> dict[str, Any]:
    """What of the folder's recipe decides how its rounds go; rounds may be added."""
    said = read_yaml(folder.path / "recipe.yaml")
    return dict(json.loads(json.dumps({key: said[key] for key in COURSE if key in said}, default=str)))


def _others(kept: Any, now: Any, at: str = "") -> Iterator[str]:
    """Keys that had another value; those that a later version has added are passed over."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key, value in kept.items():
            yield from _others(value, now.get(key), f"{at}.{key}".lstrip("."))
    elif kept != now:
        yield at


def from_elsewhere(folder: RunFolder, error: DataError) -> DataError:
    """The error of rows that are not found, with the folder in which the run was begun, where that is another."""
    try:
        begun = str(folder.read(FILE).get("in", ""))
    except (RunError, OSError, AttributeError):
        return error
    if not begun or Path(begun) == Path.cwd():
        return error
    return DataError(f"{error}. The run was begun in {begun}, where relative paths of its recipe begin: go on with it "
                     "from there", kind=error.kind)


def stands_on(parts: Parts) -> dict[str, str]:
    """What a run stands on, by the words in which an error names it."""
    federation = parts.world.federation
    said = {}
    if parts.engine is None:  # else rows lie at sites, which look after them
        if federation.streamed or len(federation.clients) > EACH:
            said["clients"] = _hash(f"{c.id}:{c.n}" for c in parts.world.infos())
        else:
            for client, shard in federation.clients.items():
                said[f"rows of client '{client}'"] = _rows([*shard.train, *shard.test])
    said["rows of the global test"] = _rows(federation.test)
    said["public rows"] = _rows(federation.public)
    if isinstance(parts.world.model, Model):
        said["weights of the base model"] = _weights(parts.world.model)
    return said


def _rows(rows: Iterable[Row]) -> str:
    return _hash(repr(sorted(row.items(), key=lambda kv: kv[0])) for row in rows)


def _weights(model: Model) -> str:
    trained = set(model.initial())
    return _hash(f"{n} {tuple(p.shape)} {_some(p.detach())}" for n, p in model.net.named_parameters()
                 if n not in trained)


def _some(p: torch.Tensor) -> Any:
    flat = p.flatten()
    return flat[:: max(1, flat.numel() // LOOKED_AT)][:LOOKED_AT].tolist()


def _hash(texts: Iterable[str]) -> str:
    h = hashlib.sha256()
    for text in texts:
        h.update(text.encode(errors="surrogatepass") + b"\0")
    return h.hexdigest()[:32]
