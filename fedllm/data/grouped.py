"""Streams the groups of a grouped folder, and makes clients of them whose rows are read when they are asked for."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.errors import DataError
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Row, Shard
from fedllm.data.grouper import place_of

PREFIX = "grouped:"
"""`data.source: grouped:FOLDER` in a recipe."""
READERS = 4
"""Shards that a stream reads side by side."""


class Rows(Sequence[Row]):
    """Rows of one group; iterating reads them one by one, and nothing is kept.

    A DataError says that their file is gone, or no longer as it was written: other rows would be taken for them.
    """

    def __init__(self, path: Path, offset: int, count: int, whole: int) -> None:
        """`whole` are the bytes of the file."""
        self.path, self.offset, self.count, self.whole = path, offset, count, whole

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        try:
            with self.path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != self.whole:
                    raise ValueError(f"it has {size:,} bytes, and {self.whole:,} were written")
                file.seek(self.offset)
                for line in itertools.islice(file, self.count):
                    yield json.loads(line)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is not as `fedllm group` wrote it, or cannot be read ({error}); group the "
                            "source anew, or bring the file back") from None

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return list(itertools.islice(self, *i.indices(self.count)))
        if not -self.count <= i < self.count:
            raise IndexError(i)
        return next(itertools.islice(self, i % self.count, None))


class Groups(Mapping[str, Rows]):
    """All groups of a folder by id; what is held in memory is the index: about 40 bytes a group and its id."""

    def __init__(self, folder: str | Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            file = parquet.ParquetFile(self.folder / "groups.parquet", pre_buffer=False)
            index = {c: file.read(columns=[c], use_threads=False).combine_chunks()[c]
                     for c in ("id", "shard", "offset", "rows", "bytes")}  # one by one: pages are held for one column
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.folder} is no folder that `fedllm group` has written, or is not whole: {error}"
                            ) from None
        self.shards = int(self.meta["shards"])
        self.ids = index["id"].chunk(0) if len(index["id"]) else pa.array([], pa.string())
        self.shard, self.offset, self.rows, self.bytes = (
            index[c].to_numpy() for c in ("shard", "offset", "rows", "bytes"))
        self.ends = np.zeros(self.shards, np.int64)  # bytes of each shard
        np.maximum.at(self.ends, self.shard, self.offset + self.bytes)
        self.starts = np.searchsorted(self.shard, np.arange(self.shards + 1))  # the index stands in the shards' order

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return (i.as_py() for i in self.ids)

    def __getitem__(self, key: str) -> Rows:
        if (at := self.find(key)) is None:
            raise KeyError(key)
        return self.at(at)

    def at(self, i: int) -> Rows:
        """The i-th group."""
        shard = int(self.shard[i])
        return Rows(self.folder / f"shard-{shard:05d}.jsonl", int(self.offset[i]), int(self.rows[i]),
                    int(self.ends[shard]))

    def find(self, key: object) -> int | None:
        """Where this id stands: by halving, since a shard's ids are sorted as JSON."""
        if not isinstance(key, str):
            return None
        head = _head(key)
        low, high = (int(self.starts[place_of(head, self.shards) + k]) for k in (0, 1))
        end = high
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _head(self.ids[middle].as_py()) < head else (low, middle)
        return low if low < end and self.ids[low].as_py() == key else None

    def stream(self, seed: int, skip: int = 0) -> Iterator[tuple[str, Rows]]:
        """All groups once: shards in an order of the seed, READERS of them interleaved. `skip` goes on where a stream
        of the same seed stood."""
        order = numpy_stream("group stream", seed).permutation(self.shards)
        walks = [iter(range(self.starts[s], self.starts[s + 1])) for s in order]
        live, waiting, ended = walks[:READERS], walks[READERS:], list[Iterator[int]]()
        while live:
            for k in range(len(live)):
                while (i := next(live[k], None)) is None and waiting:
                    live[k] = waiting.pop(0)
                if i is not None and skip:
                    skip -= 1
                elif i is not None:
                    yield self.ids[i].as_py(), self.at(i)
                else:
                    ended.append(live[k])
            live = [walk for walk in live if walk not in ended]


