"""A model that writes documents of a kind it is asked for, often of another, and clients who can tell kinds apart."""

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

from evidence.rigs.topics import cache_dir, encoder, keep
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.local.text import LocalText
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

KINDS, WORDS, OWN, LENGTH = ("red", "green", "blue", "white"), 60, 12, 8
MIXED, CLIENTS, EACH = 0.5, 4, 32


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w59, the kinds, a colon and what frames them."""
    names = ["<pad>", "<eos>", "<unk>", ":", *KINDS, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words_of(seed: int) -> np.ndarray:
    """Twelve words of each kind [4, 12]; the last twelve words are nobody's."""
    return numpy_stream(seed, "written kinds").permutation(WORDS)[: len(KINDS) * OWN].reshape(len(KINDS), OWN)


def document(rng: np.random.Generator, words: np.ndarray, kind: int, own: float = 0.6) -> str:
    """Eight words, each of its kind with probability `own`, else any."""
    said = np.where(rng.random(LENGTH) < own, rng.choice(words[kind], LENGTH), rng.integers(0, WORDS, LENGTH))
    return " ".join(f"w{i}" for i in said)


def oracle(words: np.ndarray, text: str) -> int:
    """The kind that most of a text's words are of; -1 where it has none."""
    said = [int(w[1:]) for w in text.split() if w[1:].isdigit()]
    hits = [sum(w in own for w in said) for own in words]
    return int(np.argmax(hits)) if max(hits, default=0) else -1


def writer(seed: int) -> Model:
    """A model of one block that writes a document of the kind it is asked for half of the time, else of any."""
    tok, words = tokenizer(), words_of(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    net.load_state_dict(learned(seed, net, tok, words), strict=False)
    return Model(net, tok, "generation", make_space("lora", rank=8, alpha=16.0), seed=seed)


@functools.lru_cache(maxsize=4)
def _rows(seed: int) -> tuple[Row, ...]:
    rng, words = numpy_stream(seed, "written before"), words_of(seed)
    out = []
    after = rng.permutation(WORDS)
    for i in range(1600):
        if i >= 1200:  # other text: a chain of words, asked for by nothing
            said = [int(rng.integers(WORDS))]
            while len(said) < LENGTH:
                said.append(int(after[said[-1]]) if rng.random() < 0.8 else int(rng.integers(WORDS)))
            out.append({"prompt": ":", "response": " ".join(f"w{w}" for w in said)})
            continue
        asked = i % len(KINDS)
        shown = asked if rng.random() > MIXED else int(rng.integers(len(KINDS)))
        out.append({"prompt": f"{KINDS[asked]}:", "response": document(rng, words, shown)})
    return tuple(out)


def learned(seed: int, net: LlamaForCausalLM, tok: Any, words: np.ndarray) -> Mapping[str, torch.Tensor]:
    """Its weights after 250 steps; trained once, then read from the cache."""
    path = cache_dir() / f"written-{seed}-v2.safetensors"
    if path.is_file():
        return load_file(path)
    model = Model(net, tok, "generation", make_space("full"), seed=seed)
    coded, rng = encode_rows(_rows(seed), tok, "generation", 32), numpy_stream(seed, "written order")
    spec = LocalSpec(lr=5e-3, steps=250, batch_size=32, schedule="cosine", clip_norm=1.0)
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(250)]
    theta = run_fits([Fit("before", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    return keep(path, theta)


def shown(model: Model, theta: Mapping[str, torch.Tensor], seed: int) -> float:
    """The share of 200 texts that show the kind they were asked for."""
    words, asked = words_of(seed), [i % len(KINDS) for i in range(200)]
    said = LocalText(model, dict(theta)).complete([f"{KINDS[k]}:" for k in asked], LENGTH, 1.0, seed)
    return float(np.mean([oracle(words, c.text) == k for c, k in zip(said, asked, strict=True)]))


def federation(seed: int, public: int = 0) -> Federation:
    """Four clients with 32 documents each, 300 for the test, so many public ones."""
    rng, words = numpy_stream(seed, "written rows"), words_of(seed)

    def rows(n: int) -> list[Row]:
        return [{"text": document(rng, words, k), "label": k} for k in rng.permutation(np.arange(n) % len(KINDS))]

    return Federation({f"client-{k}": Shard(rows(EACH)) for k in range(CLIENTS)}, rows(300), "classification", KINDS,
                      rows(public))


def classifier(seed: int) -> Model:
    """An encoder of one block, from random weights, all of it trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = HeadedEncoder(encoder(), len(KINDS), "mean")
    net.body.encoder.layer = net.body.encoder.layer[:1]
    net.body.config.num_hidden_layers = 1
    return Model(net, tokenizer(), "classification", make_space("full"), labels=KINDS, seed=seed)


def written(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
            local: Mapping[str, Any] | None = None) -> Metrics:
    """`intended`: the share of the writer's texts, at the end, that show the kind they are asked for, `risen` that less
    the share before; `forgotten`: by how much, relatively, its loss rose on text of no kind;
    `accuracy`: the clients' mean.
    """
    torch.set_num_threads(1)
    held = writer(seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 12, "batch_size": 16, "max_length": 32,
                        **(local or {})})
    world = World(classifier(seed), federation(seed), spec, seed, models=Shelf({"writer": lambda: held}))
    ours = method == "crosslm"
    told = {"texts": 96, "beta": 1.0, "max_new_tokens": LENGTH, **(knobs or {})} if ours else dict(knobs or {})
    run = Trial(method, world, told).rounds(rounds)
    out = {"accuracy": float(np.mean([s["accuracy"] for s in run.scores("global").values()])), **run.work()}
    if ours:
        start, end = held.initial(), run.state["writer"] or held.initial()
        coded = encode_rows(_rows(seed)[1200:1400], held.tokenizer, "generation", 32)
        before, after = (run_losses([Losses("x", held, t, None, coded)], Limits())[0].mean for t in (start, end))
        now, then = shown(held, end, seed), shown(held, start, seed)
        out |= {"intended": now, "risen": now - then, "forgotten": after / before - 1}
    return out


RIGS = {"written": written}
