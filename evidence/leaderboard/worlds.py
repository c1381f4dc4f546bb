"""The worlds of the leaderboard: each one recipe, on which every method is tried and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evidence.leaderboard.topics import topics

Rows = Callable[[], Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
class World:
    """Rows, a model, and the work that each method may do; the method, its space and its rates come on top."""

    title: str
    about: str
    recipe: Mapping[str, Any]
    rates: Mapping[str, Sequence[float]]
    """`local.lr` of the tries: of adapters (""), of spaces that hold the network's own weights ("full"), and of plain
    gradient descent ("sgd"), which some methods need."""
    rows: Rows | None = None
    """Makes `data.source`, where it is no file of the shared data."""

    @property
    def metric(self) -> str:
        """By which methods are set in order."""
        return "accuracy" if self.recipe["data"].get("task") == "classification" else "loss"


MINILM = {"name": "minilm", "pooling": "mean"}
LAST = tuple(f"layer.{i}.attention.self.{m}" for i in (4, 5) for m in ("query", "value"))
"""LoRA on the last two of six blocks: half the operations of all six, and it learns more in so few steps."""
RECORD = {"checkpoint_every": 1000}
ASKED = {"prompt": "Question: {prompt}\nAnswer:", "response": " {response}"}
COMMON: Mapping[str, Any] = {"energy": {}, "record": RECORD, "engine": {"kind": "vectorized", "threads": 1}}
"""Of every world: energy is estimated, one thread, and a checkpoint at the end alone."""

SST2 = World(
    "Movie reviews, skewed labels (SST-2 on MiniLM)",
    "Eight clients, labels by Dirichlet 0.3; LoRA of rank 8 on the last two blocks and a head, unless a method needs "
    "another space.",
    {"model": MINILM, **COMMON,
     "data": {"source": "shared:sst2_train.jsonl", "limit": 700, "test": "shared:sst2_dev.jsonl", "test_limit": 160,
              "public": 0.05, "task": "classification", "labels": ["negative", "positive"],
              "fields": {"text": "text", "label": "label"}, "client_test": 0.2,
              "partition": {"kind": "dirichlet", "clients": 8, "alpha": 0.3, "by": "label"}},
     "space": {"name": "lora", "rank": 8, "alpha": 16, "targets": LAST},
     "local": {"optimizer": "adamw", "steps": 2, "batch_size": 6, "max_length": 24},
     "rounds": 10, "evaluate": {"samples": 0}},
    {"": (3e-3, 1e-2, 3e-2), "full": (1e-4, 3e-4, 1e-3), "sgd": (0.03, 0.1, 0.3)})

NEWS = World(
    "News topics, one client a language (MasakhaNEWS on MiniLM)",
    "Eight languages, seven topics; an encoder that has read English alone. LoRA of rank 8 on the last two blocks and "
    "a head, unless a method needs another space.",
    {"model": MINILM, **COMMON,
     "data": {"source": "shared:masakhanews_train.jsonl", "limit": 900, "test": "shared:masakhanews_test.jsonl",
              "test_limit": 160, "public": 0.05, "task": "classification",
              "fields": {"text": "text", "label": "label"}, "client_test": 0.2,
              "partition": {"kind": "by_key", "key": "lang"}},
     "space": {"name": "lora", "rank": 8, "alpha": 16, "targets": LAST},
     "local": {"optimizer": "adamw", "steps": 4, "batch_size": 4, "max_length": 24},
     "rounds": 4, "evaluate": {"samples": 0}},
    {"": (3e-3, 1e-2, 3e-2), "full": (1e-4, 3e-4, 1e-3), "sgd": (0.03, 0.1, 0.3)})

INSTRUCTIONS = World(
    "Instructions, eight topics of unequal sizes (the embedded model)",
    "Code, mathematics, reviews, news and more, a client each, from 18 to 150 rows; the embedded model of 2.2 M "
    "weights has read office records alone.",
    {"model": "embedded", **COMMON,
     "data": {"test": 0.15, "public": 0.05, "client_test": 0.2, "template": ASKED,
              "partition": {"kind": "by_key", "key": "topic"}},
     "space": {"name": "lora", "rank": 16, "alpha": 32},
     "local": {"optimizer": "adamw", "steps": 4, "batch_size": 2, "max_length": 64},
     "rounds": 6, "evaluate": {"exact_match": False, "samples": 0}},
    {"": (3e-3, 1e-2, 3e-2), "full": (1e-3, 3e-3, 1e-2), "sgd": (0.1, 0.3, 1.0)}, topics)

SMOLLM2 = World(
    "Instructions, four topics of unequal sizes (SmolLM2-135M-Instruct)",
    "Code, mathematics, reviews and news, a client each; very small: three rounds of two steps of two short rows.",
    {"model": "smollm2", **COMMON, "engine": {**COMMON["engine"], "batch_tokens": 2048},
     "data": {"limit": 120, "test": 0.15, "public": 0.05, "client_test": 0.2, "template": ASKED,
              "partition": {"kind": "by_key", "key": "topic"}},
     "space": {"name": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
     "local": {"optimizer": "adamw", "steps": 2, "batch_size": 2, "max_length": 64},
     "rounds": 3, "evaluate": {"exact_match": False, "samples": 0}},
    {"": (1e-3, 3e-3, 1e-2), "full": (1e-5, 3e-5, 1e-4), "sgd": (0.03, 0.1, 0.3)}, lambda: topics(4))

WORLDS: Mapping[str, World] = {"sst2": SST2, "news": NEWS, "instructions": INSTRUCTIONS, "smollm2": SMOLLM2}

FIRST = ("local_only", "fedit", "centralized", "fedavg", "fedprox", "scaffold", "fedadam",
         "ffa_lora", "rolora", "fedsa_lora", "fed_sb", "lora_fair", "florist", "fedex_lora", "flora_stacking",
         "flexlora", "hetlora", "slora", "fedpcl", "pfedlora", "fedlora_wu", "fedkc", "raffm", "fedbrb", "fedsdr",
         "fedsd", "chainfed", "lp_fl", "feddat", "cefhri", "fedner_tagset", "fed_dpo", "fed_dpo_personal",
         "fedbiscuit", "ffm_lifecycle", "fed_unlearn", "shapley")
"""Measured before the others, which follow by name: baselines, then the family of methods for clients that differ."""
