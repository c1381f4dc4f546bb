"""What is looked at before and while a model is loaded: code of its own, unsafe or broken files, weights that lack."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from fedllm.core.errors import CompositionError, ModelError
from fedllm.models.encoder import HeadedEncoder

GIVE = ("give 'embedded', 'minilm', 'smollm2', a folder saved with save_pretrained, a GGUF file, or a Hub id that this "
        "machine can reach")
POINTER = b"version https://git-lfs"


def loaded(kind: Any, name: str, where: str, trust: bool, **options: Any) -> Any:
    """`kind.from_pretrained(where)`; whatever goes wrong is a ModelError that names the model.

    Code that the folder brings runs with `trust` alone, and nobody is asked on standard input.
    """
    a_model(name, Path(where))
    if not trust:
        no_code_of_its_own(name, where)
    sound_files(name, Path(where))
    try:
        return kind.from_pretrained(where, trust_remote_code=trust, **options)
    except pickle.UnpicklingError as error:
        raise ModelError(f"model {name!r}: its weights are a pickle that holds more than tensors "
                         f"({_line(error)}), which could run anything; only safetensors and plain tensors are "
                         "loaded: save it with save_pretrained(safe_serialization=True)") from None
    except Exception as error:  # whatever a library makes of a file that it cannot read
        raise ModelError(f"model {name!r} cannot be loaded: {_line(error)} ({GIVE})") from error


def a_model(name: str, folder: Path) -> None:
    """ModelError for a name or a folder that is no model's, and for weights that were packed elsewhere: transformers
    would read some of them without their scales."""
    if not name.strip():
        raise ModelError(f"model.name = {name!r} names no model; {GIVE}")
    if "://" in name:
        raise ModelError(f"model.name = {name.partition('://')[0] + '://...'!r}: nothing is fetched from a URL; {GIVE}")
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        what = ("holds a PEFT adapter and no model: give its base as model.name, and this folder as space.start_from"
                if (folder / "adapter_config.json").exists() else f"has no config.json, so that it is no model; {GIVE}")
        raise ModelError(f"model {name!r}: the folder {folder} {what}")
    with contextlib.suppress(ValueError):  # broken JSON says so itself when it is loaded
        packed = json.loads((folder / "config.json").read_text()).get("quantization_config")
        if packed:
            kind = packed.get("quant_method", "unknown") if isinstance(packed, Mapping) else packed
            raise ModelError(f"model {name!r}: {folder / 'config.json'} says that its weights are packed "
                             f"(quantization_config: {kind!r}), and packed weights are not read; give the model as it "
                             "was before (model.quantize packs it in 4 or 8 bits)")


def no_code_of_its_own(name: str, where: str) -> None:
    """ModelError for a model or tokenizer whose config names classes of its own (`auto_map`); reads JSON alone."""
    config: Mapping[str, Any] = {}
    with contextlib.suppress(Exception):  # it says itself what is wrong when it is loaded
        config, _ = PretrainedConfig.get_config_dict(where)
    tokens = get_tokenizer_config(where, local_files_only=Path(where).is_dir()) if Path(where).is_dir() else {}
    for file, found in (("config.json", config), ("tokenizer_config.json", tokens)):
        if found.get("auto_map"):
            raise ModelError(f"model {name!r} brings code of its own ({file}: auto_map), and model.trust_remote_code "
                             "is false: nothing of it was run. Set model.trust_remote_code: true if you trust its "
                             "author, or take auto_map out of the file to use transformers' own class")


def sound_files(name: str, folder: Path) -> None:
    """ModelError for weights that are a Git LFS pointer or a cut safetensors file; the file is named."""
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) if folder.is_dir() else []:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ModelError(f"model {name!r}: {path} is a Git LFS pointer and not the weights themselves; "
                                 "fetch them with `git lfs pull`")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as held:
                    names = held.keys()  # a method of its own, not a mapping's
                    small = next((n for n in names if held.get_slice(n).get_dtype().startswith("F8")), None)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"model {name!r}: {path} is no whole safetensors file ({_line(error)})") from None
            if small:
                raise ModelError(f"model {name!r}: {path} holds {small!r} in 8 bits (F8), whose scales would not be "
                                 "used; give the model in float32, bfloat16 or float16")


def complete(name: str, net: nn.Module, told: Mapping[str, Any]) -> list[str]:
    """Refuse a network of which weights that are used would be random; gives sentences on weights that are left out."""
    own = dict(net.named_parameters(remove_duplicate=False))
    odd = sorted(str(k[0] if isinstance(k, tuple) else k) for k in told.get("mismatched_keys", ()))
    if odd:
        raise ModelError(f"model {name!r}: {_some(odd)} have other shapes than its config says")
    lost = sorted(n for n in told.get("missing_keys", ()) if n in own)
    if lost:
        raise ModelError(f"model {name!r}: its files have no weights for {_some(lost)}, which "
                         f"{type(net).__name__} uses; they would be random. Give the folder of a whole "
                         f"{type(net).__name__}")
    rest = sorted(told.get("unexpected_keys", ()))
    what = f"model {name!r}: {_some(rest)} of its files are no part of {type(net).__name__} and not used"
    return [what] if rest else []


def words_fit(name: str, tokenizer: Any, net: Any) -> None:
    """ModelError where the tokenizer has a word that the network has no embedding for."""
    rows = net.get_input_embeddings().weight.shape[0]
    word, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise ModelError(f"model {name!r}: its tokenizer has the word {word!r} as number {last}, and the network has "
                         f"embeddings for {rows} words only; give the tokenizer that belongs to it")


def pictures_fit(name: str, images: Any, net: Any) -> None:
    """ModelError where the image processor does not make the pictures that the network's tower reads."""
    vision = net.config.vision_config
    wanted = (int(getattr(vision, "num_channels", 3)), int(vision.image_size), int(vision.image_size))
    try:
        made = tuple(images(np.zeros((31, 47, 3), np.uint8), return_tensors="np")["pixel_values"][0].shape)
    except Exception as error:  # a processor raises whatever its file makes it come upon
        raise ModelError(f"model {name!r}: its image processor (preprocessor_config.json) takes no picture: "
                         f"{type(error).__name__}: {error!s:.200}") from None
    if made != wanted:
        raise ModelError(f"model {name!r}: its image processor (preprocessor_config.json) makes pictures of the shape "
                         f"{list(made)}, and its tower reads {list(wanted)}; give the processor that belongs to it")


