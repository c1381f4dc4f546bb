"""A model's config with some of its keys changed: other depths, widths, heads or ties on random weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from fedllm.core.errors import ModelError

FIXED = ("model_type", "architectures", "vocab_size", "auto_map", "transformers_version", "quantization_config")
"""What a model's code and tokenizer hang on."""


def reshaped(config: Any, shape: Mapping[str, Any], name: str) -> Any:
    """The config with the values of `shape`, each in the place of one that it has, of the same kind.

    ModelError for a key that it lacks or that is not to be changed, and for another kind of value.
    """
    said = config.to_dict()
    for key, value in shape.items():
        if key not in said or key in FIXED:
            near = difflib.get_close_matches(key, [k for k in said if k not in FIXED], n=1)
            why = "its tokenizer and its code hang on it" if key in FIXED else "its config has no such key"
            raise ModelError(f"model.shape.{key} is not allowed for model {name!r}: {why}"
                             + (f"; did you mean {near[0]!r}?" if near and key not in FIXED else ""))
        if not alike(said[key], value):
            raise ModelError(f"model.shape.{key} = {value!r} is not allowed: in the config of model {name!r} it is "
                             f"{said[key]!r}; it must be of that kind")
        setattr(config, key, value)
    heads, groups = said_of(config, "num_attention_heads"), said_of(config, "num_key_value_heads")
    hidden = said_of(config, "hidden_size")
    if heads and groups and heads % groups:
        raise ModelError(f"model.shape: {heads} attention heads are not shared out evenly over num_key_value_heads = "
                         f"{groups}; it must divide them")
    if heads and hidden and "head_dim" not in said and hidden % heads:
        raise ModelError(f"model.shape: hidden_size = {hidden} is not shared out evenly over num_attention_heads = "
                         f"{heads}; they must divide it")
    return config


def alike(old: Any, new: Any) -> bool:
    """Whether one value may stand for another: numbers from 1 for whole numbers, and so on."""
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int):
        return isinstance(new, int) and new >= 1
    return isinstance(new, int | float) if isinstance(old, float) else isinstance(new, type(old)) and old is not None


def said_of(config: Any, key: str) -> int:
    """A size of the config; 0 where it has none."""
    value = config.to_dict().get(key)
    return value if isinstance(value, int) else 0
