"""Text under token-wise privacy: what a draw gives away, and how useful a far model's draft of it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import Profile
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.dp_tokens import Table, refuted
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.privacy.dp_text import DPText
from fedllm.spaces import make_space

TOPICS, WORDS, PICKED = 6, 8, 8
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SAID = [f"t{k}w{i}" for k in range(TOPICS) for i in range(WORDS)]
REMEDIES = [f"remedy{k}" for k in range(TOPICS)]
FIRST = len(SPECIAL)


def made_table(seed: int, words: int = 200, d: int = 16, topics: int = 20) -> Table:
    """Embeddings of words that lie in topics, as trained ones do."""
    rng = numpy_stream(seed, "table")
    x = rng.normal(0, 1, (topics, d))[np.arange(words) % topics] + rng.normal(0, 0.7, (words, d))
    return Table(np.arange(words), x)


def dp_tokens(layer: str, seed: int, *, epsilon: float = 12.0, exact: bool = True, draws: int = 16000) -> Metrics:
    """`kept`: the mean probability that a token stays; `spent`: the worst log-ratio over epsilon; of RANTEXT what its
    draws at 3 refute, over 3, and the smallest step of the share that it keeps from 0.5 to 30 (`rantext_step`)."""
    table, rng = made_table(seed), numpy_stream(seed, "draws")
    scale = table.scale(epsilon, exact)
    out = {"kept": float(np.mean([table.likely(i, scale)[i] for i in range(len(table.tokens))])),
           "spent": table.worst(scale) / epsilon}
    ids = rng.integers(0, len(table.tokens), 1500)
    shares = [float(np.mean(np.array(table.rantext(ids, e, rng)[0]) == ids)) for e in (0.5, 3.0, 10.0, 30.0)]
    far = int(np.argmin(table.unit @ table.unit[0]))
    one, other = (np.array(table.rantext([t] * draws, 3.0, rng)[0]) for t in (0, far))
    return {**out, "rantext_step": float(np.diff(shares).min()),
            "rantext_refutes": refuted(one, other, len(table.tokens)) / 3.0}


def reader() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = [*SPECIAL, *SAID, *REMEDIES]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids of eight words each, of which seven are of one topic; the topics)."""
    topic = rng.integers(0, TOPICS, count)
    of = np.repeat(topic[:, None], PICKED, 1)
    of[np.arange(count), rng.integers(0, PICKED, count)] = rng.integers(0, TOPICS, count)
    return FIRST + of * WORDS + rng.integers(0, WORDS, (count, PICKED)), topic


def learner(seed: int, width: int) -> Model:
    """Two blocks with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(SPECIAL) + len(SAID) + TOPICS, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return Model(net, reader(), "generation", make_space("full"), seed=seed)


def taught(model: Model, ids: np.ndarray, seed: int, steps: int) -> Model:
    """The model with weights that learned these sequences."""
    labels = ids.astype(np.int64)
    labels[:, 0] = -100
    rows = [Encoded(i.astype(np.int32), y, len(i) - 1) for i, y in zip(ids, labels, strict=True)]
    rng = numpy_stream(seed, "taught")
    spec = LocalSpec(lr=5e-3, steps=steps, batch_size=32)
    plan = [rng.choice(len(rows), 32, replace=False) for _ in range(steps)]
    theta = run_fits([Fit("owner", model, model.initial(), None, rows, plan, spec)], Limits())[0].theta
    model.net.load_state_dict(theta, strict=False)
    return model


@functools.lru_cache(maxsize=2)
def pair(seed: int) -> tuple[Model, Model]:
    """(the far model, which knows every topic's remedy; the small one, which knows how to take up a draft)."""
    rng = numpy_stream(seed, "pair")
    ids, topic = documents(rng, 400)
    start = np.ones((len(ids), 1), np.int64)
    remedy = FIRST + len(SAID) + topic[:, None]
    some = FIRST + len(SAID) + rng.integers(0, TOPICS, (len(ids), 1))  # its drafts have nothing to do with the document
    far = taught(learner(seed, 48), np.concatenate([start, ids, remedy], 1), seed, 150)
    near = taught(learner(seed + 1, 32), np.concatenate([start, ids, some, some], 1), seed + 1, 200)
    return far, near


def inferdpt(method: str, seed: int, *, token_epsilon: float | None = None, knobs: Mapping[str, Any] | None = None,
             rows: int = 30) -> Metrics:
    """Two clients with documents whose remedy only the far model knows; `exact_match` of the answers at home.

    `off_ledger`: what the ledger says of a client, less its tokens times the epsilon of one.
    """
    torch.set_num_threads(1)
    far, near = pair(seed)
    rng, shards = numpy_stream(seed, "documents"), {}
    for k in range(2):
        ids, topic = documents(rng, rows)
        shards[f"client-{k}"] = Shard([{"prompt": " ".join(SAID[i - FIRST] for i in row), "response": REMEDIES[t]}
                                       for row, t in zip(ids, topic, strict=True)])
    held = Shelf({"near": lambda: near})
    world = World(far, Federation(shards, [], "generation"), LocalSpec(), seed, exact_match=False, held=held,
                  profiles={c: Profile(model="near") for c in shards})
    layers = [] if token_epsilon is None else [DPText(token_epsilon=token_epsilon, seed=seed)]
    run = Trial(method, world, {"max_new_tokens": 1, **(knobs or {})}, layers=layers).rounds(1)
    score = float(np.mean([s["exact_match"] for s in run.scores("local").values()]))
    said: Any = layers[0].statement(run.states[0])["clients"] if layers else {}
    off = max((abs(e - rows * PICKED * (token_epsilon or 0)) for e in said.values()), default=0.0)
    return {"exact_match": score, "off_ledger": off, "epsilon": max(said.values(), default=0.0), **run.work()}


RIGS = {"dp_tokens": dp_tokens, "inferdpt": inferdpt}
