"""FeB4RAG's choice of engines, against its published relevance: `python -m evidence.feb4rag`.

790 requests, 16 engines, and for each pair the value that the benchmark's authors worked out from the engine's judged
top 10 (ceil of 100 times their mean weight; Wang, Khramtsova, Zhuang and Zuccon, SIGIR 2024). The requests lie in
FEDLLM_DATA (feb4rag/), the documents are not public here. So lists are not merged: what a list of k engines' top 10 is
worth, taken in turn, is the mean of their values, and that is counted beside all 16 in turn (the paper's naive-fed).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence.rigs.packages import encoder, federated_packages
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.sources import resolve
from fedllm.local.forward import run_embeds
from fedllm.local.generate import prompt_ids
from fedllm.local.requests import Embed, Limits
from fedllm.models import retrieval as rt
from fedllm.models import routing
from fedllm.models.indexing import unit

PAGE = Path(__file__).parents[1] / "docs" / "results" / "feb4rag.md"
FOLDS = 5
SOME = 3
"""Engines that a request is sent to."""
Values = Mapping[str, float]


def requests(folder: Path) -> tuple[list[str], list[str], list[Values], dict[str, str]]:
    """(ids, texts, the values of all engines for each, the engines' descriptions)."""
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    with (folder / "engines.csv").open(newline="", encoding="utf-8-sig") as file:
        told = {row["name"]: row["Description"] for row in csv.DictReader(file)}
    values: dict[str, dict[str, float]] = {row["_id"]: dict.fromkeys(told, 0.0) for row in rows}
    for line in (folder / "BEIR-QRELS-RS.txt").read_text().splitlines():
        rid, _, engine, grade = line.split()
        values[rid][engine] = float(grade)
    return [r["_id"] for r in rows], [r["text"] for r in rows], [values[r["_id"]] for r in rows], told


def resource_value(labels: Sequence[int], weights: Sequence[float] = (0.0, 0.25, 0.5, 1.0), top: int = 10) -> int:
    """An engine's value for a request by the labels (0 to 3) of its results: ceil(100 * sum of weights / 10)."""
    hundreds = sum(round(100 * weights[label]) for label in labels[:top])
    return -(-hundreds // top)


def embedded(texts: Sequence[str]) -> torch.Tensor:
    """MiniLM's vectors of length 1."""
    rows = [Encoded(r, 0, 0) for r in prompt_ids(list(texts), encoder().tokenizer, 128)]
    return unit(run_embeds([Embed("feb4rag", encoder(), {}, None, rows)], Limits())[0])


def orders(texts: Sequence[str], values: Sequence[Values], told: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """Route -> for each request the engines, the best first. What is learned is learned on the other folds."""
    engines = list(told)
    x, d = embedded(texts), embedded([told[e] or e for e in engines])
    y = torch.tensor([[v[e] for e in engines] for v in values], dtype=torch.float64)
    fold = numpy_stream(0, "feb4rag").permutation(len(texts)) % FOLDS
    prior, chart = torch.zeros_like(y), torch.zeros_like(y)
    for f in range(FOLDS):
        here, there = torch.from_numpy(fold == f), torch.from_numpy(fold != f)
        prior[here] = y[there].mean(0)
        weights = routing.fit(x[there], y[there])  # each engine's column is its own: it could fit it by itself
        chart[here] = torch.cat([x[here].double(), torch.ones(int(here.sum()), 1, dtype=torch.float64)], 1) @ weights
    rng = numpy_stream(0, "feb4rag", "chance")
    ranked = lambda scores: [routing.best(dict(zip(engines, row.tolist(), strict=True)), len(engines))  # noqa: E731
                             for row in scores]
    return {"fixed order (naive-fed's)": [engines] * len(texts),
            "chance": [[engines[i] for i in rng.permutation(len(engines))] for _ in texts],
            "description": ranked(x.double() @ d.double().T), "mean value (no request)": ranked(prior),
            "learned (ridge on the request's vector)": ranked(chart), "oracle": ranked(y)}


FIGURES: Mapping[str, Callable[[Sequence[str], Values], float | None]] = {
    "nP@1": lambda o, v: rt.np_at(o, v, 1), "nP@5": lambda o, v: rt.np_at(o, v, 5),
    "nDCG@10": lambda o, v: rt.ndcg(o, v, 10), f"P@{SOME}": lambda o, v: rt.precision(o, v, SOME),
    f"R@{SOME}": lambda o, v: rt.recall(o, v, SOME),
    f"value of the {SOME} chosen": lambda o, v: sum(v[e] for e in o[:SOME]) / SOME,
    "value of all 16 in turn": lambda o, v: sum(v.values()) / len(v)}


def figures(order: Sequence[Sequence[str]], values: Sequence[Values]) -> dict[str, np.ndarray]:
    """Each figure of each request; NaN where no engine is of any value, so that none could be right."""
    return {name: np.array([np.nan if (got := fn(o, v)) is None or not any(v.values()) else got
                            for o, v in zip(order, values, strict=True)], float) for name, fn in FIGURES.items()}


def table(found: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The routes' figures, means over requests."""
    lines = [f"| route | {' | '.join(FIGURES)} |", "|---|" + "---|" * len(FIGURES)]
    return lines + [f"| {name} | " + " | ".join(f"{np.nanmean(got[f]):.3f}" if "value" not in f else
                                                f"{np.nanmean(got[f]):.1f}" for f in FIGURES) + " |"
                    for name, got in found.items()]


def over(a: np.ndarray, b: np.ndarray) -> str:
    """The mean difference over requests with its 95 % interval."""
    d = (a - b)[~np.isnan(a - b)]
    return f"{d.mean():+.3f} (95 %: {d.mean() - 1.96 * d.std(ddof=1) / len(d) ** 0.5:+.3f} to " \
           f"{d.mean() + 1.96 * d.std(ddof=1) / len(d) ** 0.5:+.3f})"


def packages(seeds: int) -> list[str]:
    """nDCG@10 over eight packages' docstrings, and how often the first site is the right one; means over seeds."""
    got = [federated_packages("fed_rag", seed, every=True) for seed in range(seeds)]
    mean = lambda key: float(np.mean([g[key] for g in got]))  # noqa: E731
    ways = {"round-robin over all eight (naive)": "naive", "RRF over all": "rrf", "normalized over all": "zscore",
            "three by ReDDE, min-max of the lists": "minmax", "three by ReDDE, normalized over all their documents":
            "selected", "three by ReDDE, CORI": "cori", "three by ReDDE, re-ranked by one encoder": "rerank"}
    rows = [f"| {says} | {mean(key):.3f} | {1.0 if 'all' in says.split(',')[0] else mean('moved'):.2f} |"
            for says, key in ways.items()]
    first = ", ".join(f"{name} {mean(key):.2f}" for name, key in (("ReDDE", "redde"), ("centroids", "centroids"),
                                                                 ("learned", "learned")))
    return ["| lists | nDCG@10 | passages moved |", "|---|---|---|", *rows, "",
            f"The first site is the document's own: {first}; chance 0.12. Means of {seeds} seeds below 1000."]


def written(found: Mapping[str, Any], docs: Sequence[str], skipped: int, count: int) -> str:
    """The page."""
    learned, told = (found[n] for n in ("learned (ridge on the request's vector)", "description"))
    prior = found["mean value (no request)"]
    gain = [over(learned[f], other[f]) for f in ("nDCG@10",) for other in (told, prior)]
    return "\n".join([
        "# FeB4RAG: which engines, and what their lists are worth", "",
        "Made by `FEDLLM_DATA=... python -m evidence.feb4rag` (MiniLM on the CPU, under a minute); " +
        f"{count} requests, 16 engines, {skipped} requests without any engine of value left out.", "",
        *table(found), "",
        f"`P@{SOME}` and `R@{SOME}`: an engine is relevant where its published value is above 0 (three quarters are). "
        "Values are hundredths of the weight of a passage (key 1, highly 0.5, relevant 0.25): `value of the 3 chosen` "
        "is the mean weight of a passage in a list made of the chosen engines' top 10, and the column beside it of "
        "naive-fed's list of all 160 passages. The documents are not in the data, so that merged lists themselves "
        "cannot be graded; the second table does that.", "",
        f"Learned over description, nDCG@10: {gain[0]}; over the mean value of each engine: {gain[1]}. Learned on four "
        "folds of five and tested on the fifth. Each engine's weights follow from its own relevance alone, so that "
        "each can fit its own.", "",
        "## Real documents: docstrings of eight packages", "",
        "Half of the sites rank by MiniLM, half by BM25; queries are first sentences without the object's name "
        "(`evidence/rigs/packages.py`, 32 documents a site, 40 queries).", "", *docs, ""])


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="shared:feb4rag", help="the folder; shared: is FEDLLM_DATA")
    parser.add_argument("--seeds", type=int, default=3, help="of the docstrings' table; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    _, texts, values, told = requests(resolve(given.data))
    found = {name: figures(order, values) for name, order in orders(texts, values, told).items()}
    skipped = sum(not any(v.values()) for v in values)
    docs = packages(given.seeds) if given.seeds else ["(left out)"]
    given.out.write_text(written(found, docs, skipped, len(texts)))


if __name__ == "__main__":
    main()
