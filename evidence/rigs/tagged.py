"""Rig C of the dossiers: sentences with entities of six types, of which each of three clients annotates two."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topics import VOCAB, encoder
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space

TYPES, LEXICON, LENGTH = 6, 16, 20
TAGS = ("O", *(f"type-{i}" for i in range(TYPES)))


@functools.lru_cache(maxsize=8)
def tag_federation(seed: int, clients: int = 3, rows: int = 150) -> Federation:
    """A type has 16 words of its own and 6 % of the positions; client k keeps the tags of types 2k and 2k + 1."""
    rng = numpy_stream(seed, "tags")
    words = rng.permutation(np.arange(20, VOCAB))
    lexicon, rest = words[: TYPES * LEXICON].reshape(TYPES, LEXICON), words[TYPES * LEXICON :]

    def sentence(shown: range) -> Encoded:
        kinds = rng.choice(TYPES + 1, LENGTH, p=[1 - 0.06 * TYPES, *[0.06] * TYPES])  # 0: no entity
        ids = np.where(kinds == 0, rng.choice(rest, LENGTH), lexicon[kinds - 1, rng.integers(0, LEXICON, LENGTH)])
        tags = np.where(np.isin(kinds - 1, np.array(shown)), kinds, 0)
        return Encoded(ids.astype(np.int32), tags.astype(np.int64), LENGTH)

    per, all_ = TYPES // clients, range(TYPES)
    shards = {f"client-{k}": Shard([sentence(range(per * k, per * (k + 1))) for _ in range(rows)])  # type: ignore[list-item]
              for k in range(clients)}
    return Federation(shards, [sentence(all_) for _ in range(200)], "tokens", TAGS)  # type: ignore[list-item, arg-type]


def tagger(seed: int, kind: str, knobs: Mapping[str, Any], rounds: int, local: Mapping[str, Any]) -> dict[str, float]:
    """What a method's tagger scores on fully tagged sentences after its rounds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = HeadedEncoder(encoder(), len(TAGS), "each")
    model = Model(net, None, "tokens", make_space("full"), labels=TAGS, seed=seed)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 10, "batch_size": 16, **local})
    trial = Trial(kind, World(model, tag_federation(seed), spec, seed), dict(knobs)).rounds(rounds)
    return {**next(iter(trial.scores("global").values())), **trial.work()}


def hidden_tags(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 12,
                local: Mapping[str, Any] | None = None) -> Metrics:
    """Macro- and entity-F1 over all six types; `over_marginal`: above the same method that never leaves its warm-up."""
    torch.set_num_threads(1)
    got = tagger(seed, method, knobs or {}, rounds, local or {})
    out = {m: v for m, v in got.items() if m in ("macro_f1", "entity_f1", "loss") or m.startswith("work_")}
    if method == "fedner_tagset":
        marginal = tagger(seed, method, {"warmup_rounds": rounds}, rounds, local or {})
        out["over_marginal"] = out["macro_f1"] - marginal["macro_f1"]
    return out


RIGS = {"hidden_tags": hidden_tags}
