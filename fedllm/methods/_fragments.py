"""A model's trainables in fragments that are synchronized one after another: every layer in one of them, strided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedllm.core.errors import RecipeError

NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def fragments(theta: Mapping[str, Tensor], count: int, key: str = "method.fragments") -> list[list[str]]:
    """Names by fragment: layer l is in fragment l mod `count`; what lies in no layer (embeddings, norm, head) goes,
    largest first, to the fragment that is lightest so far. Together they are all names, and none is in two.

    RecipeError where so many fragments do not divide the layers.
    """
    if count == 1:
        return [sorted(theta)]
    found = {n: int(m.group(1)) for n in theta if (m := NUMBER.search(n))}
    layers = sorted(set(found.values()))
    if not layers or len(layers) % count:
        allowed = [c for c in range(1, len(layers) + 1) if not len(layers) % c] or [1]
        raise RecipeError(f"{key} = {count} does not divide the {len(layers)} layers that the space trains; allowed "
                          f"are {', '.join(map(str, allowed))}")
    names, sizes = [list[str]() for _ in range(count)], [0] * count
    for n in sorted(found):
        at = layers.index(found[n]) % count
        names[at].append(n)
        sizes[at] += theta[n].numel()
    for n in sorted(theta.keys() - found.keys(), key=lambda n: (-theta[n].numel(), n)):
        at = sizes.index(min(sizes))
        names[at].append(n)
        sizes[at] += theta[n].numel()
    return [sorted(part) for part in names]


def check_windows(name: str, local: Any, rounds: int, count: int, delay: int) -> None:
    """RecipeError where the method `name` cannot send fragments so: without steps in a round, with a way longer than
    that, or where some would be sent less often than others."""
    if local.steps is None:
        raise RecipeError(f"local.steps is not given, and {name} counts a fragment's way in local steps; give H / F, "
                          "from 1")
    if delay >= local.steps:
        raise RecipeError(f"method.delay = {delay} is not allowed with local.steps = {local.steps}: a step lands "
                          f"before the next leaves; it must be < {local.steps}")
    if rounds % count:
        raise RecipeError(f"method.fragments = {count} does not divide rounds = {rounds}: some fragments would be "
                          "synchronized less often than others")


def cut(tree: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The part of a tree that these names are."""
    return {n: tree[n] for n in names}
