"""Rigs for federated search: docstrings of installed packages as documents that each site keeps."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.methods.registry import make_method
from fedllm.models.load import load_tokenizer
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space

PACKAGES = ("numpy", "torch.nn", "sklearn.cluster", "sklearn.linear_model", "statistics", "scipy.stats",
            "scipy.signal", "scipy.optimize", "itertools", "pathlib", "sklearn.metrics", "torch.nn.functional")
SITES = 6
LONGEST = 1200


@functools.cache
def documents() -> list[dict[str, str]]:
    """(query, text) of every object with a docstring: its first sentence, without the object's name, and the rest."""
    found: dict[str, dict[str, str]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name, thing in sorted(vars(module).items()):
            said = inspect.getdoc(thing) if callable(thing) and not name.startswith("_") else None
            first, _, rest = (said or "").partition("\n\n")
            query = " ".join(w for w in first.split() if name.lower() not in w.lower())
            if len(rest) > 200 and 4 <= len(query.split()) <= 25:
                found.setdefault(query, {"id": f"{package}.{name}", "query": query, "text": rest[:LONGEST]})
    return [found[q] for q in sorted(found)]


def federated_search(method: str, seed: int, *, per_site: int = 80, queries: int = 80, knobs: Any = None
                     ) -> dict[str, float]:
    """`recall`, `ndcg` of the merged list by RRF, by normalized scores (`zscore`) and of a site that searches alone
    (`alone`), with `recall_gain` and `zscore_over_rrf`, the differences; documents are dealt out at random."""
    drawn = numpy_stream(seed, "search").permutation(len(documents()))[: SITES * per_site]
    docs = [documents()[i] for i in drawn]
    rows = [{"prompt": d["query"], "response": "", "relevant": [d["id"]]} for d in docs[:queries]]
    shards = {f"site-{k}": Shard([{"id": d["id"], "text": d["text"]} for d in docs[k::SITES]]) for k in range(SITES)}
    world = World(_any_model(), Federation(shards, rows, "classification", ("any",)))
    out = {}
    for by in ("rrf", "zscore"):
        m = make_method(method, **{"merge_by": by, **(knobs or {})})
        engine = Vectorized((m,), world)
        state = drive(m.round(m.init(world.model), world.infos()), engine)
        engine.commit()
        got = drive(m.examine(state, world.infos(), rows), engine)
        alone = [drive(m.examine(state, [c], rows), engine)["recall10"] for c in world.infos()]
        out |= {f"ndcg_{by}": got["ndcg10"], f"recall_{by}": got["recall10"], "alone": float(np.mean(alone))}
    return {**out, "recall_gain": out["recall_rrf"] - out["alone"],
            "zscore_over_rrf": out["ndcg_zscore"] - out["ndcg_rrf"]}


@functools.cache
def _any_model() -> Model:
    """Search by words asks no model: a small one with random weights stands in the world."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2)
    return Model(HeadedEncoder(BertModel(config), 1, "mean"), tokenizer, "classification", make_space("head"),
                 labels=("any",))


RIGS = {"federated_search": federated_search}
