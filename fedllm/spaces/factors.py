"""LoRA's factors in a tree of trainables, by PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedllm.spaces.magnitude import MAGNITUDE
from fedllm.spaces.space import PEFT


def factors(tree: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The (B, A) pairs of a tree, by module path."""
    ends = ".lora_A.weight"
    paths = [n[: -len(ends)] for n in tree if n.endswith(ends)]
    return {p.removeprefix(PEFT): (tree[f"{p}.lora_B.weight"], tree[f"{p}{ends}"]) for p in paths}


def is_adapter(name: str) -> bool:
    """Whether a trainable of this name belongs to an adapter, and is no module trained whole."""
    return any(part in name for part in (".lora_A.", ".lora_B.", MAGNITUDE))


def names_of(path: str) -> tuple[str, str]:
    """The tree's names of B and A for a module path."""
    return f"{PEFT}{path}.lora_B.weight", f"{PEFT}{path}.lora_A.weight"
