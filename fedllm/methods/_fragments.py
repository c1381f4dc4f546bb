"""A model's trainables in fragments that are synchronized one after another: every layer in one of them, strided."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fedllm.core.errors import RecipeError

NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def fragments(theta: Mapping[str, Tensor], count: int, key: str = "method.fragments") -> list[list[str]]:
    """Names by fragment: layer l is in fragment l mod `count`; what lies in no layer (embeddings, norm, head) goes,
    largest first, to the fragment that is lightest so far. Together they are all names, and none is in two.

    RecipeError where so many fragments do not divide the layers.
    """
    names: list[list[str]] = [[] for _ in range(count)]
    if count == 1:
        return [sorted(theta)]
    found = {n: int(m.group(1)) for n in theta if (m := NUMBER.search(n))}
    layers = sorted(set(found.values()))
    if not layers or len(layers) % count:
        allowed = [c for c in range(1, len(layers) + 1) if not len(layers) % c] or [1]
        raise RecipeError(f"{key} = {count} does not divide the {len(layers)} layers that the space trains; allowed "
                          f"are {', '.join(map(str, allowed))}")
    sizes = [0] * count
    for n in sorted(found):
        at = layers.index(found[n]) % count
        names[at].append(n)
        sizes[at] += theta[n].numel()
    for n in sorted(theta.keys() - found.keys(), key=lambda n: (-theta[n].numel(), n)):
        at = sizes.index(min(sizes))
        names[at].append(n)
        sizes[at] += theta[n].numel()
    return [sorted(part) for part in names]


def cut(tree: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The part of a tree that these names are."""
    return {n: tree[n] for n in names}
