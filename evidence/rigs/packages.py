"""A rig for federated search among unlike sites: eight packages' docstrings, with rankers whose scores say nothing of
one another."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models import retrieval as rt
from fedllm.models import routing
from fedllm.models.load import load_model
from fedllm.spaces import make_space

SITES: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy", "numpy.linalg", "numpy.ma"), "stats": ("scipy.stats",), "signal": ("scipy.signal",),
    "optimize": ("scipy.optimize",), "networkx": ("networkx",), "torch": ("torch.nn", "torch.nn.functional"),
    "sklearn": ("sklearn.cluster", "sklearn.linear_model", "sklearn.metrics", "sklearn.ensemble",
                "sklearn.preprocessing"),
    "stdlib": ("argparse", "shutil", "statistics", "pathlib", "collections", "itertools", "functools", "random",
               "tempfile", "subprocess", "unittest", "logging", "urllib.parse", "http.client", "zipfile", "tarfile",
               "datetime", "decimal", "fractions", "textwrap", "string", "inspect", "ast", "asyncio", "threading")}
LONGEST = 600


@functools.cache
def documents(site: str) -> tuple[dict[str, str], ...]:
    """(query, text) of each object of the site's packages: the first sentence of its docstring, without its name, and
    the rest. Classes show their methods, too."""
    found: dict[str, dict[str, str]] = {}
    for package in SITES[site]:
        for path, thing in _objects(importlib.import_module(package)):
            said = inspect.getdoc(thing) or ""
            first, _, rest = said.partition("\n\n")
            query = " ".join(w for w in first.split() if path.rpartition(".")[2].lower() not in w.lower())
            if len(rest) > 100 and 4 <= len(query.split()) <= 25:
                found.setdefault(query, {"id": f"{package}.{path}", "query": query, "text": rest[:LONGEST]})
    return tuple(found[q] for q in sorted(found))


def _objects(module: Any) -> list[tuple[str, Any]]:
    out = []
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not callable(thing):
            continue
        out.append((name, thing))
        if inspect.isclass(thing):
            out += [(f"{name}.{n}", t) for n, t in sorted(vars(thing).items()) if callable(t) and n[0] != "_"]
    return out


@functools.cache
def encoder() -> Any:
    """MiniLM, for its vectors."""
    return load_model("minilm", "documents", make_space("head"))


def federated_packages(method: str, seed: int, *, per_site: int = 32, queries: int = 40, every: bool = False
                       ) -> dict[str, float]:
    """nDCG@10 of `naive` (round-robin over all sites), of `selected` (three sites by ReDDE, scores normalized over all
    documents), and of `minmax` and `rerank` over the same three; with `every` also `rrf` and `zscore` over all sites,
    and `cori`. `redde`, `centroids`, `learned`: how often the first site is the document's own. `moved`: the share of
    naive's passages that the chosen sites send."""
    shards, rows, home = _drawn(seed, per_site, queries)
    world = World(encoder(), Federation(shards, (), "documents"), LocalSpec(max_length=96))
    base = {"vectors_at": tuple(list(shards)[::2]), "sample": 15, "top_sites": 3}  # every other site ranks by words
    arms = {"naive": {"merge_by": "round_robin"}, "selected": {"select_by": "redde"},
            **{by: {"merge_by": by, "select_by": "redde"} for by in ("minmax", "rerank")},
            **({"rrf": {"merge_by": "rrf"}, "zscore": {}, "cori": {"merge_by": "cori", "select_by": "redde"}}
               if every else {})}
    memory: dict[str, Any] = {}
    out: dict[str, float] = {}
    for name, knobs in arms.items():
        m, engine, state = _indexed(method, base | knobs, world, memory)
        got = drive(m.search([r["text"] for r in rows], world.infos(), state), engine)
        out[name] = float(np.mean([rt.ndcg([p.id for p in found], rt.relevant(row), 10)
                                   for (found, _, _), row in zip(got, rows, strict=True)]))
        out |= {"moved": np.mean([len(asked) for _, asked, _ in got]) / len(shards)} if name == "selected" else {}
    vectors = drive(m._vectors([r["text"] for r in rows]), engine)
    own = [home[row["relevant"][0]] for row in rows]
    for by in ("redde", "centroids", "learned"):
        m, _, state = _indexed(method, base | {"select_by": by}, world, memory)
        out[by] = float(np.mean([routing.best(m._values(v, state), 1) == [s] for v, s in zip(vectors, own,
                                                                                            strict=True)]))
    return {**out, "redde_over_chance": out["redde"] * len(shards), "selected_over_naive": out["selected"] -
            out["naive"], "rerank_over_minmax": out["rerank"] - out["minmax"]}


def _indexed(method: str, knobs: Mapping[str, Any], world: World, memory: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The method after its round; the index is made once, and found to be up to date by those that come after."""
    m = make_method(method, **knobs)
    engine = Vectorized((m,), world)
    engine.memory = copy.copy(memory)
    state = drive(m.round(m.init(world.model), world.infos()), engine)
    engine.commit()
    memory.update(engine.memory)
    return m, engine, state


def _drawn(seed: int, per_site: int, queries: int) -> tuple[dict[str, Shard], list[dict[str, Any]], dict[str, str]]:
    rng, shards, asked, home = numpy_stream(seed, "packages"), {}, [], {}
    for site in SITES:
        mine = [documents(site)[i] for i in rng.permutation(len(documents(site)))[:per_site]]
        shards[site] = Shard([{"id": d["id"], "text": d["text"]} for d in mine])
        home |= {d["id"]: site for d in mine}
        asked += mine[: queries // len(SITES)]
    return shards, [{"text": d["query"], "relevant": [d["id"]]} for d in asked], home


RIGS = {"federated_packages": federated_packages}
