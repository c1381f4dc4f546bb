"""Adapters in PEFT's folder format: what we save loads in plain `peft`, and what `peft` saved loads here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.models.dual import DualEncoder
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.registry import SPACES
from fedllm.spaces.space import PEFT, fitted_to

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
SPACE, TRAINED = "space.json", "trainables.safetensors"


def apart(tree: Mapping[str, Tensor]) -> Tree:
    """The tensors as safetensors writes them: on the CPU, each in one piece, and no two in one memory."""
    known, out = set[int](), {}
    for name, t in tree.items():
        plain = t.detach().cpu().contiguous()
        at = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if at in known else plain
        known.add(at)
    return out


def inside(net: Any) -> tuple[str, Any]:
    """The path of the transformers network within ours, and that network: adapters are saved for it."""
    if isinstance(net, HeadedEncoder):
        return "body.", net.body
    return ("clip.", net.clip) if isinstance(net, DualEncoder) else ("", net)


def save_adapter(folder: Path, model: Model, theta: Mapping[str, Tensor], base_name: str) -> None:
    """Write `theta` as a PEFT adapter of the model that `base_name` loads.

    An encoder's classifier is no part of the transformers model, so it goes to `head.safetensors` beside the adapter.
    Raises ModelError for a space that PEFT does not have.
    """
    made = model.space.to_peft(model.net, model.task, theta)
    if made is None:
        raise ModelError(f"space '{model.space.stem}' has no PEFT format; export the merged model instead")
    config, theirs = made
    config.base_model_name_or_path, config.inference_mode = base_name, True
    tensors = apart(theirs)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.net, HeadedEncoder):
        head = {n.removeprefix(PEFT): tensors.pop(n) for n in list(tensors) if n.startswith(PEFT + "classifier.")}
        full = {n: p.detach().float().cpu() for n, p in model.net.classifier.state_dict(prefix="classifier.").items()}
        save_file(full | head, folder / HEAD, metadata=said_of(model))
    if path := inside(model.net)[0]:
        tensors = {n.replace(PEFT + path, PEFT, 1): t for n, t in tensors.items()}
        _strip(config, path)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _strip(config: Any, path: str) -> None:
    """Module names as the bare network has them."""
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(names := getattr(config, name, None), list | set | tuple):
            setattr(config, name, [n.removeprefix(path) for n in names])
    config.modules_to_save = None
    for name in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, name, None):
            setattr(config, name, {k.removeprefix(path): v for k, v in pattern.items()})


def save_trainables(folder: Path, model: Model, theta: Mapping[str, Tensor], base_name: str) -> None:
    """Write `theta` as it is, for a space that neither PEFT has nor can be merged; `load_adapter` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"space": model.space.stem, "knobs": asdict(model.space), "base_model": base_name}  # type: ignore[call-overload]
    (folder / SPACE).write_text(json.dumps(made, indent=2))
    save_file(apart(theta), folder / TRAINED)


def load_adapter(folder: str | Path, model: Model) -> Tree:
    """The trainables in a folder, a PEFT adapter or one of `save_trainables`, for this model and its space.

    The same function whatever scale the adapter was made with. Raises ModelError when the folder cannot be read or does
    not fit.
    """
    folder = Path(folder)
    fresh = model.initial()
    if (folder / SPACE).exists():
        return _fitting(folder, _tensors(folder / TRAINED), fresh, model.space.ragged)
    config = _config(folder)
    tree = sound(folder)
    if path := inside(model.net)[0]:
        tree = {n.replace(PEFT, PEFT + path, 1): t for n, t in tree.items()}
    if isinstance(model.net, HeadedEncoder):
        if (folder / HEAD).exists():
            head = _tensors(folder / HEAD)
            tree |= {k: t for n, t in head.items() if (k := PEFT + n) in fresh}
        tree |= {n: t for n, t in fresh.items() if n.startswith(PEFT + "classifier.") and n not in tree}
    if config.get("lora_dropout") and not model.space.draws:
        model.tell([f"{folder}: lora_dropout = {config['lora_dropout']} is off while clients train"])
    told = _as_peft(folder, lambda: model.space.from_peft(config, tree, fresh))
    tree = _fitting(folder, told, fresh, model.space.ragged)
    return fitted_to(tree, fresh) if model.space.ragged else tree


