"""Ways to share rows out among simulated clients; every row goes to exactly one of them.

Each partitioner is a frozen dataclass whose fields are its knobs and whose `split` gives each client's row indices,
sorted, by client id. A row may carry columns that the model never sees; `FILE` among them is the file it came from.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np

from fedllm.core.client import SERVER
from fedllm.core.errors import DataError, RecipeError
from fedllm.data.cluster import Embed, clusters
from fedllm.data.federation import Row
from fedllm.data.parts import SKEW, Parts, checked_choice, checked_number, enough, groups_of, numbered, sizes
from fedllm.tasks.row import nearest

FILE = "_file"
LONGEST_ID = 120
"""Bytes of a client's id."""

logger = logging.getLogger(__name__)


class Partitioner(Protocol):
    """Shares rows out: what a new way to partition must offer."""

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Row indices by client id; a DataError names a client that would have no rows."""
        ...


@dataclass(frozen=True)
class Numbered:
    """What partitioners share whose clients are made up: client-00, client-01, ..."""

    clients: int

    def __post_init__(self) -> None:
        """Refuses knobs that are out of range."""
        checked_number("clients", self.clients, 1, whole=True)


@dataclass(frozen=True)
class Iid(Numbered):
    """Deals shuffled rows out evenly: no client differs from another but by chance."""

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Client sizes differ by one row at most."""
        enough(rows, self.clients)
        return numbered(np.array_split(rng.permutation(len(rows)), self.clients))


@dataclass(frozen=True)
class Dirichlet(Numbered):
    """Draws each label's shares over the clients from a Dirichlet (Hsu et al. 2019): small alpha, strong label skew."""

    alpha: float
    by: str | None = None
    """Column to skew by; by default `label`, or `category` where rows have no label."""
    min_examples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("alpha", self.alpha, *SKEW)
        checked_number("min_examples", self.min_examples, 1, whole=True)

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Clients below `min_examples` are topped up with random rows of the largest client.

        Redrawing until all are large enough, as is often done, may never end.
        """
        enough(rows, self.clients, self.min_examples)
        parts: list[list[int]] = [[] for _ in range(self.clients)]
        for group in groups_of(rows, self.by).values():
            shares = rng.dirichlet(np.full(self.clients, float(self.alpha)))
            cuts = (np.cumsum(shares)[:-1] * len(group)).astype(np.int64)
            for part, piece in zip(parts, np.split(rng.permutation(group), cuts), strict=True):
                part.extend(piece.tolist())
        for part in parts:
            while len(part) < self.min_examples:
                donor = max(parts, key=len)
                part.append(donor.pop(int(rng.integers(len(donor)))))
        return numbered(parts)


@dataclass(frozen=True)
class Shards(Numbered):
    """Gives each client a fixed number of classes, and each class's rows in equal parts to those that hold it."""

    classes: int = 2
    by: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("classes", self.classes, 1, whole=True)

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """No client sees more than `classes` classes, and each class is held by someone."""
        groups = list(groups_of(rows, self.by).values())
        if not len(groups) / self.clients <= self.classes <= len(groups):
            least = math.ceil(len(groups) / self.clients)
            raise RecipeError(f"data.partition.classes = {self.classes}: allowed is {least} to {len(groups)}, since "
                              f"{self.clients} clients share {len(groups)} classes")
        held = np.zeros(len(groups), dtype=np.int64)
        holders: list[list[int]] = [[] for _ in groups]
        for client in range(self.clients):
            # The classes that the fewest clients hold yet, ties broken at random.
            for group in np.lexsort((rng.random(len(groups)), held))[: self.classes]:
                holders[group].append(client)
                held[group] += 1
        parts: list[list[int]] = [[] for _ in range(self.clients)]
        for group, owners in zip(groups, holders, strict=True):
            for client, piece in zip(owners, np.array_split(rng.permutation(group), len(owners)), strict=True):
                parts[client].extend(piece.tolist())
        return numbered(parts)


