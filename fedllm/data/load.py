"""Builds the federation that a recipe's `data` section describes: read, shape, hold out, share out among clients."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.errors import DataError, RecipeError
from fedllm.core.rng import numpy_stream
from fedllm.data.cluster import Embed
from fedllm.data.entities import kept_back
from fedllm.data.federation import Federation, Row, Shard
from fedllm.data.grouped import PREFIX, grouped_clients
from fedllm.data.meant import alike, near_ids, odd_labels, twice, unread
from fedllm.data.odd import odd_classes, odd_texts, tests_among
from fedllm.data.partition import FILE, Grouped, partitioner
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.data.section import DOCUMENTS_TASK, DataSpec, OfficeSpec, checked
from fedllm.data.sequences import sequenced
from fedllm.data.simulated.registry import PREFIX as MADE
from fedllm.data.simulated.registry import simulated_tables
from fedllm.data.sources import map_fields, parted, read_tables, resolve
from fedllm.data.table import Table
from fedllm.data.windows import last_of_each, windowed
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import Placed
from fedllm.tasks.task import Shape
from fedllm.tasks.templates import template

HOLD_BACK_FROM = 10
"""Clients with fewer rows keep none back: a test of fewer than one row in ten says nothing."""

NAMED = ("by_key", "per_file")
"""Partitions whose clients are called as the data says."""


@dataclass(frozen=True)
class _Rows:
    """Rows as the model will see them, beside the same rows with every column, for partitioners to look at."""

    lean: Sequence[Row]
    wide: Sequence[Row]

    def take(self, which: np.ndarray) -> _Rows:
        return _Rows([self.lean[i] for i in which], [self.wide[i] for i in which])


def load_federation(spec: Mapping[str, Any] | DataSpec, seed: int, embed: Embed | None = None,
                    client: str | None = None) -> Federation:
    """The federation of a recipe's `data` section; equal spec and seed give equal clients, row for row.

    With `client` all rows are that one's, who keeps back what the same client of many would. `embed` serves
    `by_cluster`: a callable from texts to [n, dim], or an array with a row for each row of the source.
    Raises RecipeError for a wrong spec and DataError for rows that cannot be used.
    """
    spec = spec if isinstance(spec, DataSpec) else checked(spec)
    if spec.source == "office":
        from fedllm.data.office import office_federation

        return office_federation(**(spec.office or OfficeSpec()).model_dump(), seed=seed)
    if spec.acts:
        return environments(str(spec.source), spec.environment or EnvironmentSpec(), seed)
    parted([spec.source, spec.test, spec.public], spec.split, spec.subset)
    if isinstance(spec.source, str) and spec.source.startswith(PREFIX):
        return _grouped(spec, seed)
    held, open_ = (_apart(spec, part, seed) for part in ("test", "public"))
    tables = simulated_tables(str(spec.source), spec.simulated, seed) if spec.made else _sources(
        spec, [table.path for table in (*held, *open_) if table.path])
    if spec.windows is not None:
        learned = (1 - spec.client_test) * (1 - (spec.test if isinstance(spec.test, float) else 0.0))
        tables, held = windowed(tables, spec.windows, learned), windowed(held, spec.windows, 1.0)
    if spec.sequences is not None:
        tables, held, open_ = (sequenced(some, spec.sequences) for some in (tables, held, open_))
    labels = _labels(spec, [*tables, *held, *open_])
    said: list[str] = []
    rows, test = _shape(spec, tables, labels, said), _shape(spec, held, labels, said).lean
    kept = np.arange(len(rows.lean))
    if spec.limit is not None and spec.limit < len(kept):
        kept = np.sort(numpy_stream(seed, "data.limit").choice(kept, spec.limit, replace=False))
    if isinstance(spec.test, float):
        out, kept = _kept_back(spec, rows, kept, spec.test, numpy_stream(seed, "data.test"))
        test = rows.take(out).lean
    public = _shape(spec, open_, labels, said).lean
    if isinstance(spec.public, float) and spec.public:
        out, kept = _held_back(kept, spec.public, numpy_stream(seed, "data.public"))
        public = rows.take(out).lean
    if isinstance(embed, np.ndarray):
        if len(embed) != len(rows.lean):
            raise DataError(f"embed has {len(embed)} vectors; data.source has {len(rows.lean)} rows")
        embed = embed[kept]
    if spec.test_limit is not None and spec.test_limit < len(test):
        few = np.sort(numpy_stream(seed, "data.test_limit").choice(len(test), spec.test_limit, replace=False))
        test = [test[i] for i in few]
    mine = rows.take(kept)
    clients = _clients(spec, mine, labels, seed, embed, client)
    said += [*unread(spec.task, spec.template, spec.fields, tables), *odd_labels(labels), *alike(tables),
             *(near_ids(list(clients)) if spec.partition.get("kind") in NAMED else ())]
    if spec.windows is None and spec.sequences is None and not spec.made:
        said += _looked_at(spec, tables, mine.lean, test, public, labels, clients)
    elif spec.windows is None:
        said += twice(mine.lean, test)
    return Federation(clients, test, spec.task, labels, public, tuple(said))


def _looked_at(spec: DataSpec, tables: Sequence[Table], mine: Sequence[Row], test: Sequence[Row],
               public: Sequence[Row], labels: Sequence[str], clients: Mapping[str, Shard]) -> list[str]:
    """What is to be said of people's own rows."""
    but = set(spec.fields) - set(task_of(spec.task).columns)
    said = [*twice(mine, test, but=but), *odd_texts(mine),
            *(tests_among(tables) if spec.task != DOCUMENTS_TASK else ()),
            *twice(public, test, but=but, among="the public rows, which a method may train on,"),
            *twice(mine, public, "data.public", but, among="the clients' rows",
                   so="they are somebody's, and nothing protects them there")]
    if labels and task_of(spec.task).columns[-1] == "label":
        said += odd_classes(mine, test, labels, spec.labels is not None, isinstance(spec.test, str))
    if spec.entity is None and (own := [row for shard in clients.values() for row in shard.test]):
        said += twice([row for shard in clients.values() for row in shard.train], own, "clients' own tests", but)
    if isinstance(spec.test, float) and spec.test and not test:
        said.append(f"data.test = {spec.test} of {len(mine)} rows is less than one row: there is no global test")
    return said


