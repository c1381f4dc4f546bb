"""Pictures that a report shows: of public and of made rows, and of private ones where the recipe says so."""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.client import SERVER
from fedllm.core.method import Method, State
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.local.forward import run_logits
from fedllm.local.requests import Logits
from fedllm.runs.build import Parts
from fedllm.tasks.images import opened

log = logging.getLogger(__name__)
SIDE = 160
"""Pixels of a picture's longer side in the report, where it has more."""


@dataclass(frozen=True)
class Pictured:
    """A row whose picture is shown, and whose it is, in words."""

    row: Any
    encoded: Encoded
    whose: str


def pictured(parts: Parts) -> list[Pictured]:
    """The rows whose pictures are kept, as many as `evaluate.samples` says; [] where there are none to show.

    Public rows are nobody's, and those of a source `sim:NAME` are made; the global test and what clients hold are
    private, and taken in their place where `evaluate.pictures` is `private`, and never else.
    """
    spec, world = parts.recipe.evaluate, parts.world
    if spec.pictures == "none" or not spec.samples or world.model.rules.net not in ("dual", "pairs"):
        return []
    made, private = parts.recipe.data.made, spec.pictures == "private"
    pool: list[tuple[Any, str]] = []
    for client, part, whose in _parts(parts, made, private):
        pool += [(row, whose) for row in world.rows(client, part) if isinstance(row, Mapping) and "image" in row]
        if len(pool) >= spec.samples:
            break
    if pool and importlib.util.find_spec("PIL") is None:
        log.info("the report shows no pictures: that needs the optional extra, pip install 'fedlm[images]'")
        return []
    draw = numpy_stream(world.seed, "pictures").permutation(len(pool))[: spec.samples]
    picked = [pool[i] for i in sorted(draw)]
    return [Pictured(row, e, whose) for (row, whose), e in
            zip(picked, world.tokenized([row for row, _ in picked], True), strict=True)]


def _parts(parts: Parts, made: bool, private: bool) -> Iterator[tuple[str, str, str]]:
    """(client, part, whose rows these are), the first first."""
    if made or private:
        whose = "made by the source" if made else "PRIVATE: "
        yield SERVER, "test", whose if made else f"{whose}a row of the global test"
        if parts.engine is None and not parts.world.federation.streamed:
            for client in parts.world.federation.clients:
                yield client, "test", whose if made else f"{whose}a test row of {client}"
    if not private:
        yield SERVER, "public", "a public row"


def named(parts: Parts, method: Method, state: State, rows: Sequence[Pictured]) -> list[str]:
    """What the served model says each picture is; [] where the method serves none."""
    if not method.serves:
        return []
    world = parts.world
    theta, base = method.served(state)
    asked = Logits(SERVER, world.model, theta, base, [p.encoded for p in rows])
    return [world.federation.labels[int(z.argmax())] for z in run_logits([asked], world.limits)[0]]


def told(parts: Parts, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """Each picture as a PNG in base64 and whose it is, its text where it has one, its label, and what is said."""
    labels, out = parts.world.federation.labels, []
    for i, p in enumerate(pictured(parts)):
        was, now = (before[i], after[i]) if before and after else ("", "")
        picture = drawn(p.row["image"], f"row {i + 1}")
        out.append({"picture": picture, "whose": p.whose, "before": was, "after": now,
                    "prompt": str(p.row.get("text") or ""), "expected": labels[int(p.row["label"])]})
    return out


def drawn(image: Any, where: str) -> str:
    """A picture (a path, bytes, or numbers [3, H, W], of which the least is black) as a PNG in base64."""
    from PIL import Image

    if isinstance(image, list):
        x = np.asarray(image, np.float64).transpose(1, 2, 0)
        low, high = x.min(), x.max()
        picture = Image.fromarray((255 * (x - low) / max(high - low, 1e-12)).round().astype(np.uint8))
    else:
        picture = opened(image, where)
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