def _fitting(folder: Path, tree: Tree, fresh: Tree, ragged: bool) -> Tree:
    """The tree in the order and types of `fresh`; ModelError for other names or shapes."""
    if odd := sorted(tree.keys() ^ fresh.keys()):
        side = "the adapter has" if odd[0] in tree else "the adapter lacks"
        raise ModelError(f"{folder} does not fit the recipe's model and space: {side} {odd[0]!r}; give no other knobs "
                         "beside space.start_from, and the base model that the adapter was made for")
    for name, t in tree.items():
        _check_shape(folder, name, t, fresh[name], ragged)
    return {n: tree[n].to(fresh[n].dtype) for n in fresh}


def _check_shape(folder: Path, name: str, t: Tensor, want: Tensor, ragged: bool) -> None:
    if t.is_floating_point() != want.is_floating_point():
        raise ModelError(f"{folder}: {name!r} is of type {t.dtype}, the model's space wants {want.dtype}")
    free = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None  # the axis that is a rank
    fits = t.shape == want.shape or (ragged and free is not None and t.dim() == want.dim() == 2
                                     and t.shape[1 - free] == want.shape[1 - free])
    if not fits:
        raise ModelError(f"{folder}: {name!r} has shape {tuple(t.shape)}, the model's space wants {tuple(want.shape)}")


def knobs_of(folder: str | Path, space: str) -> dict[str, Any]:
    """The space's knobs as what lies in `folder` was made; a ModelError when it was made by another space."""
    folder = Path(folder)
    if (folder / SPACE).exists():
        made = _json(folder / SPACE)
        if (by := made.get("space")) != space:
            raise ModelError(f"space.start_from = {str(folder)!r} holds trainables of space {by!r}, space.name is "
                             f"{space!r}; use {by!r}")
        return dict(made.get("knobs") or {})
    config, kind = _config(folder), SPACES.get(space)
    if kind is None or not kind.peft or kind.peft != config.get("peft_type"):
        names = {c.peft: stem for stem, c in SPACES.items() if vars(c).get("peft")}
        use = names.get(config.get("peft_type", ""))
        raise ModelError(f"space.start_from = {str(folder)!r} holds a {config.get('peft_type')} adapter, space.name "
                         f"is {space!r}; " + (f"use {use!r}" if use else f"allowed are {', '.join(names)}"))
    return _as_peft(folder, lambda: kind.peft_knobs(_exact(folder, config)))


T = TypeVar("T")


def _as_peft(folder: Path, make: Callable[[], T]) -> T:
    """What is made of the adapter's config; a ModelError where it lacks something, or holds something of another type
    than PEFT writes."""
    try:
        return make()
    except KeyError as error:
        raise ModelError(f"{folder / CONFIG} lacks {error}, which such an adapter needs") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG} is not as PEFT writes it: {error}") from None


UNSUPPORTED = {"bias": "none", "lora_bias": False, "trainable_token_indices": None,
               "target_parameters": None, "encoder_hidden_size": 0, "prefix_projection": False,
               "layer_replication": None}
"""Options of PEFT that change the function and that our spaces do not have, with the value that turns each off."""


ELSEWHERE = ("layers_to_transform", "exclude_modules")
"""Options of PEFT that narrow the targets: which modules are left, the adapter's own tensors say."""
SHIFTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of LoRA that also take something away from the base's weights."""


