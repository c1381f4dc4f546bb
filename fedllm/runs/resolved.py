"""A recipe as a run's folder keeps it: every default written out, and the versions that it ran with."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, is_dataclass
from typing import Any

from fedllm.core.version import VERSION
from fedllm.models.load import lasting
from fedllm.runs.build import Parts

PACKAGES = ("torch", "transformers", "peft", "numpy")


def resolved(parts: Parts) -> dict[str, Any]:
    """The recipe with every default written out, and the versions that it ran with."""
    full = parts.recipe.model_dump()
    full["method"] = {"name": parts.recipe.method.name, **_plain(parts.method)}
    start = parts.recipe.space.knobs.get("start_from")
    full["space"] = {"name": parts.recipe.space.name, **_plain(parts.world.model.space)}
    if start is not None:
        full["space"]["start_from"] = start
    full["local"] = _plain(parts.world.local)
    if "labels" in parts.world.model.rules.takes:
        full["data"]["labels"] = list(parts.world.federation.labels)
    full["model"]["name"] = lasting(parts.recipe.model.name)  # a run is talked to and exported from any folder
    full["versions"] = {"python": platform.python_version(), **versions()}
    return full


def versions() -> dict[str, str]:
    """The packages that decide a run's bits. Our own is asked of the code: its distribution has another name."""
    return {"fedllm": VERSION} | {p: importlib.metadata.version(p) for p in PACKAGES}


def _plain(part: Any) -> dict[str, Any]:
    """A dataclass as what YAML can hold."""
    values = asdict(part) if is_dataclass(part) and not isinstance(part, type) else {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
