"""Write a model as a GGUF file, for llama.cpp and what is built on it; it is read back and compared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.core.rng import torch_stream
from fedllm.models.gguf import FACTORS, NEEDS, look, read
from fedllm.models.splits import name_of

KINDS = ("f32", "f16", "q8_0")
NEAR = {"f32": 1e-4, "f16": 1e-2, "q8_0": 0.3}
"""By how much logits may differ from the model's own, of their largest."""
AS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""A config's model_type -> the architecture in GGUF."""
TURNED = ("llama",)
"""Architectures whose queries and keys lie pair by pair in GGUF, and half by half in transformers."""
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
SAMPLE = "In 2024, 12 apples cost  $3.50:\n\n1. He said: it's naïve, don't!\n\t2 + 2 = 4"
"""Digits, spaces, marks and letters beyond ASCII: what tokenizers split in different ways."""


def write_gguf(path: Path, net: Any, tokenizer: Any, kind: str = "f16", name: str = "model") -> None:
    """Write the network and its tokenizer to `path`; matrices are of this kind, norms and biases always fp32.

    Raises ModelError for an architecture, a scaling of positions or a tokenizer that cannot be written, and where the
    file would not say what the model says.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(f"writing a GGUF file needs an optional extra: {NEEDS}") from None
    if kind not in KINDS:
        raise ModelError(f"gguf type {kind!r} is not allowed; it must be one of {', '.join(KINDS)}")
    config = net.config
    arch = _architecture(config)
    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
             "q8_0": gguf.GGMLQuantizationType.Q8_0}
    writer = gguf.GGUFWriter(path, arch)
    _facts(writer, config, net, name, {"f32": 0, "f16": 1, "q8_0": 7}[kind])
    _texts(writer, tokenizer, net)
    for key, weight in _tensors(net, arch):
        as_type = types[kind] if weight.dim() > 1 else types["f32"]
        data = weight.detach().float().cpu().contiguous().numpy()
        if as_type == types["q8_0"] and data.shape[-1] % 32:
            as_type = types["f16"]  # its blocks are of 32
        writer.add_tensor(key, gguf.quants.quantize(data, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(path, net, tokenizer, kind)


def _architecture(config: Any) -> str:
    arch = AS.get(config.model_type)
    if arch is None:
        raise ModelError(f"a {config.model_type} model cannot be written as GGUF here; written are {', '.join(AS)}. "
                         "Export with --merge and use llama.cpp's own converter")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise ModelError(f"a {config.model_type} model with sliding_window = {window} cannot be written as GGUF here: "
                         f"the architecture {arch!r} has no such window")
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise ModelError(f"a {config.model_type} model with hidden_act = {config.hidden_act!r}, mlp_bias = "
                         f"{getattr(config, 'mlp_bias', False)} cannot be written as GGUF here")
    return arch


def _facts(writer: Any, config: Any, net: Any, name: str, file_type: int) -> None:
    """The config's numbers, under GGUF's names."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(f"{name}, tuned with fedllm")
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _factors(net: Any) -> Tensor | None:
    """By what each pair of a head's dimensions turns more slowly than without scaling; None where none does."""
    config, turn = net.config, net.get_decoder().rotary_emb
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    fixed = kind in ("linear", "llama3") or (
        kind == "longrope" and config.rope_parameters["short_factor"] == config.rope_parameters["long_factor"])
    if not fixed or float(turn.attention_scaling) != 1.0:
        raise ModelError(f"positions scaled by rope_type = {kind!r} cannot be written as GGUF here; default, linear "
                         "and llama3 can")
    at = torch.arange(len(turn.inv_freq), dtype=torch.float64) / len(turn.inv_freq)
    return (config.rope_parameters["rope_theta"] ** -at / turn.inv_freq.double().cpu()).float()


def _tensors(net: Any, arch: str) -> Iterator[tuple[str, Tensor]]:
    """GGUF's names and the weights as they lie there; ModelError for a weight that has no name there."""
    import gguf

    config = net.config
    kinds = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    if (factors := _factors(net)) is not None:
        yield FACTORS, factors
    for path, weight in net.named_parameters():  # a tied head once, as llama.cpp has it
        key = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise ModelError(f"'{path}' has no name in GGUF's architecture {arch!r}")
        if arch in TURNED and path.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in path else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        yield key, weight


def _texts(writer: Any, tokenizer: Any, net: Any) -> None:
    """The tokenizer: a byte-level BPE with its words, merges, special tokens and chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    model, pre = rules.get("model") or {}, name_of(rules.get("pre_tokenizer"))
    if model.get("type") != "BPE" or rules.get("normalizer") or pre is None:
        raise ModelError("this tokenizer cannot be written as GGUF here: it must be a byte-level BPE without a "
                         "normalizer that splits texts as GPT-2, SmolLM, Llama 3, Qwen 2, Tekken or GPT-4o do; it is "
                         f"{model.get('type')!r}")
    words = {i: w for w, i in tokenizer.get_vocab().items()}
    added = {t["id"]: t for t in rules["added_tokens"]}
    rows = net.get_input_embeddings().weight.shape[0]
    kinds = [_kind(i, words, added) for i in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                     ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        if (id := getattr(tokenizer, f"{key}_token_id")) is not None:
            add(id)
    first = tokenizer("a").input_ids
    writer.add_add_bos_token(first[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(first[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _kind(i: int, words: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if i not in words:
        return UNUSED
    return NORMAL if i not in added else CONTROL if added[i]["special"] else USER


def _check(path: Path, net: Any, tokenizer: Any, kind: str) -> None:
    """ModelError where the file, read again, splits texts or makes logits that are not the model's."""
    theirs, words = read(path.name, path, look(path.name, path))
    if words(SAMPLE).input_ids != (want := tokenizer(SAMPLE).input_ids):
        raise ModelError(f"{path} would split texts otherwise than the model's tokenizer ({SAMPLE!r}); nothing is kept")
    rows = net.get_input_embeddings().weight.shape[0]
    drawn = torch.randint(rows, (16,), generator=torch_stream(0, "gguf")).tolist()
    for ids in (want, drawn):
        with torch.no_grad():
            ours, got = (_logits(n, ids) for n in (net, theirs))
        apart = float((ours - got).abs().max()) / max(1e-6, float(ours.abs().max()))
        if not apart <= NEAR[kind] * (1 if net.dtype == torch.float32 else 10):
            raise ModelError(f"{path} would say something else than the model: logits differ by {apart:.2g} of their "
                             "largest")


def _logits(net: Any, ids: Sequence[int]) -> Tensor:
    return net(input_ids=torch.tensor([list(ids)], device=net.device), use_cache=False).logits[0].float().cpu()


def written(goal: Path, net: Any, tokenizer: Any, kind: str, name: str) -> Path:
    """The same into the folder `goal`, whole or not at all; the file's path."""
    goal.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=goal) as part:
        path = Path(part) / f"{name}.{kind}.gguf"
        write_gguf(path, net, tokenizer, kind, name)
        return path.replace(goal / path.name)
