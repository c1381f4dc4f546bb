"""Which linear maps factors are put on where a recipe names none: those that the network calls, and that PEFT takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

SCANNED = "dt_proj"
"""The step sizes of a state-space layer: its scan reads the weight itself, so that factors beside it do nothing."""


def adaptable(net: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of these linear maps those that can have factors in transformers and PEFT alike, by kind of module.

    Left out are maps whose weight a state-space layer reads without calling them, maps that PEFT refuses in an
    architecture (`out_proj` of Mamba), and maps whose name PEFT takes for an architecture's experts, which are no
    linear maps in transformers 5 (`down_proj` of DeepSeek's first layers).
    """
    body = next((m for m in net.modules() if isinstance(m, PreTrainedModel)), None)
    leaves = {path.rpartition(".")[2] for path in found}
    out = {leaf for leaf in leaves if body is not None and not _taken(body, leaf)}
    return {path: module for path, module in found.items()
            if path.rpartition(".")[2] not in out and not _scanned(net, path)}


def _scanned(net: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return leaf == SCANNED and "A_log" in dict(net.get_submodule(parent).named_parameters(recurse=False))


def _taken(body: PreTrainedModel, leaf: str) -> bool:
    """Whether PEFT puts factors on a linear map of this name."""
    config: Any = LoraConfig(target_modules=[leaf])
    refuses: Any = getattr(LoraModel, "_check_target_module_compatiblity", None)  # in PEFT 0.21, spelled so
    try:
        if refuses is not None:
            refuses(None, config, body, leaf)
        convert_peft_config_for_transformers(config := copy.copy(config), body, None)
    except ValueError:
        return False
    return leaf in set(config.target_modules)
