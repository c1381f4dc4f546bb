"""Adapters block by block: what they come to on a network of six blocks, and what a step of them keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.prompted import KINDS, documents, kinds_of_words, started
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.objective import Objective
from fedllm.local.objectives.chain import Chain
from fedllm.local.objectives.task import Task
from fedllm.local.spec import LocalSpec
from fedllm.models.batch import collate
from fedllm.models.model import Model
from fedllm.spaces import make_space


def chain(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 10, depth: int = 6,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 60 documents each and a pre-trained model of six blocks that knows four of ten words a kind.

    `loss` is the whole model's on 300 documents; ten rounds are two passes of a window of two.
    """
    torch.set_num_threads(1)
    rng, words = numpy_stream(seed, "chain clients"), kinds_of_words(seed)
    shards = {f"client-{k}": Shard(documents(rng, words, rng.integers(0, len(KINDS), 60))) for k in range(4)}
    fed = Federation(shards, documents(rng, words, rng.integers(0, len(KINDS), 300)), "generation")
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    model = started(seed, 4, make_space("adapter", size=12), depth)
    own = {"cka_threshold": 1.0} if method == "chainfed" else {}
    run = Trial(method, World(model, fed, spec, seed, exact_match=False), {**own, **(knobs or {})}).rounds(rounds)
    return {"loss": float(next(iter(run.scores("global").values()))["loss"]), **run.work()}


def chain_memory(method: str, seed: int, *, depth: int = 8, width: int = 2) -> Metrics:
    """`share`: bytes that a step of a window keeps for its backward, the largest over the windows, of those that a step
    through all blocks does; counted tensor by tensor as autograd saves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=depth, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64))
    model = Model(net, None, "generation", make_space("adapter", size=8), seed=seed)
    rng = numpy_stream(seed, "memory")
    rows = [Encoded(ids, np.where(np.arange(48) > 43, ids, -100), 4) for ids in rng.integers(0, 64, (8, 48))]
    whole = kept(model, rows, Task())
    windows = [kept(model, rows, Chain(j, width)) for j in range(depth - width + 1)]
    return {"share": max(windows) / whole, "whole_bytes": float(whole), "window_bytes": float(max(windows))}


def kept(model: Model, rows: list[Encoded], objective: Objective) -> int:
    """Bytes that autograd saves in one forward; a storage that is saved twice counts once, a weight not at all."""
    seen: dict[int, int] = {}
    batch = collate([rows], 0, torch.device("cpu"))
    weights = {t.untyped_storage().data_ptr() for t in model.net.state_dict().values()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    start = objective.start if isinstance(objective, Chain) else 0
    stop = start + objective.width if isinstance(objective, Chain) else None
    inside = {f".{b}." for b in range(start, 99 if stop is None else stop)}
    theta = {n: t.requires_grad_(any(b in n for b in inside)) for n, t in model.initial().items()}
    mine = weights | {t.untyped_storage().data_ptr() for t in theta.values()}
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with model.using([theta], stacked={n: t[None] for n, t in theta.items()}), saving:
        objective.losses(model, batch, {})[0].sum()
    return sum(size for at, size in seen.items() if at not in mine)


RIGS = {"chain": chain, "chain_memory": chain_memory}
