"""Instructions of several topics and unequal sizes, made of the shared data: a client is a topic."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence

from fedllm.data.sources import resolve

Row = Mapping[str, str]
SIZES: Mapping[str, int] = {"code": 150, "mathematics": 90, "reviews": 60, "news": 44, "databases": 36, "web": 30,
                            "names": 24, "plays": 18}
"""Topic -> rows; of the first four alone where four are asked for."""
LONGEST = 240
"""Characters of a prompt or an answer."""


def _lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in resolve(f"shared:{name}").read_text(encoding="utf-8").splitlines() if line]


def _code() -> dict[str, list[Row]]:
    """Code Alpaca by what its instruction speaks of."""
    found: dict[str, list[Row]] = {"code": [], "databases": [], "web": []}
    for r in _lines("code_alpaca_2k.jsonl"):
        asked = "\n".join(t for t in (r["instruction"], r["input"]) if t.strip())
        topic = "databases" if re.search(r"\bSQL|quer|database", asked, re.I) else (
            "web" if re.search(r"\bHTML|\bCSS|web", asked, re.I) else "code")
        found[topic].append({"prompt": asked, "response": r["output"]})
    return found


def _names() -> list[Row]:
    """Messages, and the names in them."""
    out = []
    for r in _lines("wnut17_train.jsonl"):
        named = [w for w, tag in zip(r["tokens"], r["tags"], strict=True) if tag != "O"]
        out.append({"prompt": f"List the names in: {' '.join(r['tokens'])}", "response": ", ".join(named)})
    return [r for r in out if r["response"]]


def _plays() -> list[Row]:
    """What was said to one on the stage, and the answer."""
    text = resolve("shared:tinyshakespeare.txt").read_text(encoding="utf-8")
    said = [" ".join(piece.partition(":\n")[2].split()) for piece in text.split("\n\n")]
    return [{"prompt": a, "response": b} for a, b in itertools.pairwise(said) if a and b]


def topics(count: int = len(SIZES)) -> Sequence[Row]:
    """The rows of the first so many topics, each with its `topic`; the first of each file that are not too long."""
    words = {"0": "negative", "1": "positive"}
    found = {**_code(), "names": _names(), "plays": _plays(),
             "mathematics": [{"prompt": r["question"], "response": r["answer"]}
                             for r in _lines("gsm8k_train.jsonl")],
             "reviews": [{"prompt": f"Is this review positive or negative? {r['text']}",
                          "response": words[str(r["label"])]} for r in _lines("sst2_train.jsonl")],
             "news": [{"prompt": f"What is this article about? {r['text'][:160]}", "response": r["label"]}
                      for r in _lines("masakhanews_train.jsonl") if r["lang"] == "eng"]}
    out: list[Row] = []
    for topic, size in list(SIZES.items())[:count]:
        short = [r for r in found[topic]
                 if r["response"].strip() and max(len(r["prompt"]), len(r["response"])) <= LONGEST]
        out += [{**r, "topic": topic} for r in short[:size]]
    return out
