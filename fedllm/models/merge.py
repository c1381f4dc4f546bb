"""A model with its trainables merged in, saved as an ordinary transformers folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fedllm.core.errors import ModelError
from fedllm.models.checks import loaded
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.peft_io import HEAD, said_of
from fedllm.models.plain import unpatched
from fedllm.models.quantized import dequantized, kind_of
from fedllm.spaces.registry import of_peft


def save_merged(folder: Path, model: Model, theta: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
    """Write weights with `theta` in them, and the tokenizer: a plain transformers folder.

    A classifier goes to `head.safetensors`. Raises ModelError for a space that is no change of weights (`Space.stays`).
    """
    net: Any = fresh_net(model)
    weights = dict(net.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in (base or {}).items():
            weights[name].add_(delta.to(weights[name]))
    model.space.merge(net, theta)
    folder.mkdir(parents=True, exist_ok=True)
    headed = isinstance(net, HeadedEncoder)
    (net.body if headed else net).save_pretrained(str(folder))
    if headed:
        save_file(net.classifier.state_dict(prefix="classifier."), folder / HEAD, metadata=said_of(model))
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))


def fresh_net(model: Model) -> nn.Module:
    """The base network with weights of its own, unpacked, and without any patch of ours."""
    bare = unpatched(model.net)
    return dequantized(bare) if kind_of(bare) else copy.deepcopy(bare)


def merge_adapter(adapter: Path, out: Path, base_delta: Mapping[str, Tensor], tokenizer: object,
                  trust_remote_code: bool = False, where: str | None = None, dtype: torch.dtype = torch.float32,
                  **how: Any) -> None:
    """Merge a saved adapter into its base with plain `peft`, and save the model with its tokenizer.

    `where` is the base's folder, if it is not where the adapter says. The weights are as wide as the base's own or as
    `dtype`, over which the adapter was trained, whichever is wider: in bf16 its change would be rounded away. `how`
    tells `from_pretrained` how the base was packed: then the adapter is merged into those weights unpacked. Raises
    ModelError for adapters that cannot be merged (soft prompts, prefixes).
    """
    import json
    import shutil

    config = json.loads((adapter / "adapter_config.json").read_text())
    kind, where = config["peft_type"], where or config["base_model_name_or_path"]
    space = of_peft(kind)
    if space is None or space.stays:
        raise ModelError(f"a {kind} adapter cannot be merged into the weights: "
                         f"{space.stays if space else 'no space of ours is of its kind'}; export it as it is with "
                         "--peft")
    config = loaded(AutoConfig, where, where, trust_remote_code)
    masked = any(str(kind).endswith("ForMaskedLM") for kind in config.architectures or ())
    loader = AutoModel if (adapter / HEAD).exists() else AutoModelForMaskedLM if masked else AutoModelForCausalLM
    wide = dtype if how else torch.promote_types(getattr(config, "dtype", None) or torch.float32, dtype)
    net = loaded(loader, where, where, trust_remote_code, dtype=wide, **how)
    net = dequantized(net) if how else net
    weights = dict(net.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in base_delta.items():
            weights[name.removeprefix("body.")].add_(delta.to(weights[name.removeprefix("body.")]))
    merged = PeftModel.from_pretrained(net, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(out))
    if (adapter / HEAD).exists():
        shutil.copy(adapter / HEAD, out / HEAD)
    tokenizer.save_pretrained(str(out))  # type: ignore[attr-defined]
