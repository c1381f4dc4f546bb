"""Bases whose linear maps are packed in 4 or 8 bits (bitsandbytes), and what they are unpacked.

Weights alone are packed: a product is that of the unpacked weights. bitsandbytes' int8 would also round what goes in,
token by token, which SmolLM2's gradients do not survive; and its columns of outliers (`llm_int8_threshold`) would let
the rows of a batch change one another.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import CompositionError, ModelError
from fedllm.models.model import HeadedEncoder
from fedllm.models.plain import plain_copy
from fedllm.models.unpacking import packed, unpacked, weights_alone
from fedllm.spaces.registry import SPACES
from fedllm.spaces.space import Space

KINDS = ("nf4", "int8")
NEEDS = "pip install 'fedlm[quantized]'"


def options(kind: str | None, dtype: torch.dtype, device: torch.device, weights: str = "pretrained") -> dict[str, Any]:
    """What `from_pretrained` is told to pack a base; nothing for none. ModelError where it cannot be packed here."""
    if kind is None:
        return {}
    if kind not in KINDS:
        raise ModelError(f"model.quantize = {kind!r} is not allowed; it must be one of {list(KINDS)}")
    if dtype == torch.float64 or weights == "random":
        key, value = ("dtype", "float64") if dtype == torch.float64 else ("weights", "random")
        raise ModelError(f"model.quantize = {kind!r} and model.{key} = {value!r} do not fit together; allowed is a "
                         "pretrained model in float32 or bfloat16")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantize = {kind!r} needs an optional extra: {NEEDS}")
    from transformers import BitsAndBytesConfig

    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.utils", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)  # one line a product says that int8 rounds its input
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) if kind == "int8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def kind_of(net: nn.Module) -> str | None:
    """nf4, int8 or None."""
    found = next(packed(net), None)
    return None if found is None else "nf4" if type(found[1]).__name__ == "Linear4bit" else "int8"


def settle(net: nn.Module) -> None:
    """Keep 4-bit weights as they are packed. On processors with AVX-512 bf16 bitsandbytes packs them anew at the first
    forward that needs no gradient, into a form through which none flows afterwards. 8-bit maps round weights alone.

    What is not packed is copied: it would keep the file of the whole unpacked checkpoint mapped."""
    for _, module in packed(net):
        module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            weights_alone(module)
    for parameter in net.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def scales(net: nn.Module) -> dict[str, Tensor]:
    """What the packed weights mean beside their bits, by name: a base is not the same without."""
    return {f"{path}.scale": m.weight.quant_state.absmax if type(m).__name__ == "Linear4bit" else
            m.weight.SCB if m.state.CB is None else m.state.SCB for path, m in packed(net)}


def dequantized(net: Any) -> Any:
    """The same network on plain weights of its type, all of its own; what is saved and merged."""
    if isinstance(net, HeadedEncoder):
        return copy.deepcopy(net, {id(net.body): dequantized(net.body)})
    whole = {f"{path}.weight": unpacked(m).to(net.dtype) for path, m in packed(net)}
    own = {n: p.detach().clone() for n, p in net.named_parameters(remove_duplicate=False) if n not in whole}
    kept = {n: b for n, b in net.state_dict().items() if n in dict(net.named_buffers())}
    return plain_copy(net, own | kept | whole)


def check(space: Space, net: nn.Module) -> None:
    """CompositionError for a space that trains, or cannot do without, weights that are packed."""
    if (kind := kind_of(net)) is None:
        return
    if not space.over_packed:
        able = [name for name, kind_ in SPACES.items() if isinstance(kind_.over_packed, bool) and kind_.over_packed]
        raise CompositionError(f"space '{space.stem}' trains the base's own weights, which model.quantize = {kind!r} "
                               f"packs; allowed are {', '.join(sorted(able))}, or leave model.quantize out")
    for path, _ in packed(net):
        if space.trains(f"{path}.weight"):
            raise CompositionError(f"space.modules_to_save names '{path}', whose weights model.quantize = {kind!r} "
                                   "packs: they have no gradients; leave it out, or leave model.quantize out")
