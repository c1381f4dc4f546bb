"""What examinations found, kept under the user's cache: by config, space, type and versions, never by weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedllm.core.version import VERSION
from fedllm.models.cache import cannot_be_kept, home, why
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.ways import Ways


def kept(model: Model) -> tuple[Ways, str, list[str]] | None:
    """The ways, why it cannot generate, and what is to be said, as an earlier examination of its like found."""
    path = _path(model)
    try:
        found = json.loads(path.read_text()) if path else None
        return found and (Ways(**found["ways"]), str(found["silent"]), [str(s) for s in found["said"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(model: Model, said: Sequence[str]) -> None:
    """Keep this; a cache that cannot be written is none."""
    path = _path(model)
    if path is None:
        return
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"ways": asdict(model.ways), "silent": model.silent, "said": list(said)}))
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        cannot_be_kept(home(), why(error))


def _path(model: Model) -> Path | None:
    """None for a network that transformers' own code does not make: its config does not say what it does."""
    net = model.net.body if isinstance(model.net, HeadedEncoder) else model.net
    if not isinstance(net, PreTrainedModel) or not type(net).__module__.startswith("transformers."):
        return None
    config = {k: v for k, v in net.config.to_dict().items() if k not in ("_name_or_path", "name_or_path")}
    facts: dict[str, Any] = {
        "config": config, "space": [type(model.space).__module__, repr(model.space)], "task": repr(model.task),
        "dtype": str(net.dtype), "device": model.device.type, "labels": len(model.labels), "asked": model.fast_kernels,
        "net": [type(net).__name__, vars(model.net).get("pooling")], "name": model.name, "versions": _versions()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return home() / "examined" / f"{key[:40]}.json"


@functools.cache
def _versions() -> list[str]:
    """Ours is the code itself: what it says of a model may change with every line of it."""
    own = hashlib.sha256()
    rooms = Path(__file__).parents[1]
    for path in sorted([*rooms.glob("models/*.py"), *rooms.glob("spaces/*.py")]):
        own.update(path.read_bytes())
    return [VERSION, own.hexdigest(), *(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))]
