"""A small language model with biases that was pre-trained on documents and their kind, and clients with few labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from evidence.rigs.prompted import KINDS, documents, kinds_of_words, tokenizer
from evidence.rigs.topics import cache_dir, keep
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space

CLIENTS, EACH, KNOWN = 8, 60, 4


def net(seed: int) -> GPT2LMHeadModel:
    """A fresh GPT-2 of two blocks of width 48, with its biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer()), n_positions=64, n_embd=48, n_layer=2, n_head=4, n_inner=96, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0))


@functools.lru_cache(maxsize=4)
def pretrained(seed: int, steps: int = 300) -> dict[str, torch.Tensor]:
    """Weights after documents in which four of the ten words of each kind tell it; trained once, then read."""
    path = cache_dir() / f"few-shot-{seed}-{steps}-v1.safetensors"
    if path.is_file():
        return load_file(path)
    rng = numpy_stream(seed, "few-shot pretraining")
    model = Model(net(seed), tokenizer(), "generation", make_space("full"), seed=seed)
    rows = documents(rng, kinds_of_words(seed)[:, :KNOWN], rng.integers(0, len(KINDS), 1500))
    coded = encode_rows(rows, model.tokenizer, "generation", 64)
    spec = LocalSpec(lr=3e-3, steps=steps, batch_size=32, schedule="cosine", clip_norm=1.0)
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
    theta = run_fits([Fit("pretraining", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    return keep(path, theta)


def few_shot(method: str, seed: int, *, space: Mapping[str, Any] | None = None, knobs: Mapping[str, Any] | None = None,
             rounds: int = 10, local: Mapping[str, Any] | None = None) -> Metrics:
    """Eight clients with 60 documents of four kinds, of which four clients have four labels each; biases are trained.

    `accuracy` of the shared model on 400 documents, `before` at the start; `right_first` and `right_last` the share of
    pseudo-labels that was right in the first and the last round, `up_bytes` of the longest reply.
    """
    torch.set_num_threads(1)
    rng, words, shards = numpy_stream(seed, "few-shot clients"), kinds_of_words(seed), {}
    for k in range(CLIENTS):  # a holder's labels are one of each kind
        kinds = np.concatenate([np.arange(len(KINDS)), rng.integers(0, len(KINDS), EACH - len(KINDS))])
        shards[f"client-{k}"] = Shard(documents(rng, words, kinds))
    fed = Federation(shards, documents(rng, words, rng.integers(0, len(KINDS), 400)), "generation")
    weights, own = net(seed), dict(space or {"name": "bias"})
    weights.load_state_dict(pretrained(seed), strict=False)
    model = Model(weights, tokenizer(), "generation", make_space(own.pop("name"), **own), seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 8, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    mine = {"verbalizer": KINDS, "labelled": 4, "embed": "tfidf", **(knobs or {})}
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), mine)
    before = next(iter(run.scores("global").values()))["label_accuracy"]
    run.rounds(rounds)
    told = run.method.report(run.state)
    sent = [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    return {"accuracy": float(next(iter(run.scores("global").values()))["label_accuracy"]), "before": float(before),
            "right_first": told["right"][0], "right_last": told["right"][-1], "up_bytes": float(max(sent)),
            "pseudo": float(sum(told["pseudo"].values())), **run.work()}


RIGS = {"few_shot": few_shot}