def _sources(spec: DataSpec, but: Sequence[Path]) -> list[Table]:
    """The tables of `data.source`; documents among them are cut into passages."""
    if spec.task != DOCUMENTS_TASK:
        return read_tables(spec.source, spec.split, spec.subset, but=but)
    from fedllm.data.documents import DOCUMENTS, passages, told_apart

    tables = told_apart(read_tables(spec.source, spec.split, spec.subset, but, DOCUMENTS))
    return [passages(table, str(spec.fields.get("text", "text")), spec.passages) for table in tables]


def _grouped(spec: DataSpec, seed: int) -> Federation:
    """Clients that are groups on disk; their rows are shaped when they are read."""
    knobs = partitioner(spec.partition if spec.partition != DataSpec().partition else {"kind": "grouped"})
    if not isinstance(knobs, Grouped):
        raise RecipeError(f"data.partition.kind = {spec.partition.get('kind')!r}: the groups of {spec.source} are the "
                          "clients already; allowed is 'grouped', with clients, min_rows and max_rows")
    task, labels = task_of(spec.task), tuple(spec.labels or ())
    if "labels" in task.takes and not labels:
        raise RecipeError("data.labels must be given with grouped rows: to find them all rows would have to be read")
    if spec.limit is not None or (isinstance(spec.public, float) and spec.public):
        raise RecipeError("data.limit and a fraction for data.public need all rows in memory; with a grouped source "
                          "use data.partition.clients and max_rows, and a file for data.public")
    how = Shape(template(spec.template), labels)

    def shape(row: Row, where: str) -> Row:
        mapped = map_fields(row, spec.fields, where)
        made = task.shape(mapped, where, how)
        return {**{name: mapped[name] for name in (*spec.fields, "category") if name in mapped}, **made}

    read = lambda path: _shape(spec, read_tables(path, spec.split, spec.subset), labels).lean  # noqa: E731
    fraction = spec.test if isinstance(spec.test, float) else 0.0
    back = lambda n: min(round(spec.client_test * n), n - 1) if n >= HOLD_BACK_FROM else 0  # noqa: E731
    clients, test = grouped_clients(resolve(spec.source.removeprefix(PREFIX)), knobs, fraction, spec.test_limit, back,
                                    shape, seed)
    return Federation(clients, read(spec.test) if isinstance(spec.test, str) else test, spec.task, labels,
                      read(spec.public) if isinstance(spec.public, str) else (), streamed=True)


def _mapped(spec: DataSpec, table: Table) -> list[tuple[dict[str, Any], str]]:
    """Each row under fedllm's field names, and where it is."""
    out = []
    for i, row in enumerate(table.rows):
        at = table.where(i)
        try:
            out.append((map_fields(row, spec.fields, at), at))
        except DataError as error:
            raise error.at(table.name, i + 1) from None
    return out


def _labels(spec: DataSpec, tables: Sequence[Table]) -> tuple[str, ...]:
    """The recipe's labels, or those that the dataset declares, or those found in training and test rows together."""
    task = task_of(spec.task)
    if "labels" not in task.takes:
        return ()
    column = task.columns[-1]
    found = tuple(spec.labels or ()) or tables[0].classes.get(str(spec.fields.get(column, column)), ())
    at: list[Any] = ["", 0]

    def rows() -> Iterator[tuple[dict[str, Any], str]]:
        for table in tables:
            for i, row_at in enumerate(_mapped(spec, table)):
                at[:] = table.name, i + 1
                yield row_at

    try:
        found = found or task.found(rows())
        task.agree(rows(), found)
    except DataError as error:
        raise (error.at(*at) if error.kind == "label" else error) from None
    return found


