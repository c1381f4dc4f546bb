"""Rows are read as what they say, or refused with file, row and kind: quotes, JSON, values, files, ids."""

import datetime
import decimal
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.errors import DataError
from fedllm.data.load import load_federation
from fedllm.data.partition import ByKey, _safe_ids
from fedllm.data.sources import read_tables
from fedllm.data.stream import stream_rows
from fedllm.tasks.row import Placed, as_text

QA = {"fields": {"prompt": "q", "response": "a"}, "template": "plain", "partition": {"kind": "iid", "clients": 2}}


def lines(n=20):
    return ["q,a", *(f"question {i},answer {i}" for i in range(n))]


def with_line(i, text, then=None, more=""):
    out = lines()
    out[i] = text
    for k, line in (then or {}).items():
        out[k] = line
    return "\n".join(out) + "\n" + more


@pytest.mark.parametrize("text, said", [
    (with_line(7, 'q7,"a7'), "line 8: .*never closed"),
    (with_line(7, '"q7,a7', {14: '"q14,a14'}), "line 8: .*not closed where it opened: on line 15"),
    (with_line(7, '"q7,a7', {14: '"q14, and more","a14"'}), "line 8: .*not closed where it opened"),
    (with_line(7, '"q7,a7', {14: 'q14",a14'}), "line 8: .*closes on line 15 and swallows"),
    (with_line(7, 'q7,"a"7'), "line 8: .*on line 8 text follows"),
    (with_line(7, "q7"), r"line 8: Row #8: Expected 2 columns, got 1 \(the header is row 1\)"),
])
def test_a_quote_never_swallows_rows(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    for read in (lambda: read_tables(str(tmp_path / "a.csv")), lambda: list(stream_rows(str(tmp_path / "a.csv")))):
        with pytest.raises(DataError, match=said) as caught:
            read()
        assert caught.value.kind == "broken"


def test_fields_over_many_lines_are_read_with_their_first_line(tmp_path):
    letter = "Dear Ann,\nall is well, here.\nBye, now, then,\nBob"
    (tmp_path / "a.csv").write_text(f'q,a\none,1\n"{letter}","say ""hi"""\nlast,3\n')
    (table,) = read_tables(str(tmp_path / "a.csv"))
    assert [r["q"] for r in table.rows] == ["one", letter, "last"] and table.rows[1]["a"] == 'say "hi"'
    assert table.lines == [2, 3, 7]
    long = "x" * 200_000
    (tmp_path / "b.csv").write_text(f"q,a\n{long},1\n")
    assert read_tables(str(tmp_path / "b.csv"))[0].rows[0]["q"] == long


@pytest.mark.parametrize("line, said", [
    ('{"q": "x", "a": "y", "a": ""}', "the key 'a' is given twice"),
    ('{"q": "x", "a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
    ('{"q": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ('{"q": "x", "a": ' + "9" * 5000 + "}", "too many digits"),
    ('{"q": "x", "a": 1e999}', "too large"),
    ('{"q": "x", "a": NaN}', "NaN is no JSON"),
    ('{"q": "x", "a": -Infinity}', "-Infinity is no JSON"),
    ('{"q": "x", "a": "half \\ud83d"}', "a'? holds half a character"),
    ('{"q": "x", "a": [{"b": "\\udc00"}]}', "a'?.0.b holds half a character"),
    ('{"q": "x", "a\\ud800": 1}', "a key holds half a character"),
    ('{"q": "x"\0}', "broken JSON"),
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "stream"])
def test_json_that_means_nothing_certain_is_refused_with_its_place(tmp_path, line, said, kind):
    good = '{"q": "w", "a": "z"}'
    path = tmp_path / ("a.json" if kind == "json" else "a.jsonl")
    path.write_text(f"[{good},\n{line}]" if kind == "json" else f"{good}\n\n{line}\n")
    with pytest.raises(DataError, match=said) as caught:
        list(stream_rows(str(path))) if kind == "stream" else read_tables(str(path))
    assert caught.value.kind == "broken"
    if kind == "jsonl":
        assert (caught.value.file, caught.value.row) == (str(path), 2) and "line 3" in str(caught.value)


def test_whole_characters_beyond_the_first_plane_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "\\ud83d\\ude00"}\n')
    assert read_tables(str(tmp_path / "a.jsonl"))[0].rows[0]["q"] == "\U0001f600"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_refused_and_a_mark_before_utf_8_is_no_text(tmp_path, name, encoding):
    body = {"a.jsonl": '{"q": "x"}\n', "a.csv": "q,a\nx,y\n", "a.txt": "x\n", "a.json": '[{"q": "x"}]'}[name]
    (tmp_path / name).write_bytes(body.encode(encoding))
    with pytest.raises(DataError, match=r"UTF-8|broken JSON"):
        read_tables(str(tmp_path / name))
    (tmp_path / name).write_bytes(body.replace("\n", "\r\n").encode("utf-8-sig"))
    (row,) = read_tables(str(tmp_path / name))[0].rows
    assert next(iter(row.values())) == "x" and "\ufeff" not in "".join(row)


@pytest.mark.parametrize("value, text", [
    (b"ward \xc3\xa9", "ward é"), (10.0, "10"), (-3.0, "-3"), (0.1, "0.1"), (1e300, "1e+300"), (7, "7"), (None, ""),
    (True, "True"), (datetime.date(2026, 1, 2), "2026-01-02"), (decimal.Decimal("1.50"), "1.50")])
def test_what_a_value_reads_as(value, text):
    assert as_text(value, "a", "x") == text


@pytest.mark.parametrize("value, said", [
    (b"\xff\xfe", "not UTF-8 text"), ({"text": ["ward 1"]}, "an object"), (["ward 1"], "a list"), ([], "a list"),
    (float("nan"), "not a finite number"), (float("inf"), "not a finite"), ("a\ud83d", "half a character"),
    (decimal.Decimal("NaN"), "of type Decimal"), (object(), "of type object")])
def test_what_has_no_one_text_is_refused(value, said):
    with pytest.raises(DataError, match=f"x: 'a' .*{said}"):
        as_text(value, "a", "x")


def table(tmp_path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_parquet_bytes_and_whole_floats_are_text(tmp_path):
    source = table(tmp_path, [{"q": b"ward", "a": float(i)} for i in range(20)])
    federation = load_federation({"source": source, **QA}, 0)
    assert {r["prompt"] for r in federation.pooled()} == {"ward"}
    assert {r["response"] for r in federation.pooled()} <= {str(i) for i in range(20)}


@pytest.mark.parametrize("bad", [None, "", "  ", {"b": 1}, ["x"]])
def test_an_empty_or_shapeless_answer_is_refused_with_file_and_row(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"w{i}", "a": bad if i in (3, 5) else "y"}) for i in range(20)))
    with pytest.raises(DataError, match=r"a\.jsonl, row 4 \(line 4\)") as caught:
        load_federation({"source": str(path), **QA}, 0)
    assert (caught.value.file, caught.value.row) == (str(path), 4)
    assert caught.value.kind == ("value" if isinstance(bad, dict | list) else "empty")
    if caught.value.kind == "empty":
        federation = load_federation({"source": str(path), **QA, "empty": "leave_out"}, 0)
        assert len(federation.pooled()) + len(federation.test) + sum(len(s.test) for s in federation.clients.values()
                                                                    ) == 18
        assert "2 rows are left out" in federation.cautions[0] and "row 4" in federation.cautions[0]


def test_rows_of_nulls_alone_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": null, "a": "y"}\n' * 12)
    with pytest.raises(DataError, match="every field of the prompt is null"):
        load_federation({"source": str(path), **QA}, 0)
    path.write_text('{"q": null, "a": null}\n' * 12)
    with pytest.raises(DataError, match="every row has an empty response"):
        load_federation({"source": str(path), **QA, "empty": "leave_out"}, 0)


def site(folder, name, n=12):
    (folder / name).write_text("".join(f'{{"q": "{name} {i}", "a": "y"}}\n' for i in range(n)))


def test_a_held_out_file_in_the_sources_folder_is_no_client(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "test.jsonl", "public.jsonl"):
        site(tmp_path, name)
    spec = {"source": str(tmp_path), **QA, "partition": {"kind": "per_file"}, "test": str(tmp_path / "test.jsonl"),
            "public": str(tmp_path / "." / "public.jsonl")}
    federation = load_federation(spec, 0)
    assert list(federation.clients) == ["a", "b"]
    assert {r["prompt"].split()[0] for r in federation.pooled()} == {"a.jsonl", "b.jsonl"}
    assert len(federation.test) == len(federation.public) == 12
    with pytest.raises(DataError, match=r"both in data\.source and held out"):
        load_federation({**spec, "source": [str(tmp_path / "a.jsonl"), str(tmp_path / "test.jsonl")]}, 0)
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path / "test.jsonl", tmp_path / "linked" / "x.jsonl")
    site(tmp_path / "linked", "y.jsonl")
    assert list(load_federation({**spec, "source": str(tmp_path / "linked")}, 0).clients) == ["y"]


