"""Cards of skills: words that several traces share, and trials as a bottleneck reads them under their card."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import DataError
from fedllm.methods import _bottleneck as ib
from fedllm.methods._library import shared_words

NAME, CARD = re.compile(r"[\w-]{1,60}"), re.compile(r"[a-z ]{0,600}")
"""What skills may be called, and what a card is: words, and no value."""
BLANK = "none"
"""What an encoder reads where there is no card."""


def by_skill(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Trials by their skill, in the order of names."""
    out: dict[str, list[Any]] = {}
    for row in rows:
        out.setdefault(str(row.get("skill", "")), []).append(row)
    return dict(sorted(out.items()))


def drafted(traces: Sequence[str], least: int, longest: int) -> list[str]:
    """Cards that these traces allow: all words that at least `least` of them have, the most frequent of these, each."""
    words = [w for w in shared_words(traces, least) if CARD.fullmatch(w)][:longest]
    return list(dict.fromkeys([" ".join(words), *(" ".join(words[:k]) for k in (2, 4)), *words]))


def picked(rows: Sequence[Mapping[str, Any]], cards: Mapping[str, str], drafts: Callable[[list[Any]], list[str]],
           price: Callable[[list[Any], str, str], float] | None) -> tuple[dict[str, str], list[float]]:
    """The cheapest card of each skill, of its drafts and the one that there was, and its price below 0; with no price
    the first."""
    mine, worth = {}, []
    for name, some in by_skill(rows).items():
        may = list(dict.fromkeys([*drafts(some), cards.get(name, "")]))
        costs = [price(some, name, card) for card in may] if price else [0.0]
        best = min(range(len(costs)), key=lambda i: costs[i])
        mine[name] = may[best]
        worth.append(-costs[best])
    return mine, worth


def trials(client: Any, rows: Sequence[Mapping[str, Any]], cards: Mapping[str, str], pixels: int
           ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the frozen state of card and text, and c, of the card alone [n, d]; v [n, pixels]; y [n]. DataError names a
    trial that lacks a part."""
    for i, r in enumerate(rows, start=1):
        if not {"skill", "trace"} <= r.keys() or len(r.get("glyph", ())) != pixels:
            raise DataError(f"client '{client.id}', trial {i}: it needs 'skill', 'trace' and a 'glyph' of "
                            f"method.pixels = {pixels} numbers; map the columns by data.fields")
    said = [cards.get(str(r["skill"]), "") for r in rows]
    each = {card: i for i, card in enumerate(dict.fromkeys(said))}
    texts = [*(card or BLANK for card in each), *(f"{c} {r['text']}".strip() for c, r in zip(said, rows, strict=True))]
    got = torch.from_numpy(client.measure({}, [{"text": t, "label": 0} for t in texts], ib.state)).float()
    v = torch.tensor([list(r["glyph"]) for r in rows], dtype=torch.float32)
    return got[len(each):], got[[each[c] for c in said]], v, torch.tensor([int(r["label"]) for r in rows])


def kept(client: Any, cards: Mapping[str, str], read: Callable[[Mapping[str, str]], tuple[Tensor, ...]]
         ) -> tuple[Tensor, ...]:
    """A client's trials as they are read under these cards: the encoder rests, so that it runs once for them."""
    mine = {name: cards.get(name, "") for name in by_skill(client.data)}
    if client.memory.get("read") != mine:
        client.memory["read"], client.memory["seen"] = mine, list(read(mine))
    return tuple(client.memory["seen"])
