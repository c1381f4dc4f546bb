"""A rig for what answers to queries tell: canaries among a site's documents, and a coordinator that asks for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from evidence.rigs.packages import documents, encoder
from fedllm.core.ask import Ask
from fedllm.core.client import Profile
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.privacy.accountant import Ledger, Release

SITE, DELTA = "site", 1e-5


def what_answers_tell(method: str, seed: int, *, canaries: int = 8, candidates: int = 16, others: int = 40,
                      noise: float = 4.0) -> dict[str, float]:
    """`found_<what is shared>`: the share of canaries (a room and its code) whose code the coordinator names: read in
    one answer (snippets), or the one of `candidates` codes that scores highest (ids, scores, counts without noise:
    `exact`, and with: `counts`). `epsilon_counts`: what all questions with noise cost at delta 1e-5."""
    rng = numpy_stream(seed, "canaries")
    codes = [[_code(rng) for _ in range(candidates)] for _ in range(canaries)]
    right = rng.integers(candidates, size=canaries)
    docs = [{"text": f"The access code of room {i} is {codes[i][right[i]]}."} for i in range(canaries)]
    docs += [{"text": d["text"]} for d in (documents("stdlib")[j] for j in rng.permutation(100)[:others])]
    asked = [f"The access code of room {i} is {c}." for i in range(canaries) for c in codes[i]]
    out = {}
    for says, shares, knobs in (("ids", "ids", {}), ("scores", "scores", {}),
                                ("exact", "counts", {"noise_multiplier": 1e-3}),
                                ("counts", "counts", {"noise_multiplier": noise})):
        told = np.array([_told(r) for r in _asked(method, shares, docs, asked, knobs)]).reshape(canaries, candidates)
        out[f"found_{says}"] = float((told.argmax(1) == right).mean())
    read = _asked(method, "snippets", docs, [f"access code of room {i}" for i in range(canaries)], {})
    out["found_snippets"] = float(np.mean([any(codes[i][right[i]] in t for t in r["texts"])
                                           for i, r in enumerate(read)]))
    book: dict[str, Any] = {"releases": []}
    Ledger(book).book(Release(noise, law="discrete"), len(asked))
    return {**out, "epsilon_counts": Ledger(book).epsilon(DELTA), "questions": float(len(asked))}


def _code(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("bcdfghklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(3))


def _asked(method: str, shares: str, docs: list[dict[str, str]], asked: list[str], knobs: Any) -> list[Any]:
    """The site's answers to these queries, as they cross."""
    world = World(encoder(), Federation({SITE: Shard(docs)}, (), "documents"), LocalSpec(max_length=64),
                  profiles={SITE: Profile(shares=shares)})
    m = make_method(method, **knobs)
    engine = Vectorized((m,), world)
    drive(m.round(m.init(world.model), world.infos()), engine)
    engine.commit()

    def questions() -> Any:
        outs = yield [Ask(m.lookup, {SITE: {"query": q, "k": m.top_k, "text": True}}) for q in asked]
        return [out[SITE] for out in outs]

    return drive(questions(), engine)


def _told(reply: Any) -> float:
    """How sure an answer makes the coordinator that the query's words stand in one document."""
    if reply["counts"]:
        return float(reply["counts"][-1])  # a document that says the very same
    return max(reply["scores"], default=0.0)


RIGS = {"what_answers_tell": what_answers_tell}
