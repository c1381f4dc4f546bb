"""The spaces by name: the name is the file's stem."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.bias import Bias
from fedllm.spaces.feature_attention import FeatureAttention
from fedllm.spaces.full import Full
from fedllm.spaces.head import Head
from fedllm.spaces.ia3 import IA3
from fedllm.spaces.layers import Layers
from fedllm.spaces.lora import LoRA
from fedllm.spaces.mask import Mask
from fedllm.spaces.prefix import Prefix
from fedllm.spaces.soft_prompt import SoftPrompt
from fedllm.spaces.space import Space
from fedllm.spaces.st_adapter import STAdapter

SPACES: dict[str, type[Space]] = {
    cls.__module__.rsplit(".", 1)[-1]: cls
    for cls in (Adapter, Bias, FeatureAttention, Full, Head, IA3, Layers, LoRA, Mask, Prefix, SoftPrompt, STAdapter)
}


def make_space(name: str, **knobs: Any) -> Space:
    """A space by its name with these knobs; an unknown name is refused with the nearest one."""
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"space.name = {name!r} is unknown{hint} Allowed: {', '.join(sorted(SPACES))}")
    values: Mapping[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}
    return SPACES[name].make(values, "space")
