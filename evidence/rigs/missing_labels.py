"""Three clients who each lack two of four labels, and a language model that can write texts of any."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import SERVER
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_logits
from fedllm.local.requests import Fit, Limits, Logits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

LABELS = ("kind0", "kind1", "kind2", "kind3")
OWN, COMMON, LENGTH = 8, 24, 8
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", *LABELS, "[e]"]
SIZE = len(SPECIAL) + 4 * OWN + COMMON
HELD = ((0, 1), (1, 2), (2, 3))


def reader() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [f"k{k}w{i}" for k in range(4) for i in range(OWN)] + [f"c{i}" for i in range(COMMON)]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def text(rng: np.random.Generator, k: int) -> list[int]:
    """Eight words, of which three tell the label, and one may tell another."""
    base = len(SPECIAL)
    told = [base + k * OWN + int(rng.integers(OWN)) for _ in range(3)] + [base + int(rng.integers(4 * OWN))]
    rest = [base + 4 * OWN + int(rng.integers(COMMON)) for _ in range(LENGTH - 4)]
    return [int(i) for i in rng.permutation([*told, *rest])]


def config(width: int, length: int) -> LlamaConfig:
    """Two blocks."""
    return LlamaConfig(vocab_size=SIZE, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)


@functools.lru_cache(maxsize=2)
def writer(seed: int, steps: int = 150) -> Model:
    """A language model that writes a text behind its label; asked without examples it takes another label in three of
    ten cases, and behind examples it goes on as they do."""
    rng = numpy_stream(seed, "writer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(LlamaForCausalLM(config(48, 64)), reader(), "generation", make_space("full"), seed=seed)
    coded = []
    for i in range(500):
        k = int(rng.integers(4))
        wrong = k if i % 2 or rng.random() > 0.3 else int(rng.integers(4))
        parts = [[4 + k, *text(rng, k if i % 2 else wrong), 8] for _ in range(4 if i % 2 else 1)]
        ids = np.array([1, *(t for part in parts for t in part)], np.int32)
        labels = ids.astype(np.int64)
        labels[0] = -100
        coded.append(Encoded(ids, labels, len(ids) - 1))
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
    spec = LocalSpec(lr=5e-3, batch_size=32, schedule="cosine")
    theta = run_fits([Fit("writer", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    model.net.load_state_dict(theta, strict=False)
    return model


def missing_labels(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 5,
                   local: Mapping[str, Any] | None = None) -> Metrics:
    """FedAvg's one model on all labels: `accuracy`, and the recall of the label that is recalled worst."""
    torch.set_num_threads(1)
    rng, read = numpy_stream(seed, "missing labels"), reader()
    rows = lambda labels, n: [{"text": read.decode(text(rng, k)), "label": k} for k in labels for _ in range(n)]  # noqa: E731
    shards = {f"client-{i}": Shard(rows(held, 12)) for i, held in enumerate(HELD)}
    fed = Federation(shards, rows(range(4), 50), "classification", LABELS, rows(range(4), 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        net = HeadedEncoder(LlamaModel(config(32, 32)), 4, "mean")
    model = Model(net, read, "classification", make_space("full"), labels=LABELS, seed=seed)
    spec = LocalSpec(**{"lr": 1e-2, "steps": 10, "batch_size": 12, "max_length": 16, **(local or {})})
    world = World(model, fed, spec, seed, models=Shelf({"writer": lambda: writer(seed)}))
    told = {"generator": "writer", "ask": "{label}", "example": " {text} [e] ", "n_per_label": 30, "embed": "tfidf",
            "max_new_tokens": LENGTH, "agree": False, "shots": 3, **(knobs or {})}
    run = Trial(method, world, {k: v for k, v in told.items() if k in METHODS[method].knobs()}).rounds(rounds)
    test = world.encoded(SERVER, "test")
    [z] = run_logits([Logits("x", model, run.state["theta"], None, test)], world.limits)
    said, true = np.array([int(np.argmax(v)) for v in z]), np.array([int(e.labels) for e in test])
    recall = [float((said[true == k] == k).mean()) for k in range(4)]
    return {"accuracy": float((said == true).mean()), "worst_recall": min(recall), **run.work()}


RIGS = {"missing_labels": missing_labels}
