"""Groups any corpus by any pure key function, on disk and in bounded memory: each group becomes a client.

What it writes is a folder: `shard-00000.jsonl`, ... hold the rows as JSON lines, the rows of a group one after another;
`groups.parquet` says where each group is and how large; `meta.json` says how it was made. The same rows give the same
folder whatever the number of workers. (Dataset Grouper, Charles et al. 2023, without Beam and TensorFlow.)
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.group_keys import KeyFunction, key_function
from fedllm.data.stream import stream_rows

log = logging.getLogger(__name__)
BLOCK = 4096
"""Rows that one worker takes at a time."""
AT_ONCE = 64
"""Sorted runs that are merged together."""
CHECKED = 100
"""Rows of each worker on which the key function is called twice: a counter in it would show."""


@dataclass(frozen=True)
class Grouping:
    """What came of it."""

    groups: int
    rows: int
    bytes: int
    dropped_groups: int
    """Groups over `group_byte_limit`, which are left out."""
    dropped_rows: int


def group(source: str | Sequence[str], out: str | Path, key: str | KeyFunction, *, shards: int = 8, workers: int = 1,
          seed: int = 0, memory_mb: int = 16, group_byte_limit: int = 2_000_000_000) -> Grouping:
    """Group the rows of these files by `key` and write the folder `out`, which must not exist.

    `key` is a function of one row, or text: `column:speaker`, `host:url`, `random:1000`, `dirichlet:label:1000:0.5`,
    `call:package.module:function`. `memory_mb` is what each worker holds before it writes; a process also holds its
    imports. Raises DataError for rows that cannot be read or keyed, RecipeError for a knob out of range.
    """
    for name, value in {"shards": shards, "workers": workers, "memory_mb": memory_mb,
                        "group_byte_limit": group_byte_limit}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{name} = {value!r} is not allowed; it must be a whole number from 1")
    paths = [source] if isinstance(source, str) else list(source)
    key_function(key, seed)  # what is wrong with it is said before any work
    target = Path(out)
    if target.exists():
        raise DataError(f"{target} is there already; remove it, or group into another folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "runs").mkdir(parents=True)
    try:
        _spread(paths, partial, key, shards, workers, seed, memory_mb)
        made = _gather(partial, shards, group_byte_limit)
        shutil.rmtree(partial / "runs")
        how = {"key": key if isinstance(key, str) else getattr(key, "__qualname__", repr(key)), "seed": seed,
               "shards": shards, "sources": [Path(p).name for p in paths], **asdict(made)}
        (partial / "meta.json").write_text(json.dumps(how, indent=1) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if made.dropped_groups:
        log.warning("%d groups with %d rows are over group_byte_limit = %d bytes and were left out",
                    made.dropped_groups, made.dropped_rows, group_byte_limit)
    return made


def _spread(paths: Sequence[str], folder: Path, key: str | KeyFunction, shards: int, workers: int, seed: int,
            memory_mb: int) -> None:
    """Every worker keys its blocks of rows and leaves sorted runs in `runs/`."""
    jobs = [(paths, folder, key, shards, (w, workers), seed, memory_mb << 20) for w in range(workers)]
    if workers == 1:
        _map(*jobs[0])
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_map, *job) for job in jobs]:
            done.result()


def _map(paths: Sequence[str], folder: Path, key: str | KeyFunction, shards: int, share: tuple[int, int], seed: int,
         budget: int) -> None:
    """Lines `key, number, words, row`: sorted as bytes they stand group by group, in the source's order within one."""
    key_of = key_function(key, seed)
    held: list[list[bytes]] = [[] for _ in range(shards)]
    size = runs = seen = 0
    for f, path in enumerate(paths):
        for i, where, row, raw in stream_rows(path, share, BLOCK):
            name = key_of(row, (f, i), where)
            if seen < CHECKED and key_of(row, (f, i), where) != name:
                raise DataError(f"{where}: the key function gave {name!r:.80} and then another key for the same row; "
                                "it must be pure: no counters, no clock, no generator of its own")
            seen += 1
            head = json.dumps(name, ensure_ascii=False).encode()
            words = sum(len(v.split()) for v in row.values() if isinstance(v, str))
            line = b"%b\t%04x%012x\t%d\t%b\n" % (head, f, i, words, raw)
            held[place_of(head, shards)].append(line)
            size += len(line) + 60  # what a bytes object weighs beside its text
            if size >= budget:
                _run(folder, held, f"{share[0]}-{runs}")
                size, runs = 0, runs + 1
    _run(folder, held, f"{share[0]}-{runs}")


