"""Rows in the shape of FedLLM-Bench's files, made of the shared data: `python -m evidence.bench_rows FOLDER`.

Each file maps a client to its list of records: `instruction` with `response`, or with `chosen` and `rejected`. Sizes
follow a power law, as users' do; some clients hold a single row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedllm.data.sources import resolve

Rows = Mapping[str, Sequence[Mapping[str, str]]]
MOST = 24
"""Rows of a client, at the most."""


def lines(name: str) -> list[dict[str, str]]:
    """A shared JSONL file."""
    return [json.loads(line) for line in resolve(f"shared:{name}").read_text(encoding="utf-8").splitlines() if line]


def user() -> Rows:
    """Speakers of plays: what was said to one, and what is answered."""
    found: dict[str, list[dict[str, str]]] = {}
    text = resolve("shared:tinyshakespeare.txt").read_text(encoding="utf-8")
    before = ""
    for piece in text.split("\n\n"):
        who, _, said = piece.partition(":\n")
        said = " ".join(said.split())
        if before and said and len(found.setdefault(who, [])) < MOST:
            found[who].append({"instruction": before[:200], "response": said[:200]})
        before = said
    return {who: rows for who, rows in found.items() if rows}


def language() -> Rows:
    """Readers of news, some for each language: an article's topic."""
    news = lines("masakhanews_train.jsonl")
    found: dict[str, list[dict[str, str]]] = {}
    for row in news:
        told = {"instruction": f"{row['text'][:240]}\nTopic:", "response": row["label"], "language": row["lang"]}
        found.setdefault(row["lang"], []).append(told)
    return {f"{lang}-{i}": part for lang, rows in sorted(found.items()) for i, part in enumerate(dealt(rows, lang))}


def chatbot() -> Rows:
    """Users who ask a programmer's assistant."""
    rows = [{"instruction": "\n\n".join(t for t in (r["instruction"], r["input"]) if t.strip()),
             "response": r["output"]} for r in lines("code_alpaca_2k.jsonl") if r["output"].strip()]
    return {f"user-{i:03d}": part for i, part in enumerate(dealt(rows, "chatbot"))}


def preference() -> Rows:
    """Users who chose: the answer to their own question before the answer to another."""
    out: dict[str, list[dict[str, str]]] = {}
    for who, rows in chatbot().items():
        others = [*rows[1:], rows[0]]
        pairs = [{"instruction": a["instruction"], "chosen": a["response"], "rejected": b["response"]}
                 for a, b in zip(rows, others, strict=True) if a["response"] != b["response"]]
        if pairs:
            out[who] = pairs
    return out


def dealt(rows: Sequence[dict[str, str]], word: str) -> Iterator[list[dict[str, str]]]:
    """The rows in parts of power-law sizes, from 1 to MOST."""
    draw, at = np.random.default_rng(sum(map(ord, word))), 0
    while at < len(rows):
        size = int(min(MOST, 1 + draw.pareto(0.7) * 3))
        yield list(rows[at : at + size])
        at += size


SETTINGS: Mapping[str, Callable[[], Rows]] = {f.__name__: f for f in (user, language, preference, chatbot)}


def write(folder: Path) -> dict[str, tuple[int, int]]:
    """All four files; setting -> (clients, rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: make() for name, make in SETTINGS.items()}
    for name, rows in made.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    return {name: (len(rows), sum(map(len, rows.values()))) for name, rows in made.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder fedllm_bench of the shared data, or another")
    for name, (clients, rows) in write(parser.parse_args().folder).items():
        print(f"{name}.json: {clients} clients, {rows} rows")  # noqa: T201
