"""Adapters in PEFT's folder format: what we save loads in plain `peft`, and what `peft` saved loads here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.lora import LoRA, factors
from fedllm.spaces.space import PEFT, fitted_to

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
TYPES = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "soft_prompt", "PREFIX_TUNING": "prefix"}
BODY = "body."


def save_adapter(folder: Path, model: Model, theta: Mapping[str, Tensor], base_name: str) -> None:
    """Write `theta` as a PEFT adapter of the model that `base_name` loads.

    An encoder's classifier is no part of the transformers model, so it goes to `head.safetensors` beside the adapter.
    Raises ModelError for a space that PEFT does not have.
    """
    config = model.space.peft_config(model.net, model.task)
    if config is None:
        raise ModelError(f"space '{type(model.space).__name__}' has no PEFT format; export the merged model instead")
    if isinstance(config, LoraConfig):
        _as_trained(config, model.space, theta)
    config.base_model_name_or_path, config.inference_mode = base_name, True
    tensors = {n: t.detach().cpu().contiguous() for n, t in theta.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.net, HeadedEncoder):
        head = {n.removeprefix(PEFT): tensors.pop(n) for n in list(tensors) if n.startswith(PEFT + "classifier.")}
        tensors = {n.replace(PEFT + BODY, PEFT, 1): t for n, t in tensors.items()}
        _strip_body(config)
        full = {n: p.detach().float().cpu() for n, p in model.net.classifier.state_dict(prefix="classifier.").items()}
        labels = {"labels": json.dumps(list(model.labels)), "pooling": model.net.pooling}
        save_file(full | head, folder / HEAD, metadata=labels)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _as_trained(config: LoraConfig, space: Any, theta: Mapping[str, Tensor]) -> None:
    """Rank and alpha as the tensors have them: a server may grow ranks, and clients' ranks may differ."""
    ranks = {path: a.shape[0] for path, (_, a) in factors(theta).items()}
    if not ranks:
        return
    config.r = next(iter(ranks.values()))

    def alpha(rank: int) -> float:
        return space.scale(rank) * (math.sqrt(rank) if space.scaling == "rslora" else rank)

    config.lora_alpha = alpha(config.r)  # type: ignore[assignment]
    odd = {p: r for p, r in ranks.items() if r != config.r}
    config.rank_pattern = {p: r for p, r in odd.items()}
    config.alpha_pattern = {p: alpha(r) for p, r in odd.items()}


def _strip_body(config: Any) -> None:
    """Module names as the bare encoder has them."""
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(names := getattr(config, name, None), list | set | tuple):
            setattr(config, name, [n.removeprefix(BODY) for n in names])
    config.modules_to_save = None
    for name in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, name, None):
            setattr(config, name, {k.removeprefix(BODY): v for k, v in pattern.items()})


def load_adapter(folder: str | Path, model: Model) -> Tree:
    """The trainables in a PEFT adapter folder, for this model and its space.

    The same function whatever alpha the adapter was made with: where its scale differs from the space's, the ratio is
    multiplied into B. Raises ModelError when the folder cannot be read or does not fit.
    """
    folder = Path(folder)
    config = _config(folder)
    fresh = model.initial()
    tree = _tensors(folder / WEIGHTS)
    if isinstance(model.net, HeadedEncoder):
        tree = {n.replace(PEFT, PEFT + BODY, 1): t for n, t in tree.items()}
        if (folder / HEAD).exists():
            head = _tensors(folder / HEAD)
            tree |= {k: t for n, t in head.items() if (k := PEFT + n) in fresh}
        tree |= {n: t for n, t in fresh.items() if n.startswith(PEFT + "classifier.") and n not in tree}
    if odd := sorted(tree.keys() ^ fresh.keys()):
        side = "the adapter has" if odd[0] in tree else "the adapter lacks"
        raise ModelError(f"{folder} does not fit the recipe's model and space: {side} {odd[0]!r}; give no other knobs "
                         "beside space.start_from, and the base model that the adapter was made for")
    for name, t in tree.items():
        _check_shape(folder, name, t, fresh[name], model.space.ragged)
    tree = {n: tree[n].to(fresh[n].dtype) for n in fresh}
    if isinstance(model.space, LoRA):
        for path, (b, a) in factors(tree).items():
            to = model.space.scale(factors(fresh)[path][1].shape[0])  # ranks below the largest are filled up with zeros
            tree[f"{PEFT}{path}.lora_B.weight"] = b * (_scale(config, path, a.shape[0]) / to)
        if config.get("lora_dropout"):
            model.tell([f"{folder}: lora_dropout = {config['lora_dropout']} is off while clients train"])
    return fitted_to(tree, fresh) if model.space.ragged else tree