def reads_names(name: str, tokenizer: Any, labels: Sequence[str]) -> None:
    """ModelError where the tokenizer fails on the classes' names."""
    try:
        tokenizer(list(labels))
    except Exception as error:  # tokenizers raise plain `Exception`
        raise ModelError(f"model {name!r}: its tokenizer cannot read the classes' names ({error!s:.200}); give the "
                         "tokenizer's files that belong to it, tokenizer_config.json among them") from None


def reads_texts(name: str, config: Any, classify: bool = False) -> None:
    """ModelError for a network that does not read texts (and texts alone, to `classify` them), or writes them from an
    encoder's."""
    if config.is_encoder_decoder:
        raise ModelError(f"model {name!r} is an encoder with a decoder ({config.model_type}), and such models do not "
                         "work here: give a decoder (data.task 'generation') or an encoder ('classification') alone")
    texts = config.get_text_config()
    if "vocab_size" not in texts.to_dict() or (classify and texts is not config):
        raise ModelError(f"model {name!r} ({config.model_type}) is no network that reads texts alone; give one that "
                         "does")


@torch.no_grad()
def first_sees(name: str, net: HeadedEncoder) -> None:
    """CompositionError where the first token, which is to stand for a text, sees no other: every text is one then."""
    if net.pooling != "cls":
        return
    weight = net.get_input_embeddings().weight
    ids = torch.arange(8, device=weight.device).reshape(2, 4) % len(weight)
    ids[:, 0] = 0
    first = net.body.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    if len(weight) > 7 and torch.equal(first[0], first[1]):
        raise CompositionError(f"model.pooling = 'cls' and model {name!r}, whose first token sees none of those after "
                               "it, do not fit together: every text would be one and the same vector; allowed are "
                               "'last' and 'mean'")


def unused(config: Any) -> list[str]:
    """What a config asks for in training that is not done: dropout."""
    rates = {k: v for k, v in _numbers(config.to_dict()) if ("dropout" in k or k.endswith("pdrop")) and v > 0}
    if not rates:
        return []
    return [f"dropout is off while clients train, though the model's config has {', '.join(sorted(set(rates)))} > 0"]


def _numbers(tree: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from _numbers(v)
        elif isinstance(v, int | float) and not isinstance(v, bool):
            yield k, v


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