def _exact(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with those modules as targets that the adapter really holds, where it says so in other words."""
    targets = config.get("target_modules")
    odd = isinstance(targets, str) or any(config.get(k) is not None and config.get(k) != [] for k in ELSEWHERE)
    whole = {"modules_to_save": _whole(folder)} if config.get("modules_to_save") else {}
    return {**config, **whole, **({"target_modules": _adapted(folder)} if odd and targets else {})}


def _adapted(folder: Path) -> list[str]:
    names = {n.removeprefix(PEFT).partition(end)[0] for n in _tensors(folder / WEIGHTS)
             for end in (".lora_A.", ".ia3_l") if end in n}
    return sorted(names)


def _whole(folder: Path) -> list[str]:
    """Modules that the adapter holds whole: PEFT takes every one whose path ends so ("norm": "input_layernorm" too)."""
    names = [n for n in _tensors(folder / WEIGHTS) if ".lora_" not in n and not n.endswith(".ia3_l")]
    return sorted({n.removeprefix(PEFT).rpartition(".")[0] for n in names}) or ["classifier"]


def _config(folder: Path) -> dict[str, Any]:
    config = _json(folder / CONFIG)
    for key, off in UNSUPPORTED.items():
        if config.get(key, off) not in (off, None, [], {}) and not (key == "encoder_hidden_size" and not config.get(
                "prefix_projection")):
            raise ModelError(f"{folder}: the adapter uses {key} = {config[key]!r}, which no space of ours has")
    if str(config.get("init_lora_weights")).startswith(SHIFTED):
        raise ModelError(f"{folder}: the adapter began as init_lora_weights = {config['init_lora_weights']!r}, which "
                         "takes a part out of the base's weights; save it anew as an ordinary LoRA (PEFT: "
                         "save_pretrained(..., path_initial_model_for_weight_conversion=...))")
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path.parent} is no PEFT adapter folder: {path.name}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}; PEFT writes an object there")
    return value


def sound(folder: Path) -> Tree:
    """The tensors of a PEFT adapter folder; a ModelError where its config or they are damaged, or not one adapter."""
    config, tree = _config(folder), _tensors(folder / WEIGHTS)
    pattern = config.get("rank_pattern") or {}
    for name, a in tree.items():
        path, mark, _ = name.removeprefix(PEFT).partition(".lora_A.")
        if not mark:
            continue
        b = tree.get(name.replace(".lora_A.", ".lora_B."))
        want = _as_peft(folder, lambda path=path: pattern.get(  # type: ignore[misc]
            get_pattern_key(list(pattern), path), config["r"]))
        if b is not None and a.dim() == b.dim() == 2 and not a.shape[0] == b.shape[1] == want:
            raise ModelError(f"{folder}: the factors of {path!r} are {tuple(a.shape)} and {tuple(b.shape)}, and "
                             f"{CONFIG} says that the rank is {want!r}: they do not belong together")
    return tree


def _tensors(path: Path) -> Tree:
    try:
        tree = load_file(path)
    except (OSError, SafetensorError) as error:
        hint = "; save it with safe_serialization=True" if path.with_suffix(".bin").exists() else ""
        raise ModelError(f"{path} cannot be read: {error}{hint}") from None
    if odd := next((n for n, t in tree.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise ModelError(f"{path}: {odd!r} holds NaN or infinity, and so would all that is made with it; take a copy "
                         "from before the training broke")
    return tree


def base_of(folder: Path) -> str:
    """The base model that the adapter in this folder says it was made for; empty where it says none."""
    return str(_config(folder).get("base_model_name_or_path") or "")


def load_head(folder: Path) -> dict[str, torch.Tensor]:
    """The classifier that goes with an encoder's adapter: `classifier.weight` and `classifier.bias`."""
    return _tensors(folder / HEAD)


def said_of(model: Model) -> dict[str, str]:
    """What a saved classifier says of itself: its labels in order, and which state of a row it reads."""
    assert isinstance(model.net, HeadedEncoder)
    return {"labels": json.dumps(list(model.labels)), "pooling": model.net.pooling}


def take_head(model: Model, folder: str | Path) -> list[str]:
    """Put the classifier that a run has left in this folder in the place of a new one; what is to be said of one that
    does not fit. Its rows go by the labels' names, so that labels in another order are the same labels."""
    path = Path(folder) / HEAD
    if not isinstance(model.net, HeadedEncoder) or not path.is_file():
        return []
    tree = load_head(path.parent)
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        told = file.metadata() or {}
    labels, pooling = tuple(json.loads(told.get("labels", "null")) or model.labels), told.get("pooling")
    head, odd = model.net.classifier, ""
    if set(labels) != set(model.labels):
        odd = f"of the labels {', '.join(labels[:5])}{', ...' * (len(labels) > 5)}"
    elif pooling not in (None, model.net.pooling):
        odd = f"over model.pooling = {pooling!r}, and the recipe's is {model.net.pooling!r}"
    elif any(n not in tree or tree[n].shape != p.shape for n, p in head.state_dict(prefix="classifier.").items()):
        odd = f"of the shape {tuple(t.shape for t in tree.values())}, and the network's is {tuple(head.weight.shape)}"
    if odd:
        return [f"{path} is a classifier {odd}; it is not used, and a new one is trained"]
    at = [labels.index(label) for label in model.labels] or slice(None)
    with torch.no_grad():
        head.weight.copy_(tree["classifier.weight"][at])
        head.bias.copy_(tree["classifier.bias"][at])
    return []
