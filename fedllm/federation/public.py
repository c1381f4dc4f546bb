"""Public rows at sites: found there by their hash, or sent once when the run opens, and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError, FedLLMError, PayloadError, RecipeError
from fedllm.data.federation import Row
from fedllm.engines.far.site import Lacks
from fedllm.federation.settings import SiteSettings
from fedllm.runs.recipe import Recipe
from fedllm.runs.rows import file_rows
from fedllm.runs.store import private_folder, write_atomic
from fedllm.tasks.registry import task_of

log = logging.getLogger(__name__)
MOST = 64 << 20
"""Bytes of the longest public rows that are sent to a site."""


@dataclass(frozen=True)
class PublicRows:
    """Rows that belong to nobody, as bytes; equal rows have equal bytes."""

    rows: Sequence[Row]
    data: bytes
    sha256: str

    @classmethod
    def of(cls, rows: Sequence[Row]) -> PublicRows:
        """JSON with sorted keys; DataError for rows that it cannot hold."""
        try:
            text = json.dumps([dict(r) for r in rows], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"data.public: its rows cannot be sent to sites ({error})") from None
        return cls(rows, text.encode(), hashlib.sha256(text.encode()).hexdigest())

    @property
    def head(self) -> dict[str, Any]:
        """What a site is told of them, to look for its own copy."""
        return {"sha256": self.sha256, "rows": len(self.rows), "bytes": len(self.data)}


def site_rows(head: Mapping[str, Any], recipe: Recipe, settings: SiteSettings) -> Sequence[Row]:
    """The run's public rows: the site's own copy, what it kept, or what came with this message.

    Raises Lacks when they must be sent, PayloadError when what was sent is something else.
    """
    told, body = head.get("public"), head.get("body") or b""
    if told is None:
        return ()
    want = str(told["sha256"])
    if not (len(want) == 64 and want.isalnum()):
        raise PayloadError(f"public rows with the hash {want[:80]!r}, which is none")
    if own := _copy(recipe, settings, want):
        return own
    kept = Path(settings.store) / "public" / f"{want}.json"
    if kept.is_file() and hashlib.sha256(data := kept.read_bytes()).hexdigest() == want:
        return _rows(data, recipe)
    if not len(body):
        raise Lacks("public")
    if len(body) > MOST or hashlib.sha256(body).hexdigest() != want:
        raise PayloadError(f"{len(body)} bytes of public rows came, which are too many ({MOST} at most) or not those "
                           f"with the hash {want[:12]}")
    rows = _rows(bytes(body), recipe)
    private_folder(private_folder(Path(settings.store)) / "public")
    write_atomic(kept, bytes(body))
    return rows


def _copy(recipe: Recipe, settings: SiteSettings, want: str) -> Sequence[Row] | None:
    """The rows of the site's own file, if they are the run's."""
    if settings.public is None:
        return None
    try:
        mine = PublicRows.of(file_rows(recipe, settings.public))
    except FedLLMError as error:
        log.warning("the copy of public rows in %s cannot be used: %s", settings.public, error)
        return None
    if mine.sha256 != want:
        log.warning("the copy of public rows in %s has the hash %s, the run's have %s", settings.public,
                    mine.sha256[:12], want[:12])
    return mine.rows if mine.sha256 == want else None


def _rows(data: bytes, recipe: Recipe) -> Sequence[Row]:
    """What came from outside, read as rows of the run's task."""
    rows = json.loads(data)
    if not (isinstance(rows, list) and all(isinstance(r, dict) for r in rows)) or unfit(rows, recipe) is not None:
        raise PayloadError(f"the public rows are none of the task '{recipe.data.task}'")
    return rows


def unfit(rows: Sequence[Row], recipe: Recipe) -> int | None:
    """Which row, from 1 on, no site would take of another machine; None: all are good."""
    task, labels = task_of(recipe.data.task), tuple(recipe.data.labels or ())
    return next((i for i, row in enumerate(rows, start=1) if not task.came(row, labels)), None)


def check_public(rows: Sequence[Row], recipe: Recipe) -> None:
    """RecipeError for public rows that every site would refuse."""
    if (row := unfit(rows, recipe)) is not None:
        raise RecipeError(f"data.public = {recipe.data.public!r}, row {row}: no site takes such a row from elsewhere; "
                          f"of data.task = {recipe.data.task!r} allowed are texts, labels among data.labels, and "
                          "pictures as numbers, since a picture's file lies on no site")
