"""A small language model that was pre-trained on documents and the word for their kind, and clients that tune it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.topics import cache_dir, keep
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

KINDS, OWN, WORDS = ("red", "green", "blue", "white"), 10, 80
LENGTH, SHARE = 12, 0.35
CLIENTS, EACH = 4, 60


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w79, the kinds, and what frames them."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *KINDS, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def net(seed: int, depth: int = 2, width: int = 48) -> LlamaForCausalLM:
    """A fresh Llama of so many blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))


def documents(rng: np.random.Generator, words: np.ndarray, kinds: np.ndarray) -> list[Row]:
    """A word of the document's kind with probability 0.35, else any; the answer is the kind."""
    noise = rng.integers(0, WORDS, (len(kinds), LENGTH))
    own = words[kinds[:, None], rng.integers(0, words.shape[1], noise.shape)]
    at = np.where(rng.random(noise.shape) < SHARE, own, noise)
    return [{"prompt": " ".join(f"w{i}" for i in row), "response": KINDS[k]} for row, k in zip(at, kinds, strict=True)]


def kinds_of_words(seed: int) -> np.ndarray:
    """Ten words of each kind [4, 10], no word of two kinds."""
    return numpy_stream(seed, "kinds").permutation(WORDS)[: len(KINDS) * OWN].reshape(len(KINDS), OWN)


@functools.lru_cache(maxsize=4)
def pretrained(seed: int, known: int, depth: int = 2, steps: int = 250) -> dict[str, torch.Tensor]:
    """Weights after learning from documents in which the first `known` words of each kind tell it (0: nothing does)."""
    path = cache_dir() / f"prompted-{seed}-{known}-{depth}-{steps}-v1.safetensors"
    if path.is_file():
        return load_file(path)
    rng = numpy_stream(seed, "prompted")
    words = kinds_of_words(seed)[:, :known] if known else rng.integers(0, WORDS, (len(KINDS), OWN))
    model = Model(net(seed, depth), tokenizer(), "generation", make_space("full"), seed=seed)
    labels = rng.integers(0, len(KINDS), 1200)
    rows = documents(rng, words, labels)
    coded = encode_rows(rows, model.tokenizer, "generation", 64)
    spec = LocalSpec(lr=3e-3, steps=steps, batch_size=32, schedule="cosine", clip_norm=1.0)
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
    theta = run_fits([Fit("pretraining", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    return keep(path, theta)


def started(seed: int, known: int, space: Any, depth: int = 2) -> Model:
    """The pre-trained model with this space."""
    made = net(seed, depth)
    made.load_state_dict(pretrained(seed, known, depth), strict=False)
    return Model(made, tokenizer(), "generation", space, seed=seed)


def prompted(method: str, seed: int, *, known: int = 4, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
             local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 60 documents of four kinds each, of which the first four of each kind are labelled.

    `accuracy` is the shared model's on 400 documents: the label word that it finds likeliest is the right one.
    """
    torch.set_num_threads(1)
    rng, words = numpy_stream(seed, "prompted clients"), kinds_of_words(seed)
    shards = {}
    for k in range(CLIENTS):
        first = np.repeat(np.arange(len(KINDS)), 4)  # four of each kind come first
        shards[f"client-{k}"] = Shard(documents(rng, words, np.concatenate(
            [first, rng.integers(0, len(KINDS), EACH - len(first))])))
    fed = Federation(shards, documents(rng, words, rng.integers(0, len(KINDS), 400)), "generation")
    model = started(seed, known, make_space("lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj")))
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    ours = {"verbalizer": KINDS, "labelled": 16, **(knobs or {})}
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), ours)
    before = next(iter(run.scores("global").values()))["label_accuracy"]
    run.rounds(rounds)
    return {"accuracy": float(next(iter(run.scores("global").values()))["label_accuracy"]), "before": float(before),
            **run.work()}


RIGS = {"prompted": prompted}
