"""What of a model and of its training can be spread over the processes of one client; light, for builders of runs."""

from __future__ import annotations

from typing import Any

import torch

from fedllm.core.errors import CompositionError
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces.full import Full

MANY = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of a mixture's experts."""


def check_group(model: Any, size: int, local: LocalSpec | None = None) -> None:
    """CompositionError naming what of a model or of `local` cannot be spread over processes."""
    what = f"engine.processes = {size}: "
    if not isinstance(model, Model) or model.rules.net in ("policy", "dual"):
        raise CompositionError(f"{what}language models and encoders are trained so, and this is neither; leave it out")
    space, config = model.space, getattr(model.net, "config", None)
    cards = torch.cuda.device_count() if model.device.type == "cuda" else size
    if cards < size or (model.device.index or 0) > 0:
        raise CompositionError(f"{what}each process has a card of its own, from the first on, and this machine has "
                               f"{cards}; use fewer processes, or device cpu")
    if getattr(config, "quantization_config", None) is not None:
        raise CompositionError(f"{what}weights that are packed in few bits are not cut in shards; leave model.quantize "
                               "out")
    if not (isinstance(space, Full) or space.over_packed):
        raise CompositionError(f"{what}space '{space.stem}' reads the base's weights itself, which lie in shards; "
                               "allowed are full, lora, adapter, prefix, soft_prompt, p_tuning")
    if space.draws or (local is not None and local.neftune is not None):
        raise CompositionError(f"{what}space.dropout and local.neftune are drawn for a whole batch, and each process "
                               "sees its own rows of it; leave them out")
    if isinstance(space, Full) and model.net.dtype not in (torch.float32, torch.float64):
        raise CompositionError(f"{what}in space 'full' the shards are the trainables, which are never in less than "
                               "fp32; use model.dtype float32, or space 'lora'")
    if isinstance(space, Full) and config is not None and any(config.to_dict().get(k) for k in MANY):
        raise CompositionError(f"{what}in space 'full' an expert that sees no row in one process would keep the others "
                               "waiting; use space 'lora'")