def place_of(head: bytes, shards: int) -> int:
    """The shard of a key (as JSON)."""
    return int.from_bytes(hashlib.blake2b(head, digest_size=8).digest(), "little") % shards


def _run(folder: Path, held: list[list[bytes]], name: str) -> None:
    for shard, lines in enumerate(held):
        if lines:
            lines.sort()
            with (folder / "runs" / f"{shard}-{name}").open("wb") as file:
                file.writelines(lines)
            lines.clear()


def _gather(folder: Path, shards: int, limit: int) -> Grouping:
    """Merge each shard's runs, and write rows and index."""
    import pyarrow as pa
    from pyarrow import parquet

    form = pa.schema([("id", pa.string()), ("shard", pa.int32()), ("offset", pa.int64()), ("bytes", pa.int64()),
                      ("rows", pa.int64()), ("words", pa.int64())])
    kept = rows = size = lost = lost_rows = 0
    with parquet.ParquetWriter(folder / "groups.parquet", form) as index:
        for shard in range(shards):
            found = _groups(folder, shard, limit)
            while batch := list(itertools.islice(found, 20_000)):
                good = [g for g in batch if g[3] >= 0]
                kept, lost = kept + len(good), lost + len(batch) - len(good)
                rows, size = rows + sum(g[4] for g in good), size + sum(g[3] for g in good)
                lost_rows += sum(g[4] for g in batch if g[3] < 0)
                index.write_table(pa.table([list(column) for column in zip(*good, strict=True)] if good else
                                           [[] for _ in form], schema=form))
    if not kept:
        raise DataError(f"{folder.name.removesuffix('.partial')}: no group is left ({lost} were over the byte limit)")
    return Grouping(kept, rows, size, lost, lost_rows)


Entry = tuple[str, int, int, int, int, int]
"""id, shard, offset, bytes (-1: left out), rows, words."""


def _groups(folder: Path, shard: int, limit: int) -> Iterator[Entry]:
    """Write one shard; one entry for each group."""
    with (folder / f"shard-{shard:05d}.jsonl").open("wb") as out:
        for head, lines in itertools.groupby(_merged(folder, shard), key=lambda line: line[: line.index(b"\t")]):
            start, size, rows, words = out.tell(), 0, 0, 0
            for line in lines:
                _, _, count, row = line.split(b"\t", 3)
                rows, words, size = rows + 1, words + int(count), size + len(row)
                if size <= limit:
                    out.write(row)
            if size > limit:
                out.seek(start)
                out.truncate()
                size = -1
            yield json.loads(head), shard, start, size, rows, words


def _merged(folder: Path, shard: int) -> Iterator[bytes]:
    """A shard's lines in order; many runs are merged in stages, so that few files are open at a time."""
    runs = sorted((folder / "runs").glob(f"{shard}-*"))
    for stage in itertools.count():
        if len(runs) <= AT_ONCE:
            break
        lots = [runs[i : i + AT_ONCE] for i in range(0, len(runs), AT_ONCE)]
        runs = [_merge_to(folder / "runs" / f"{shard}-m{stage}-{n}", lot) for n, lot in enumerate(lots)]
    with contextlib.ExitStack() as stack:
        yield from heapq.merge(*(stack.enter_context(run.open("rb")) for run in runs))


def _merge_to(path: Path, runs: Iterable[Path]) -> Path:
    with contextlib.ExitStack() as stack, path.open("wb") as out:
        out.writelines(heapq.merge(*(stack.enter_context(run.open("rb")) for run in runs)))
    for run in runs:
        run.unlink()
    return path