def test_what_lies_beside_data_is_not_read(tmp_path, caplog):
    site(tmp_path, "a.jsonl")
    for name in (".DS_Store", "._a.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(b"\0\0\0")
    for name in ("README.txt", "readme.json", "LICENSE.txt", "README-2.txt"):
        (tmp_path / name).write_text("What this is")
    assert [t.name for t in read_tables(str(tmp_path))] == [str(tmp_path / "a.jsonl")]
    assert "README.txt" in caplog.text and "LICENSE.txt" in caplog.text
    site(tmp_path, "notice_board.jsonl")  # a name that only begins like one of them
    assert len(read_tables(str(tmp_path))) == 2


def test_a_pipe_in_a_folder_is_refused_and_never_waited_for(tmp_path):
    site(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    for source in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl.* is n.* file"):
            read_tables(str(source))


def test_ids_are_short_distinct_on_every_disk_and_null_is_nobodys():
    long = "ward " * 80
    a, b, c = _safe_ids([long, long + "x", "é" * 200])
    assert len({a, b, c}) == 3 and all(len(i.encode()) <= 120 for i in (a, b, c))
    assert _safe_ids(["Ward", "ward", "WARD"]) == ["Ward", "ward~2", "WARD~3"]
    assert _safe_ids(["caf\u00e9", "cafe\u0301"]) == ["café", "café~2"]
    rows = [{"k": k} for k in (None, "None", "null", 1.0, "b", None)]
    parts = ByKey("k").split(rows, None)
    assert sorted(map(len, parts.values())) == [1, 1, 1, 1, 2] and parts["1"] == [3]
    with pytest.raises(DataError, match="row 1: 'k' is a list"):
        ByKey("k").split([{"k": ["a"]}], None)


def test_columns_that_nobody_reads_are_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"instruction": "add {i}", "input": "1 2", "output": "{i}", "id": 4}}\n'
                            for i in range(20)))
    spec = {"source": str(path), "fields": {"prompt": "instruction", "response": "output"},
            "partition": {"kind": "iid", "clients": 2}}
    for template in ("chat", "plain", None):
        assert "'input'" in load_federation({**spec, "template": template}, 0).cautions[0]
    for template in ("alpaca", {"prompt": "{prompt} {input}", "response": "{response}"}):
        fields = {} if template == "alpaca" else spec["fields"]
        assert not load_federation({**spec, "fields": fields, "template": template}, 0).cautions


