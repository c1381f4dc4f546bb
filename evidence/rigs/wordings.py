"""One answer in as many wordings as there are clients, rewrites in one wording, and some of them wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.prompted import KINDS, documents, kinds_of_words, started
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.objectives.verbalized import Said
from fedllm.local.requests import Limits, Measure
from fedllm.local.spec import LocalSpec
from fedllm.spaces import make_space

LORA = {"name": "lora", "rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}


def wordings(method: str, seed: int, *, wrong: float = 0.0, space: Mapping[str, Any] | None = None,
             knobs: Mapping[str, Any] | None = None, rounds: int = 8,
             local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 60 documents each: client k puts two words of its own behind the answer, rewrites (of which a
    share is `wrong`) have it plain. `loss` and `accuracy` of the shared model on 300 plain answers."""
    torch.set_num_threads(1)
    rng, words = numpy_stream(seed, "wordings"), kinds_of_words(seed)
    shards = {}
    for k in range(4):
        rows: list[Row] = []
        for row in documents(rng, words, rng.integers(0, len(KINDS), 60)):
            said = row["response"]
            other = str(rng.choice([x for x in KINDS if x != said])) if rng.random() < wrong else said
            rows.append({**row, "response": f"{said} w{2 * k} w{2 * k + 1}", "rewritten": other})
        shards[f"client-{k}"] = Shard(rows)
    test = documents(rng, words, rng.integers(0, len(KINDS), 300))
    made = dict(space or LORA)
    model = started(seed, 4, make_space(made.pop("name"), **made))
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    own = {"rewriter": "field"} if method in ("fedsd", "fedsdr") else {}
    run = Trial(method, World(model, Federation(shards, test, "generation"), spec, seed, exact_match=False),
                {**own, **(knobs or {})}).rounds(rounds)
    theta = run.method.served(run.state)[0]
    coded = encode_rows(test, model.tokenizer, "generation", 64)
    ids = model.tokenizer.convert_tokens_to_ids(list(KINDS))  # type: ignore[union-attr]
    z = run_measures([Measure("x", model, theta, None, coded, fn=Said(tuple(ids)))], Limits())[0]
    right = float(np.mean([KINDS[i] == row["response"] for i, row in zip(z.argmax(1), test, strict=True)]))
    return {"accuracy": right, "loss": float(next(iter(run.scores("global").values()))["loss"]), **run.work()}


RIGS = {"wordings": wordings}
