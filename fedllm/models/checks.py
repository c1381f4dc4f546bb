"""What is looked at before and while a model is loaded: code of its own, unsafe or broken files, weights that lack."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from fedllm.core.errors import ModelError

GIVE = ("give 'embedded', 'minilm', 'smollm2', a folder saved with save_pretrained, a GGUF file, or a Hub id that this "
        "machine can reach")
POINTER = b"version https://git-lfs"


def loaded(kind: Any, name: str, where: str, trust: bool, **options: Any) -> Any:
    """`kind.from_pretrained(where)`; whatever goes wrong is a ModelError that names the model.

    Code that the folder brings runs with `trust` alone, and nobody is asked on standard input.
    """
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
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(f"model {name!r}: {path} is no whole safetensors file ({_line(error)})") from None


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