def _file_names(tables: Sequence[Table]) -> list[str]:
    """A name for each file that no other has: its stem; where stems repeat its folder and stem, its folder and name, or
    its whole path."""
    paths = [Path(table.name) for table in tables]
    names = [path.stem for path in paths]
    for more in (lambda p: os.path.join(p.parent.name, p.stem), lambda p: os.path.join(p.parent.name, p.name), str):
        count = Counter(names)
        names = [more(path) if count[name] > 1 else name for path, name in zip(paths, names, strict=True)]
    return names


def _shape(spec: DataSpec, tables: Sequence[Table], labels: tuple[str, ...], said: list[str] | None = None) -> _Rows:
    """Rows of the task; what `fields` maps and `category` stay with the row, other columns only serve the partition.
    What was left out is added to `said`."""
    task, render = task_of(spec.task), template(spec.template)
    lean: list[Row] = []
    wide: list[Row] = []
    left: list[str] = []
    for file, table in zip(_file_names(tables), tables, strict=True):
        how = Shape(render, labels, table.folder)
        for i, (row, at) in enumerate(_mapped(spec, table)):
            try:
                made = task.shape(row, at, how)
            except DataError as error:
                if error.kind == "empty" and spec.empty == "leave_out":
                    left.append(at)
                    continue
                if error.kind == "empty" and "template" in task.takes:
                    error = DataError(f"{error} (data.empty: leave_out leaves such rows out)", kind="empty")
                raise error.at(table.name, i + 1) from None
            stays = {name: row[name] for name in (*spec.fields, "category") if name in row}
            lean.append(Placed({**stays, **made}, table.name, i + 1, table.lines[i] if table.lines else 0))
            wide.append({**row, **made, FILE: file})
    if left and said is not None:
        said.append(f"{len(left)} rows are left out, since their response is empty: {', '.join(left[:3])}"
                    + (", ..." if len(left) > 3 else ""))
    if tables and not lean:
        raise DataError(f"{tables[0].name}: every row has an empty response", file=tables[0].name, kind="empty")
    return _Rows(lean, wide)


def _held_back(rows: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(held back, left), each in the rows' order; one row at least is left."""
    count = min(round(fraction * len(rows)), len(rows) - 1)
    out = np.zeros(len(rows), dtype=bool)
    out[rng.permutation(len(rows))[:count]] = True
    return rows[out], rows[~out]


def _apart(spec: DataSpec, part: str, seed: int) -> list[Table]:
    """The tables of a test, or of public rows, that has a source of its own."""
    source = getattr(spec, part)
    if not isinstance(source, str):
        return []
    if source.startswith(MADE):
        return simulated_tables(source, spec.simulated, seed, part)
    return read_tables(source, spec.split, spec.subset)


def _kept_back(spec: DataSpec, rows: _Rows, which: np.ndarray, fraction: float, rng: np.random.Generator
               ) -> tuple[np.ndarray, np.ndarray]:
    """(held back, left) of these rows: of windows the last, else any."""
    if spec.windows is not None:
        return last_of_each(rows.wide, which, fraction, spec.windows.horizon)
    if spec.sequences is not None:
        return last_of_each(rows.wide, which, fraction, one=True)
    return _held_back(which, fraction, rng)


def of_client(spec: DataSpec, rows: _Rows, part: np.ndarray, seed: int, client: str) -> tuple[np.ndarray, np.ndarray]:
    """(kept back to test, left to learn from) of a client's rows; things' parts by what they are parts of."""
    if spec.entity is not None:
        out, left = kept_back(rows.take(part).lean, spec.client_test, seed)
        return part[out], part[left]
    fraction = spec.client_test if len(part) >= HOLD_BACK_FROM else 0.0
    return _kept_back(spec, rows, part, fraction, numpy_stream(seed, "data.client_test", client))


def _clients(spec: DataSpec, rows: _Rows, labels: tuple[str, ...], seed: int, embed: Embed | None,
             only: str | None = None) -> dict[str, Shard]:
    parts = {only: np.arange(len(rows.lean))} if only is not None else partitioner(spec.partition).split(
        rows.wide, numpy_stream(seed, "data.partition"), embed=embed)
    shards = {}
    for client, part in parts.items():
        test, train = of_client(spec, rows, np.array(part), seed, client)
        kinds = Counter(task_of(spec.task).kind(row, labels) for row in rows.take(train).lean)
        info: dict[str, Any] = {"partition": spec.partition.get("kind", "iid")}
        if set(kinds) != {None}:
            info["categories"] = dict(sorted(kinds.items(), key=str))
        shards[client] = Shard(rows.take(train).lean, rows.take(test).lean, info)
    return shards