def _check_shape(folder: Path, name: str, t: Tensor, want: Tensor, ragged: bool) -> None:
    fits = t.shape == want.shape or (ragged and t.dim() == want.dim() and all(
        x == y or (".lora_" in name) for x, y in zip(t.shape, want.shape, strict=True)))
    if not fits:
        raise ModelError(f"{folder}: {name!r} has shape {tuple(t.shape)}, the model's space wants {tuple(want.shape)}")


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """s of one module, as PEFT computes it."""
    pattern, path = config.get("alpha_pattern") or {}, path.removeprefix(BODY)
    alpha = pattern.get(get_pattern_key(list(pattern), path), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def knobs_of(folder: str | Path, space: str) -> dict[str, Any]:
    """The space's knobs as the adapter in `folder` was made; a ModelError when it is an adapter of another kind."""
    config = _config(Path(folder))
    kind = TYPES.get(config.get("peft_type", ""))
    if kind != space:
        raise ModelError(f"space.start_from = {str(folder)!r} holds a {config.get('peft_type')} adapter, space.name "
                         f"is {space!r}; " + (f"use {kind!r}" if kind else f"allowed are {', '.join(TYPES)}"))
    if kind in ("soft_prompt", "prefix"):
        return {"length": config["num_virtual_tokens"]}
    targets = config["target_modules"]
    odd = isinstance(targets, str) or any(config.get(k) is not None and config.get(k) != [] for k in ELSEWHERE)
    targets = _adapted(Path(folder)) if odd else sorted(targets)
    saved = _whole(Path(folder)) if config.get("modules_to_save") else ["classifier"]
    if kind == "ia3":
        return {"targets": targets, "feedforward": sorted(config.get("feedforward_modules") or []),
                "modules_to_save": saved}
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return {"rank": max(ranks), "alpha": float(config["lora_alpha"]), "targets": targets, "modules_to_save": saved,
            "scaling": "rslora" if config.get("use_rslora") else "classic"}


UNSUPPORTED = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None,
               "target_parameters": None, "encoder_hidden_size": 0, "prefix_projection": False,
               "layer_replication": None}
"""Options of PEFT that change the function and that our spaces do not have, with the value that turns each off."""


ELSEWHERE = ("layers_to_transform", "exclude_modules")
"""Options of PEFT that narrow the targets: which modules are left, the adapter's own tensors say."""
SHIFTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of LoRA that also take something away from the base's weights."""


def _adapted(folder: Path) -> list[str]:
    names = {n.removeprefix(PEFT).partition(end)[0] for n in _tensors(folder / WEIGHTS)
             for end in (".lora_A.", ".ia3_l") if end in n}
    return sorted(names)


def _whole(folder: Path) -> list[str]:
    """Modules that the adapter holds whole: PEFT takes every one whose path ends so ("norm": "input_layernorm" too)."""
    names = [n for n in _tensors(folder / WEIGHTS) if ".lora_" not in n and not n.endswith(".ia3_l")]
    return sorted({n.removeprefix(PEFT).rpartition(".")[0] for n in names}) or ["classifier"]


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise ModelError(f"{folder} is no PEFT adapter folder: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}") from None
    for key, off in UNSUPPORTED.items():
        if config.get(key, off) not in (off, None, [], {}) and not (key == "encoder_hidden_size" and not config.get(
                "prefix_projection")):
            raise ModelError(f"{folder}: the adapter uses {key} = {config[key]!r}, which no space of ours has")
    if str(config.get("init_lora_weights")).startswith(SHIFTED):
        raise ModelError(f"{folder}: the adapter began as init_lora_weights = {config['init_lora_weights']!r}, which "
                         "takes a part out of the base's weights; save it anew as an ordinary LoRA (PEFT: "
                         "save_pretrained(..., path_initial_model_for_weight_conversion=...))")
    return config


def _tensors(path: Path) -> Tree:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        hint = "; save it with safe_serialization=True" if path.with_suffix(".bin").exists() else ""
        raise ModelError(f"{path} cannot be read: {error}{hint}") from None


def load_head(folder: Path) -> dict[str, torch.Tensor]:
    """The classifier that goes with an encoder's adapter: `classifier.weight` and `classifier.bias`."""
    return _tensors(folder / HEAD)
