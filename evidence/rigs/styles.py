"""Two styles of text: articles, of which there are plenty, and chat, which clients have; a large model knows both."""

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
from fedllm.core.client import SERVER
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.gate.made import read
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

WORDS, LENGTH = 48, 10
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[chat]", "[likely?]", "yes", "no", "©"]
FIRST = len(SPECIAL)
ASKS = {"generate_ask": "[chat]", "filter_ask": "{text} [likely?]", "transform_ask": "{text} [chat]"}


def reader() -> PreTrainedTokenizerFast:
    """One token a word or a mark."""
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def texts(rng: np.random.Generator, after: np.ndarray, count: int) -> np.ndarray:
    """Walks of a chain in which each word has three successors [count, LENGTH], as words' numbers."""
    ids = np.zeros((count, LENGTH), np.int64)
    ids[:, 0] = rng.integers(0, WORDS, count)
    for t in range(1, LENGTH):
        ids[:, t] = after[ids[:, t - 1], np.minimum(2, rng.geometric(0.5, count) - 1)]
    return ids


def said(ids: np.ndarray) -> list[str]:
    """The same in words."""
    return [" ".join(f"w{i}" for i in row) for row in ids]


def net(seed: int, width: int) -> LlamaForCausalLM:
    """Two blocks with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=FIRST + WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2))


def chains(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Successors of words [WORDS, 3] in articles, and in chat."""
    rng = numpy_stream(seed, "styles chains")
    return rng.integers(0, WORDS, (WORDS, 3)), rng.integers(0, WORDS, (WORDS, 3))


@functools.lru_cache(maxsize=2)
def large(seed: int, steps: int = 160) -> Model:
    """The large model: it goes on with either style, writes chat behind its mark, and tells which one a text is."""
    model = Model(net(seed, 64), reader(), "generation", make_space("full"), seed=seed, name="large")
    rng = numpy_stream(seed, "large")
    article, chat = chains(seed)
    rows = []
    for _ in range(150):
        one, other = (texts(rng, c, 1)[0] + FIRST for c in (article, chat))
        rows += [[1, *one], [1, 4, *other, 2], [1, *one, 5, 7, 2], [1, *other, 5, 6, 2]]
    coded = []
    for row in rows:
        labels = np.array(row, np.int64)
        labels[0] = -100
        coded.append(Encoded(np.array(row, np.int32), labels, len(row) - 1))
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
    spec = LocalSpec(lr=5e-3, batch_size=32, schedule="cosine")
    theta = run_fits([Fit("large", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    model.net.load_state_dict(theta, strict=False)
    return model


def styles(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 2,
           local: Mapping[str, Any] | None = None) -> Metrics:
    """Three clients with chat; public rows are articles, one in ten chat, some with a notice of copyright.

    `before`: the small model's loss on fresh chat when the server has trained it, `loss` after the rounds; `notices`:
    the share of planted notices that is still in what the server trained on.
    """
    torch.set_num_threads(1)
    rng, (article, chat) = numpy_stream(seed, "styles"), chains(seed)
    rows = lambda after, n: [{"prompt": "", "response": t} for t in said(texts(rng, after, n))]  # noqa: E731
    public = [*rows(article, 270), *rows(chat, 30)]
    for row in public[:15]:
        row["response"] = f"© {row['response']}"
    shards = {f"client-{k}": Shard(rows(chat, 24)) for k in range(3)}
    fed = Federation(shards, rows(chat, 120), "generation", (), public)
    small = Model(net(seed + 1, 32), reader(), "generation", make_space("full"), seed=seed, name="small")
    spec = LocalSpec(**{"lr": 3e-3, "steps": 5, "batch_size": 16, "max_length": 16, **(local or {})})
    world = World(small, fed, spec, seed, exact_match=False, models=Shelf({"large": lambda: large(seed)}))
    told = {**ASKS, "generator": "large", "topics": ("chat",), "n_synth": 150, "warm_steps": 60, "dedupe": 1.0,
            "max_new_tokens": LENGTH, **(knobs or {})}
    run = Trial(method, world, {k: v for k, v in told.items() if k in METHODS[method].knobs()})
    seen: list[str] = []
    start: list[Any] = []
    work = run.engine.work

    def watched(job: Any, submit: Any) -> Any:
        reply = work(job, submit)
        if job.fold.ask.phase.endswith("written"):
            seen.extend(read(t)[0]["response"] for t in reply["rows"])
        if job.fold.ask.phase.endswith("warmed"):
            start.append({k.removeprefix("theta/"): v for k, v in reply.items() if k.startswith("theta/")})
        return reply

    run.engine.work = watched
    run.rounds(rounds)

    def loss(theta: Any) -> float:
        return run_losses([Losses("x", small, theta, None, world.encoded(SERVER, "test"))], world.limits)[0].mean

    return {"before": loss(start[0]), "loss": loss(run.state["theta"]),
            "notices": sum("©" in t for t in seen) / 15, "rows": float(len(seen)), **run.work()}


RIGS = {"styles": styles}