@dataclass(frozen=True)
class Quantity(Numbered):
    """Shares rows out at random in unequal amounts: log-normal sizes, or sizes that fall as a power of the rank."""

    skew: float = 1.0
    """Log-normal: standard deviation of the log size. Power: exponent of the rank (1 is Zipf). 0 is equal sizes."""
    law: Literal["lognormal", "power"] = "lognormal"
    min_examples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("skew", self.skew, 0, 1e6)
        checked_number("min_examples", self.min_examples, 1, whole=True)
        checked_choice("law", self.law, ("lognormal", "power"))

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Which client is large is drawn too."""
        enough(rows, self.clients, self.min_examples)
        draws: dict[str, Callable[[int], np.ndarray]] = {
            "lognormal": rng.standard_normal,
            "power": lambda k: -np.log(1.0 + rng.permutation(k)),
        }
        logs = self.skew * draws[self.law](self.clients)
        amounts = sizes(len(rows), np.exp(logs - logs.max()), self.min_examples)
        return numbered(np.split(rng.permutation(len(rows)), np.cumsum(amounts)[:-1]))


@dataclass(frozen=True)
class ByKey:
    """Makes one client of each value of a column: a language, a hospital, an author."""

    key: str
    min_examples: int = 1
    small: Literal["merge", "drop"] = "merge"
    """What becomes of values with fewer rows: one client `other` of them all, or left out (logged)."""

    def __post_init__(self) -> None:
        checked_number("min_examples", self.min_examples, 1, whole=True)
        checked_choice("small", self.small, ("merge", "drop"))

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Clients stand in the sorted order of their keys. Only `small: drop` leaves rows out."""
        groups = groups_of(rows, self.key)
        kept = {value: part for value, part in groups.items() if len(part) >= self.min_examples}
        small = sorted(i for value, part in groups.items() if value not in kept for i in part)
        if small and self.small == "drop":
            logger.warning("by_key %r: %d of %d values have fewer than %d rows; their %d rows are left out", self.key,
                           len(groups) - len(kept), len(groups), self.min_examples, len(small))
            if not kept:
                raise DataError(f"client {next(iter(groups))!r} and all others would have no rows: no value of "
                                f"{self.key!r} has min_examples = {self.min_examples} rows")
        ids = _safe_ids([*kept, *(["other"] if small and self.small == "merge" else [])])
        return dict(zip(ids, [*kept.values(), small], strict=False))


def _safe_ids(values: Sequence[str]) -> list[str]:
    """Client ids that can name a folder, still distinct: ids become paths in a run's folder."""
    seen: Counter[str] = Counter()
    ids = []
    for value in values:
        name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", value)).strip(".") or "_"
        if len(name.encode()) > LONGEST_ID:  # a folder's name has 255 bytes at most, and needs room for what is added
            digest = hashlib.sha256(value.encode()).hexdigest()[:12]
            name = f"{name.encode()[:LONGEST_ID - 13].decode(errors='ignore')}-{digest}"
            logger.warning("the client id %s... (%d bytes) is shortened to %s", name[:40], len(value.encode()), name)
        if name in (SERVER, "__server__"):  # what the server calls itself, whose rows are everybody's
            name = f"{name}~"
        seen[name.casefold()] += 1  # some file systems do not tell Ward from ward
        ids.append(name if seen[name.casefold()] == 1 else f"{name}~{seen[name.casefold()]}")
    return ids


@dataclass(frozen=True)
class PerFile:
    """Makes one client of each source file, as when each site has sent its own."""

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Clients are named after their files."""
        return ByKey(FILE).split(rows, rng)


@dataclass(frozen=True)
class ByCluster(Numbered):
    """Clusters the texts by k-means over embeddings and makes one client of each cluster: topic skew without labels."""

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Embeds `text`, or else `prompt`, by TF-IDF and SVD where no `embed` is given."""
        enough(rows, self.clients)
        texts = [str(row["text"] if "text" in row else row["prompt"]) for row in rows]
        found = clusters(texts, self.clients, rng, embed)
        return numbered([np.flatnonzero(found == k).tolist() for k in range(self.clients)])


@dataclass(frozen=True)
class Grouped:
    """Makes one client of each group of a folder that `fedllm group` has written (`data.source: grouped:FOLDER`)."""

    clients: int | None = None
    """So many groups, drawn at random; none: all."""
    min_rows: int = 1
    """Smaller groups take no part."""
    max_rows: int = 1024
    """A client uses the first so many rows of its group; a group may be larger than memory."""

    def __post_init__(self) -> None:
        for name in ("clients", "min_rows", "max_rows"):
            if getattr(self, name) is not None:
                checked_number(name, getattr(self, name), 1, whole=True)

    def split(self, rows: Sequence[Row], rng: np.random.Generator, *, embed: Embed | None = None) -> Parts:
        """Not for rows in memory."""
        raise RecipeError("data.partition.kind = 'grouped' needs data.source = 'grouped:FOLDER', a folder that `fedllm "
                          "group` has written; by_key makes one client of each value of a column in memory")


KINDS: dict[str, type[Any]] = {
    "iid": Iid, "dirichlet": Dirichlet, "shards": Shards, "quantity": Quantity,
    "by_key": ByKey, "per_file": PerFile, "by_cluster": ByCluster,
    "grouped": Grouped,
}


def partitioner(spec: Mapping[str, Any]) -> Partitioner:
    """The partitioner of a recipe's `data.partition`; a RecipeError names an unknown kind, knob or value."""
    kind = str(spec.get("kind", "iid"))
    checked_choice("kind", kind, tuple(KINDS))
    known = {field.name: field for field in fields(KINDS[kind])}
    knobs = {key: value for key, value in spec.items() if key != "kind"}
    for key in knobs:
        if key not in known:
            raise RecipeError(f"data.partition.{key}: {kind} has no such knob{nearest(key, known)}; it has "
                              f"{', '.join(known) or 'none'}")
    lacking = [name for name, knob in known.items() if knob.default is MISSING and name not in knobs]
    if lacking:
        raise RecipeError(f"data.partition: {kind} needs {', '.join(lacking)}")
    return KINDS[kind](**knobs)
