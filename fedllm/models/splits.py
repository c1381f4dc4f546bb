"""How byte-level tokenizers split texts before they merge bytes, by the names that GGUF files have for it.

The names and expressions are llama.cpp's; those that transformers knows are taken from there.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

PLAIN = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "roberta-bpe")
"""As GPT-2 splits."""
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""As GPT-2 splits, and every digit by itself before that."""
WRITTEN = ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Of names with one meaning, the one to write."""


def split_of(pre: str | None) -> Any:
    """The pre-tokenizer behind a name (`tokenizer.ggml.pre`), or None for a name that is not known here."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in PLAIN:
        return byte_level
    if pre in DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        from tokenizers import Regex

        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def name_of(splits: Any) -> str | None:
    """The name for what a `tokenizer.json` has under `pre_tokenizer`, or None where there is none."""
    wanted = _plain(splits)
    return next((name for name in WRITTEN if _plain(json.loads(split_of(name).__getstate__())) == wanted), None)


def _plain(part: Any) -> Any:
    """Without what changes no token: where offsets begin, and sequences of one."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        inner = [_plain(p) for p in part.get("pretokenizers", ())]
        return inner[0] if len(inner) == 1 else inner
    return {k: v for k, v in part.items() if k != "trim_offsets"}
