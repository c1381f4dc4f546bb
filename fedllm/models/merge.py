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
from transformers import AutoModel, AutoModelForCausalLM

from fedllm.core.errors import ModelError
from fedllm.models.checks import loaded
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.peft_io import HEAD
from fedllm.models.plain import unpatched
from fedllm.spaces.mask import Mask
from fedllm.spaces.params import Params


def save_merged(folder: Path, model: Model, theta: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> None:
    """Write weights with `theta` in them, and the tokenizer; a classifier goes to `head.safetensors`.

    For spaces that replace or shift weights (full, bias, layers, head, mask) the result is a plain transformers folder.
    Bottleneck adapters are modules of their own: the base is saved with the trainables beside it.
    """
    net: Any = fresh_net(model)
    weights = dict(net.named_parameters(remove_duplicate=False))
    left: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, delta in (base or {}).items():
            weights[name].add_(delta.to(weights[name]))
        if isinstance(model.space, Mask):
            _add_sparse(weights, model.space.positions(model.net), theta)
        else:
            left = _put(net, model, weights, theta)
    folder.mkdir(parents=True, exist_ok=True)
    headed = isinstance(net, HeadedEncoder)
    (net.body if headed else net).save_pretrained(str(folder))
    if headed:
        save_file(net.classifier.state_dict(prefix="classifier."), folder / HEAD)
    if left:
        save_file({n: t.detach().cpu().contiguous() for n, t in left.items()}, folder / "trainables.safetensors")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))


def _put(net: Any, model: Model, weights: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy trainables over weights of the same name; gives those that are no weight of the network."""
    left = {}
    for name, value in theta.items():
        if name in weights and (isinstance(model.space, Params) or name.startswith("classifier.")):
            if name.startswith("lm_head.") and net.config.tie_word_embeddings:
                _untie(net)
                dict(net.named_parameters(remove_duplicate=False))[name].copy_(value)
            else:
                weights[name].copy_(value)
        else:
            left[name] = value
    return left


def _untie(net: Any) -> None:
    """Give the output head weights of its own."""
    head = net.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    net.config.tie_word_embeddings = False


def _add_sparse(weights: Mapping[str, Tensor], at: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
    for name, places in at.items():
        flat = weights[name].view(-1)
        flat.index_add_(0, places, theta[f"{name}.sparse_delta"].to(flat))


def fresh_net(model: Model) -> nn.Module:
    """The base network with weights of its own and without any patch of ours."""
    return copy.deepcopy(unpatched(model.net))


def merge_adapter(adapter: Path, out: Path, base_delta: Mapping[str, Tensor], tokenizer: object,
                  trust_remote_code: bool = False) -> None:
    """Merge a saved adapter into its base with plain `peft`, and save the model with its tokenizer.

    Raises ModelError for adapters that cannot be merged (soft prompts, prefixes).
    """
    import json
    import shutil

    config = json.loads((adapter / "adapter_config.json").read_text())
    kind, where = config["peft_type"], config["base_model_name_or_path"]
    if kind not in ("LORA", "IA3"):
        raise ModelError(f"a {kind} adapter puts virtual tokens before the text and cannot be merged into the weights; "
                         "export it as it is with --peft")
    loader = AutoModel if (adapter / HEAD).exists() else AutoModelForCausalLM
    net = loaded(loader, where, where, trust_remote_code)
    weights = dict(net.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in base_delta.items():
            weights[name.removeprefix("body.")].add_(delta.to(weights[name.removeprefix("body.")]))
    merged = PeftModel.from_pretrained(net, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(out))
    if (adapter / HEAD).exists():
        shutil.copy(adapter / HEAD, out / HEAD)
    tokenizer.save_pretrained(str(out))  # type: ignore[attr-defined]