@pytest.mark.parametrize("labels, said", [([-1, 0, 1], "label -1"), (["a", "a"], "one label alone"), (["-", "+"], None),
                                          ([1, -1], None), ([1.0, 2.0], None)])
def test_odd_labels_are_said(tmp_path, labels, said):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"x {i}", "label": labels[i % len(labels)]}) + "\n" for i in range(24)))
    got = load_federation({"source": str(path), "task": "classification",
                           "partition": {"kind": "iid", "clients": 2}}, 0)
    assert (said is None and not got.cautions) or said in got.cautions[0]
    if labels == [1.0, 2.0]:
        assert got.labels == ("1", "2")


@pytest.mark.parametrize("label", ["", " ", None, float("nan"), 1.5, ["a"]])
def test_a_label_that_is_none_is_refused(tmp_path, label):
    path = table(tmp_path, [{"text": "x", "label": label}, {"text": "y", "label": label}])
    with pytest.raises(DataError, match=r"row 1: 'label' is") as caught:
        load_federation({"source": path, "task": "classification", "partition": {"kind": "iid", "clients": 1}}, 0)
    assert caught.value.row == 1


def test_a_zero_among_stars_is_told_as_what_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": i % 6}) + "\n" for i in range(24)))
    spec = {"source": str(path), "task": "classification", "labels": ["1", "2", "3", "4", "5"],
            "partition": {"kind": "iid", "clients": 2}}
    with pytest.raises(DataError, match=r"row 1 \(line 1\): 'label' is 0; the labels are 1, 2, 3, 4, 5") as caught:
        load_federation(spec, 0)
    assert (caught.value.row, caught.value.kind) == (1, "label")


def test_a_row_knows_its_place_through_a_pickle():
    import pickle

    row = pickle.loads(pickle.dumps(Placed({"a": 1}, "f.csv", 3, 4)))
    assert (row, row.file, row.row, row.line) == ({"a": 1}, "f.csv", 3, 4)
