"""More of the kinds that people stumbled over: what is read twice, stands in for data, or cannot be seen."""

import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.client import SERVER
from fedllm.core.errors import DataError
from fedllm.data.federation import Federation, Shard
from fedllm.data.load import load_federation
from fedllm.data.memory import Held
from fedllm.data.partition import _safe_ids
from fedllm.data.sources import read_tables
from fedllm.tasks.row import is_blank, looks

QA = {"fields": {"prompt": "q", "response": "a"}, "template": "plain", "partition": {"kind": "per_file"}, "test": 0.0}


def rows(path, n=12, name=""):
    path.write_text("".join(json.dumps({"q": f"{name or path.stem} {i}", "a": f"y {i}"}) + "\n" for i in range(n)))
    return path


@pytest.mark.parametrize("link", [os.symlink, os.link, lambda a, b: None])
def test_one_file_under_two_names_is_refused_and_is_not_held_out_of_itself(tmp_path, link):
    first, other = rows(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    link(first, other)
    other = other if other.exists() else tmp_path / "x" / ".." / "a.jsonl"
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"data\.source: .* (are one file|is named twice)"):
        read_tables([str(first), str(other)])
    with pytest.raises(DataError, match=r"both in data\.source and held out"):
        load_federation({"source": str(first), **QA, "test": str(other)}, 0)
    if other.parent == tmp_path:
        with pytest.raises(DataError, match=r"are one file|is named twice"):
            read_tables(str(tmp_path))
    with pytest.raises(DataError, match="is named twice"):
        read_tables([str(tmp_path / "a.jsonl"), str(first)])


def test_a_link_that_leads_to_itself_is_refused_by_name(tmp_path):
    rows(tmp_path / "a.jsonl")
    os.symlink("b.jsonl", tmp_path / "b.jsonl")
    for source in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl.*no"):
            read_tables(str(source))


@pytest.mark.parametrize("start, said", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "pointer of Git LFS"),
    ("/annex/objects/SHA256E-s1--a.jsonl\n", "pointer of git-annex"),
    ("\ufeff<!DOCTYPE html><html><body>404</body></html>", "page of HTML")])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt", "parquet"])
def test_what_stands_in_the_place_of_data_is_refused(tmp_path, start, said, ending):
    (tmp_path / f"a.{ending}").write_text(start)
    with pytest.raises(DataError, match=said):
        read_tables(str(tmp_path / f"a.{ending}"))


def test_what_of_a_folder_is_not_read_is_said(tmp_path, caplog):
    rows(tmp_path / "a.jsonl")
    (tmp_path / "~$a.csv").write_bytes(b"\0")
    (tmp_path / "b.jsonl.gz").write_bytes(b"x")
    (tmp_path / "c.xlsx").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    rows(tmp_path / "more" / "d.jsonl")
    assert len(read_tables(str(tmp_path))) == 1
    assert all(name in caplog.text for name in ("b.jsonl.gz", "c.xlsx", "more/")) and "~$a" not in caplog.text


def test_a_list_in_lines_names_the_ending_that_it_should_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"q": 1, "a": 2}]')
    with pytest.raises(DataError, match=r"one JSON list over the whole file is called \.json"):
        read_tables(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt", "parquet"])
def test_rows_beyond_the_memory_are_refused_over_all_files_together(tmp_path, ending, monkeypatch):
    for name in "ab":
        values = [{"q": f"{name}{i}", "a": "y" * 100} for i in range(50)]
        if ending == "parquet":
            parquet.write_table(pa.Table.from_pylist(values), tmp_path / f"{name}.parquet")
        else:
            text = {"jsonl": "\n".join(map(json.dumps, values)), "txt": "\n".join(v["a"] for v in values),
                    "csv": "q,a\n" + "\n".join(f"{v['q']},{v['a']}" for v in values)}[ending]
            (tmp_path / f"{name}.{ending}").write_text(text)
    monkeypatch.setattr("fedllm.data.sources.Held", lambda: Held(80_000))
    assert len(read_tables(str(tmp_path / f"a.{ending}"))) == 1
    with pytest.raises(DataError, match=rf"b\.{ending}: after \d\d rows .*grouped:FOLDER"):
        read_tables(str(tmp_path))


def test_what_cannot_be_seen_is_no_answer_and_no_difference(tmp_path):
    assert all(map(is_blank, ["", " \n", "\u200b", "\x00\x01", "\u00a0\ufeff", "\u2028"])) and not is_blank("👍🏽")
    assert looks("CAFE\u0301 \u200b x") == looks("caf\u00e9\u00a0 X") == "café x"
    path = tmp_path / "a.jsonl"
    for answer in ("\u200b", "\x00\x01"):
        path.write_text(json.dumps({"q": "x", "a": answer}) * 1 + "\n")
        with pytest.raises(DataError, match="the response is empty"):
            load_federation({"source": str(path), **QA}, 0)


@pytest.mark.parametrize("labels", [["café", "cafe\u0301"], ["yes", "yes\u200b"], ["1", "\uff11"], ["1", "1.0"],
                                    ["positive", "p\u043esitive"], ["B", "\u0412"]])
def test_labels_that_look_alike_are_refused(tmp_path, labels):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"t": f"x {i}", "l": [*labels, "0" if labels[0] == "1" else "tea"][i % 3]}) + "\n"
        for i in range(12)))
    with pytest.raises(DataError, match=r"look alike .* would be two classes"):
        load_federation({"source": str(tmp_path / "a.jsonl"), "task": "classification",
                         "fields": {"text": "t", "label": "l"}}, 0)


def test_rows_files_and_ids_that_are_there_twice_are_said(tmp_path):
    (tmp_path / "sites").mkdir()
    rows(tmp_path / "sites" / "a.jsonl", name="a")
    rows(tmp_path / "sites" / "A .jsonl", name="a")
    rows(tmp_path / "test.jsonl", n=3, name="a")
    rows(tmp_path / "other.jsonl", n=3, name="b")
    said = load_federation({"source": str(tmp_path / "sites"), **QA, "test": str(tmp_path / "test.jsonl")}, 0).cautions
    assert any("3 of 3 rows of the global test stand among the training rows" in s for s in said)
    assert any("holds the very same rows as" in s for s in said)
    assert any("two whose ids look alike" in s for s in said)
    said = load_federation({"source": str(tmp_path / "sites" / "a.jsonl"), **QA,
                            "test": str(tmp_path / "other.jsonl")}, 0).cautions
    assert not said


def test_no_client_is_called_as_the_server_calls_itself():
    """Its rows would be everybody's."""
    assert SERVER not in _safe_ids([SERVER, "a"]) and len(set(_safe_ids([SERVER, f"{SERVER}~"]))) == 2
    with pytest.raises(DataError, match="no client may be called '__global__'"):
        Federation({SERVER: Shard([{"prompt": "a", "response": "b"}])}, [], "generation")