def _head(key: str) -> bytes:
    """A key as it was sorted: no JSON text is the beginning of another, so what follows it in a line has no say."""
    return json.dumps(key, ensure_ascii=False).encode()


class GroupClients(Mapping[str, Shard]):
    """Clients of a federation, each a group; a shard is made anew whenever it is asked for, and read when used."""

    def __init__(self, groups: Groups, chosen: np.ndarray, shape: Callable[[Row, str], Row], max_rows: int,
                 client_test: Callable[[int], int], seed: int) -> None:
        """`chosen` are places in the index, in order; `client_test(n)` is how many of n rows are kept back."""
        self.groups, self.chosen, self.shape, self.max_rows = groups, chosen, shape, max_rows
        self.client_test, self.seed = client_test, seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[str]:
        return (self.groups.ids[int(i)].as_py() for i in self.chosen)

    def __contains__(self, key: object) -> bool:
        return self._place(key) is not None

    def _place(self, key: object) -> int | None:
        at = self.groups.find(key)
        if at is None:
            return None
        k = int(np.searchsorted(self.chosen, at))
        return at if k < len(self.chosen) and self.chosen[k] == at else None

    def __getitem__(self, key: str) -> Shard:
        if (at := self._place(key)) is None:
            raise KeyError(key)
        return self._shard(key, at)

    def items(self) -> Any:
        return ((key, self._shard(key, int(i))) for key, i in zip(self, self.chosen, strict=True))

    def values(self) -> Any:
        return (shard for _, shard in self.items())

    def _shard(self, key: str, at: int) -> Shard:
        rows = self.groups.at(at)
        n = min(len(rows), self.max_rows)
        back = self.client_test(n)
        return Shard(Part(self, key, rows, n, back, False), Part(self, key, rows, n, back, True) if back else (),
                     {"partition": "grouped", "rows": len(rows)})

    def part(self, key: str, rows: Rows, n: int, back: int, test: bool) -> list[Row]:
        """Read a client's rows and take its training rows, or those that it keeps back."""
        out = np.zeros(n, dtype=bool)
        out[numpy_stream(self.seed, "data.client_test", key).permutation(n)[:back]] = True
        return [self.shape(row, f"group '{key}', row {i + 1}")
                for i, row in enumerate(itertools.islice(rows, n)) if out[i] == test]


class Part(Sequence[Row]):
    """A client's training rows, or its test: its length is known at once, its rows are read each time."""

    def __init__(self, clients: GroupClients, key: str, rows: Rows, n: int, back: int, test: bool) -> None:
        self.key, self.count = (clients, key, rows, n, back, test), back if test else n - back

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        clients, *rest = self.key
        return iter(clients.part(*rest))

    def __getitem__(self, i: Any) -> Any:
        return list(self)[i]


def grouped_clients(folder: Path, knobs: Any, test: float, test_limit: int | None, client_test: Callable[[int], int],
                    shape: Callable[[Row, str], Row], seed: int) -> tuple[GroupClients, list[Row]]:
    """The clients, and the global test: rows of groups that train nobody (a share `test` of them all, of whose rows at
    most `test_limit` are kept, 1000 where that is None). `knobs` is the recipe's partition (`Grouped`)."""
    groups = Groups(folder)
    fit = np.flatnonzero(groups.rows >= knobs.min_rows)
    order = numpy_stream(seed, "data.groups").permutation(fit)
    held, left = order[: (out := round(test * len(order)))], order[out:]
    want = len(left) if knobs.clients is None else knobs.clients
    if not 0 < want <= len(left):
        raise DataError(f"{folder} has {len(left)} groups with at least min_rows = {knobs.min_rows} rows that are not "
                        f"in the test, and {want or 'some'} clients are asked for")
    clients = GroupClients(groups, np.sort(left[:want]), shape, knobs.max_rows, client_test, seed)
    rows = (shape(row, f"group {groups.ids[int(i)].as_py()!r}") for i in held for row in groups.at(int(i)))
    return clients, list(itertools.islice(rows, 1000 if test_limit is None else test_limit))
