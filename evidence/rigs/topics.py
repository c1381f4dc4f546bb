"""Rig A of the dossiers: documents with topics, a label-skewed split, and an encoder pre-trained on other topics."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.models.model import HeadedEncoder

VOCAB, LENGTH, WORDS = 256, 20, 12
CLASSES = tuple(f"topic-{i}" for i in range(8))


def topics(rng: np.random.Generator, count: int) -> np.ndarray:
    """Each topic's own words [count, 12], from ids 20 up."""
    return np.stack([rng.choice(np.arange(20, VOCAB), WORDS, replace=False) for _ in range(count)])


def documents(rng: np.random.Generator, words: np.ndarray, labels: np.ndarray, share: float) -> list[Encoded]:
    """A position holds a word of the document's topic with probability `share`, else any id from 20 up."""
    noise = rng.integers(20, VOCAB, (len(labels), LENGTH))
    own = words[labels[:, None], rng.integers(0, WORDS, (len(labels), LENGTH))]
    ids = np.where(rng.random((len(labels), LENGTH)) < share, own, noise).astype(np.int32)
    return [Encoded(row, int(y), 1) for row, y in zip(ids, labels, strict=True)]


@functools.lru_cache(maxsize=8)
def topic_federation(seed: int, clients: int = 8, alpha: float = 0.1, share: float = 0.22) -> Federation:
    """800 training and 800 IID test documents; Dirichlet(alpha) over labels, at least 8 documents a client."""
    rng = numpy_stream(seed, "topics")
    words, kinds = topics(rng, len(CLASSES)), len(CLASSES)
    labels = rng.integers(0, kinds, 800)
    while True:  # as the dossier has it: draw again until nobody holds fewer than 8
        mix = rng.dirichlet([alpha] * clients, kinds)  # [class, client]
        owner = np.array([rng.choice(clients, p=mix[y]) for y in labels])
        if np.bincount(owner, minlength=clients).min() >= 8:
            break
    shards = {}
    for k in range(clients):
        mine = labels[owner == k]
        shards[f"client-{k}"] = Shard(documents(rng, words, mine, share),  # type: ignore[arg-type]
                                      documents(rng, words, rng.choice(mine, 100), share))  # type: ignore[arg-type]
    test = documents(rng, words, rng.integers(0, kinds, 800), share)
    return Federation(shards, test, "classification", CLASSES)  # type: ignore[arg-type]


def encoder() -> BertModel:
    """Two blocks of width 48."""
    return BertModel(BertConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False)


def cache_dir() -> Path:
    """Where pre-trained backbones lie: FEDLLM_CACHE, or a folder of the system's temporary one."""
    return Path(os.environ.get("FEDLLM_CACHE", Path(tempfile.gettempdir()) / "fedllm-cache"))


def keep(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write them whole or not at all, also with several processes at once; they are given back as they were written."""
    whole = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file(whole, partial)
    partial.replace(path)
    return whole


def pretrained(seed: int, steps: int = 700) -> HeadedEncoder:
    """A new network with the seed's pre-trained backbone and a new head; trained once, then read from the cache."""
    net = HeadedEncoder(encoder(), len(CLASSES), "mean")
    net.body.load_state_dict(backbone(seed, steps))
    return net


def teach(net: HeadedEncoder, rng: np.random.Generator, words: np.ndarray, steps: int) -> None:
    """`steps` AdamW steps of all weights, each on 32 new documents on the topics of `words`."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        y = rng.integers(0, len(words), 32)
        ids = torch.from_numpy(np.stack([e.ids for e in documents(rng, words, y, 0.35)])).long()
        h = net.body(input_ids=ids).last_hidden_state
        z = net.classifier(net.pool(h, torch.ones_like(ids, dtype=torch.bool)))
        loss = torch.nn.functional.cross_entropy(z, torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@functools.lru_cache(maxsize=8)
def backbone(seed: int, steps: int) -> dict[str, torch.Tensor]:
    """Weights after `steps` AdamW steps on 24 topics that the federation does not have."""
    path = cache_dir() / f"topics-{seed}-{steps}-v1.safetensors"
    if path.is_file():
        return load_file(path)
    rng = numpy_stream(seed, "pretraining topics")
    words = topics(rng, 24)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = HeadedEncoder(encoder(), len(words), "mean")
    teach(net, rng, words, steps)
    return keep(path, net.body.state_dict())
