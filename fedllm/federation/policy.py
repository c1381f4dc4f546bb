"""A site's policy file: read as recipes are, and every name in it must be of something that is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.runs.complaints import parse_yaml


def written(policy: Path) -> Mapping[str, Any]:
    """What the file says; RecipeError where it is no mapping in YAML."""
    try:
        said = parse_yaml(policy.read_text(encoding="utf-8"), str(policy))
    except UnicodeDecodeError:
        raise RecipeError(f"{policy} is not UTF-8 text") from None
    except OSError as error:
        raise RecipeError(f"{policy} cannot be read: {error.strerror}") from None
    if not isinstance(said, Mapping) or not all(isinstance(key, str) for key in said):
        raise RecipeError(f"{policy}: allowed is a mapping of this site's settings, as in methods: [fedavg]")
    return said


def need_names(settings: Any) -> None:
    """RecipeError for what nothing here is called: a method, a layer or a space with a slip in its name would keep
    every run away and say nothing of it, and so would rows that are not there."""
    from fedllm.runs.plugins import ROOMS
    from fedllm.tasks.row import nearest

    listed = (("methods", settings.methods), ("layers", settings.layers), ("spaces", settings.spaces))
    for room, (key, names) in zip(ROOMS, listed, strict=False):
        known = list(room) if names else []
        if odd := next((n for n in names or () if n not in known), None):
            raise RecipeError(f"{key}: there is no {odd!r}{nearest(odd, known) or '.'} Installed are "
                              f"{', '.join(sorted(known))}"[:1000])
    if not settings.acts and not Path(settings.data).exists():
        raise RecipeError(f"data = {settings.data!r}: no such file or folder")
