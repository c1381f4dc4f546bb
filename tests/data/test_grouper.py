"""Grouping on disk: nothing lost, the same folder for any number of workers, memory that does not grow."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter, defaultdict

import pytest

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.grouped import Groups
from fedllm.data.grouper import group
from fedllm.data.load import load_federation


def write(path, rows):
    with path.open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return str(path)


def corpus(n=3000, seed=0):
    rnd = random.Random(seed)
    names = ["Ann", "Bob", "Ann B", "", "Zoë\tQ", 'quo"te', "o'x", *(f"s{i}" for i in range(200))]
    return [{"who": rnd.choice(names), "text": f"line {rnd.randrange(10**6)} é", "n": rnd.randrange(5)}
            for _ in range(n)]


def held(rows, by="who"):
    """The same in memory."""
    out = defaultdict(list)
    for row in rows:
        out[row[by]].append(row)
    return out


@pytest.mark.parametrize("shards", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_lost_and_workers_change_nothing(tmp_path, shards):
    rows = corpus(20_000)
    source = [write(tmp_path / "a.jsonl", rows[:12_345]), write(tmp_path / "b.jsonl", rows[12_345:])]
    counts = (1, 2) if shards == 7 else (1, 2, 4)
    made = [group(source, tmp_path / f"out{w}", "column:who", shards=shards, workers=w, memory_mb=1) for w in counts]
    assert all(m == made[0] for m in made) and made[0].rows == len(rows) and made[0].groups == len(held(rows))
    for name in ("groups.parquet", *(f"shard-{s:05d}.jsonl" for s in range(shards))):
        assert len({(tmp_path / f"out{w}" / name).read_bytes() for w in counts}) == 1
    groups, want = Groups(tmp_path / "out1"), held(rows)
    assert set(groups) == set(want) and all(list(groups[k]) == want[k] for k in want)
    assert groups.find("nobody") is None and "nobody" not in groups and 3 not in groups


def test_many_runs_are_merged_in_stages(tmp_path, monkeypatch):
    monkeypatch.setattr("fedllm.data.grouper.AT_ONCE", 3)
    rows = [{**r, "text": r["text"] * 60} for r in corpus(6000)]
    group(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "column:who", shards=1, memory_mb=1)
    groups, want = Groups(tmp_path / "out"), held(rows)
    assert all(list(groups[k]) == want[k] for k in want) and len(groups) == len(want)


def test_a_stream_gives_each_group_once_and_can_go_on(tmp_path):
    group(write(tmp_path / "a.jsonl", corpus()), tmp_path / "out", "column:who", shards=7)
    groups = Groups(tmp_path / "out")
    seen = [(k, list(rows)) for k, rows in groups.stream(3)]
    assert Counter(k for k, _ in seen) == Counter(list(groups)) and [k for k, _ in seen] != list(groups)
    assert [(k, list(rows)) for k, rows in groups.stream(3, skip=100)] == seen[100:]
    assert [k for k, _ in groups.stream(4)] != [k for k, _ in seen]


def test_slices_and_single_rows(tmp_path):
    rows = [{"who": "x", "i": i} for i in range(9)]
    group(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "column:who")
    got = Groups(tmp_path / "out")["x"]
    assert got[2] == rows[2] and got[-1] == rows[-1] and got[1:7:2] == rows[1:7:2]
    with pytest.raises(IndexError):
        got[9]


@pytest.mark.parametrize("key, groups", [("random:10", 10), ("dirichlet:n:10:0.2", 10), ("host:url", 2)])
def test_built_in_keys_depend_on_seed_and_row_alone(tmp_path, key, groups):
    rows = [{**r, "url": f"http://h{i % 2}.org/{i}"} for i, r in enumerate(corpus(2000))]
    source = write(tmp_path / "a.jsonl", rows)
    for w in (1, 2):
        group(source, tmp_path / f"w{w}", key, shards=8 // w, memory_mb=w, seed=5)
    group(source, tmp_path / "other", key, seed=6)
    one, two, other = ({k: list(v) for k, v in Groups(tmp_path / d).items()} for d in ("w1", "w2", "other"))
    assert one == two and (one != other or key == "host:url") and len(one) <= groups
    if key.startswith("random"):
        assert len(one) == groups and max(map(len, one.values())) < 2 * 2000 / groups
    if key.startswith("dirichlet"):  # few groups hold most rows of a label
        zeros = Counter(k for k, v in one.items() for r in v if r["n"] == 0)
        assert max(zeros.values()) > 2 * sum(zeros.values()) / groups


COUNTER = iter(range(10**9))


@pytest.mark.parametrize("key, error, says", [
    (lambda r: r["text"].split()[7], DataError, r"a\.jsonl, line 1: the key function '.*lambda.*' raised IndexError"),
    (lambda r: 1 // max(0, 4 - r["i"]), DataError, r"a\.jsonl, line 5: the key function .* raised ZeroDivisionError"),
    (lambda r: None, DataError, "gave None; a key is text, bytes or a whole number"),
    (lambda r: b"\xff", DataError, "bytes that are no UTF-8"),
    (lambda r: next(COUNTER), DataError, "it must be pure: no counters"),
    ("column:nobody", DataError, "has no field 'nobody'"),
    ("colum:who", RecipeError, "did you mean 'column'"),
    ("random:0", RecipeError, "'0' is no number of groups"),
    ("dirichlet:n:10:0", RecipeError, "'0' is no concentration"),
    ("call:json:nothing", RecipeError, "cannot be imported"),
    (7, RecipeError, "key = 7: allowed is a function"),
])
def test_bad_keys(tmp_path, key, error, says):
    source = write(tmp_path / "a.jsonl", [{"who": "x", "text": "a b", "i": i} for i in range(9)])
    with pytest.raises(error, match=says):
        group(source, tmp_path / "out", key)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("knobs, says", [({"shards": 0}, "shards = 0"), ({"workers": True}, "workers = True"),
                                         ({"group_byte_limit": -1}, "group_byte_limit = -1")])
def test_bad_knobs(tmp_path, knobs, says):
    with pytest.raises(RecipeError, match=says):
        group("x.jsonl", tmp_path / "out", "column:who", **knobs)


def test_bad_files(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"who": "x"}\n{"who"\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: broken JSON"):
        group(str(tmp_path / "b.jsonl"), tmp_path / "out", "column:who")
    with pytest.raises(DataError, match="no such file"):
        group(str(tmp_path / "c.jsonl"), tmp_path / "out", "column:who")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="is there already"):
        group(str(tmp_path / "b.jsonl"), tmp_path / "out", "column:who")
    with pytest.raises(DataError, match="no folder that `fedllm group` has written"):
        Groups(tmp_path / "out")


def test_a_group_over_the_limit_is_left_out_and_counted(tmp_path, caplog):
    rows = [{"who": "big", "text": "x" * 100}] * 50 + [{"who": "small", "text": "y"}] * 3
    made = group(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "column:who", group_byte_limit=1000, shards=1)
    assert (made.groups, made.rows, made.dropped_groups, made.dropped_rows) == (1, 3, 1, 50)
    assert "1 groups with 50 rows are over group_byte_limit" in caplog.text
    assert {k: list(v) for k, v in Groups(tmp_path / "out").items()} == {"small": rows[50:]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".parquet"])
def test_other_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"who": ["x", "y", "x"], "n": [1, 2, 3]}), path)
        want = {"x": [{"who": "x", "n": 1}, {"who": "x", "n": 3}], "y": [{"who": "y", "n": 2}]}
    elif suffix == ".txt":
        path.write_text("x 1\n\ny 2\nx 3\n")
        want = {"x": [{"text": "x 1"}, {"text": "x 3"}], "y": [{"text": "y 2"}]}
    else:
        sep = {".csv": ",", ".tsv": "\t"}[suffix]
        path.write_text(f'who{sep}n\nx{sep}"1\n1"\ny{sep}2\nx{sep}3\n')
        want = {"x": [{"who": "x", "n": "1\n1"}, {"who": "x", "n": "3"}], "y": [{"who": "y", "n": "2"}]}
    key = (lambda r: r["text"][0]) if suffix == ".txt" else "column:who"
    group(str(path), tmp_path / "out", key)
    assert {k: list(v) for k, v in Groups(tmp_path / "out").items()} == want


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mb", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_memory(tmp_path, mb):
    """Half of the bytes are one group. Dossier, at 200 MB: streaming takes at most 30 MB, a dict of lists over 200."""
    text = "x" * 1000
    source = write(tmp_path / "a.jsonl", ({"who": "big" if i % 2 else f"s{i % 501}", "text": text}
                                          for i in range(mb * 1000)))
    limit = 30 if mb == 200 else 4
    grouped = peak(lambda: group(source, tmp_path / "out", "column:who", memory_mb=1 if mb < 200 else 16))
    groups = Groups(tmp_path / "out")
    assert groups.bytes.max() > mb * 500_000
    streamed = peak(lambda: sum(len(row["text"]) for _, rows in groups.stream(0) for row in rows))
    assert grouped < limit and streamed < limit
    assert peak(lambda: held(map(json.loads, open(source)))) > mb  # noqa: SIM115


def test_groups_are_clients_of_a_recipe(tmp_path):
    rows = [{"who": f"w{i % 50}", "q": f"q{i}", "a": f"a{i}"} for i in range(50 * 12)]
    group(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "column:who")
    spec = {"source": f"grouped:{tmp_path / 'out'}", "fields": {"prompt": "q", "response": "a"}, "test": 0.2,
            "partition": {"kind": "grouped", "clients": 30, "max_rows": 11}}
    fed, again = load_federation(spec, 1), load_federation(spec, 1)
    assert fed.streamed and len(fed.clients) == 30 and len(fed.test) == 10 * 12
    held_out = {r["response"] for r in fed.test}
    for (c, shard), (d, same) in zip(fed.clients.items(), again.clients.items(), strict=True):
        assert c == d and c in fed.clients and list(shard.train) == list(same.train) == list(fed.clients[c].train)
        assert (len(shard.train), len(shard.test)) == (10, 1) and len(list(shard.train)) == 10
        want = [{"prompt": r["q"], "response": r["a"]} for r in rows if r["who"] == c][:11]
        got = [{k: r[k] for k in ("prompt", "response")} for r in (*shard.train, *shard.test)]
        assert sorted(map(str, got)) == sorted(map(str, want))
        assert not held_out & {r["response"] for r in got}
    other = load_federation({**spec, "partition": {"kind": "grouped", "clients": 30}}, 2)
    assert list(other.clients) != list(fed.clients)
    plain = load_federation({k: v for k, v in spec.items() if k != "partition"}, 1)
    assert len(plain.clients) == 40


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-9]),
                                  lambda p: p.write_bytes(b"{}\n" + p.read_bytes()),
                                  lambda p: p.write_bytes(2 * p.read_bytes()),
                                  lambda p: p.write_bytes(b"\0" * p.stat().st_size)])
def test_a_shard_that_is_gone_or_another_is_said_and_no_other_row_is_read(tmp_path, harm):
    """Before the run, or in its midst: a client's rows are read whenever it is asked."""
    group(write(tmp_path / "a.jsonl", corpus(50)), tmp_path / "out", "column:who", shards=1)
    groups = Groups(tmp_path / "out")
    assert all(list(rows) for rows in groups.values())
    harm(tmp_path / "out" / "shard-00000.jsonl")
    for _, rows in groups.stream(0):
        with pytest.raises(DataError, match=r"shard-00000\.jsonl is not as `fedllm group` wrote it"):
            next(iter(rows))


@pytest.mark.parametrize("change, says", [
    ({"partition": {"kind": "iid", "clients": 3}}, "the groups of .* are the clients already"),
    ({"partition": {"kind": "grouped", "clients": 99}}, "has 5 groups .* and 99 clients are asked for"),
    ({"partition": {"kind": "grouped", "max_rows": 0}}, "data.partition.max_rows = 0"),
    ({"task": "classification"}, "data.labels must be given"),
    ({"public": 0.1}, "use data.partition.clients and max_rows"),
    ({"source": "grouped:/nowhere"}, "no folder that `fedllm group` has written"),
    ({"source": "a.jsonl", "partition": {"kind": "grouped"}}, "no such file"),
])
def test_bad_grouped_sources(tmp_path, change, says):
    group(write(tmp_path / "a.jsonl", [{"who": f"w{i}", "prompt": "p", "response": "r"} for i in range(5)]),
          tmp_path / "out", "column:who")
    with pytest.raises((DataError, RecipeError), match=says):
        load_federation({"source": f"grouped:{tmp_path / 'out'}", "test": 0.0, **change}, 0)
