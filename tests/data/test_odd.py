"""Kinds that a newcomer ran into: files of another kind, joined files, labels written in two ways, rows not meant."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.data.section import checked
from fedllm.data.sources import read_tables
from fedllm.data.stream import stream_rows
from fedllm.tasks.row import nearest

QA = {"fields": {"prompt": "q", "response": "a"}, "template": "plain", "test": 0.0,
      "partition": {"kind": "iid", "clients": 1}}
CLASSES = {"task": "classification", "fields": {"text": "t", "label": "l"}, "test": 0.0,
           "partition": {"kind": "iid", "clients": 1}}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(n=12, **more):
    return [{"q": f"{i} and {i}?", "a": f"it is {2 * i}", **more} for i in range(n)]


def classes(path, labels, text="text {}"):
    return lines(path, [{"t": text.format(i), "l": label} for i, label in enumerate(labels)])


@pytest.mark.parametrize("start, said", [
    (gzip.compress(b"q,a\n1,2\n", mtime=0), "gzip"), (b"PK\x03\x04\x14\x00\x06\x00", "ZIP archive or an office file"),
    (b"\xd0\xcf\x11\xe0\xa1", "office file"), (b"%PDF-1.7\n1 0 obj\n", "PDF"), (b"{\\rtf1\\ansi hello}", "RTF"),
    (b"PAR1\x15\x04", "Parquet"), (b"ARROW1\0\0", "Arrow"), (b"SQLite format 3\0", "SQLite"),
    (b"BZh91AY&SY", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd\x04", "zstd"),
    (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>\n", "XML")])
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_a_file_of_another_kind_than_its_ending_says_is_refused_by_kind(tmp_path, start, said, ending):
    (tmp_path / f"a.{ending}").write_bytes(start)
    with pytest.raises(DataError, match=said):
        read_tables(str(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize("name, said", [
    ("a.csv.gz", "unpack it first"), ("a.xlsx", "save the sheet as CSV"), ("a.pkl", "may run code"),
    ("a.feather", "write it as Parquet"), ("s/*.jsonl", "patterns and variables are not put in"),
    ("$HOME/a.jsonl", "patterns and variables"), ("https://x.org/a.jsonl", "fetched from a URL"),
    ("s3://b/a.jsonl", "fetched from a URL")])
def test_what_is_not_read_is_refused_with_what_to_do(tmp_path, name, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        read_tables(name)


@pytest.mark.parametrize("key", ["source", "test", "public"])
@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_not_the_folder_that_one_stands_in(key, path):
    with pytest.raises(RecipeError, match=rf"data\.{key} = '{path}': a path is not empty"):
        checked({"source": "office", key: path})


@pytest.mark.parametrize("text", ["0.1", "10%", "1e-3", " .2"])
def test_a_fraction_in_quotes_is_no_file(text):
    with pytest.raises(RecipeError, match=r"data\.test = .*a fraction is a number without quotes"):
        checked({"source": "a.jsonl", "test": text})


@pytest.mark.parametrize("again", ["q,a", "\ufeffq,a"])
def test_files_that_were_joined_do_not_make_rows_of_headers(tmp_path, again):
    (tmp_path / "a.csv").write_text(f"q,a\n1,2\n{again}\n3,4\n")
    for read in (read_tables, lambda path: list(stream_rows(path))):
        with pytest.raises(DataError, match=r"line 3: Row #3 is the header once more"):
            read(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("text\none\ntext\n")  # of one column it may be a row
    assert len(read_tables(str(tmp_path / "b.csv"))[0].rows) == 2


def test_two_columns_of_one_name_are_refused_in_every_format(tmp_path):
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"])] * 3, names=["q", "a", "a"]), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("q,,\n1,2,3\n")
    for name, said in (("a.parquet", "'a' is the name of more than one column"), ("b.csv", "names '' more than once")):
        for read in (read_tables, lambda path: list(stream_rows(path))):
            with pytest.raises(DataError, match=said):
                read(str(tmp_path / name))


def test_narrow_floats_are_the_numbers_that_were_written(tmp_path):
    parquet.write_table(pa.table({"q": ["x", "y"], "a": pa.array([0.1, None], pa.float32()),
                                  "h": pa.array([np.float16(0.3), np.float16(2)], pa.float16())}),
                        tmp_path / "a.parquet")
    assert [(r["a"], r["h"]) for r in read_tables(str(tmp_path / "a.parquet"))[0].rows] == [(0.1, 0.3), (None, 2.0)]


def test_files_with_one_stem_are_clients_of_their_own(tmp_path):
    for name in ("a.jsonl", "a.ndjson", "b.jsonl"):
        lines(tmp_path / name, qa(3))
    got = load_federation({"source": str(tmp_path), **QA, "partition": {"kind": "per_file"}}, 0)
    assert len(got.clients) == 3 and all(len(s.train) == 3 for s in got.clients.values())


def test_a_saved_dataset_without_rows_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"q": "x", "a": "y"}]).select([]).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(DataError, match="s is "):
        read_tables(str(tmp_path / "s"))


def test_a_name_in_another_case_is_the_nearest():
    assert nearest("q", ["Q", "qq"]) == "; did you mean 'Q'?" and nearest("a", [" a"]) == "; did you mean ' a'?"


@pytest.mark.parametrize("labels", [["01", "1"], ["-0", "0"], ["1.50", "1.5"], ["\u0661", "1"], ["+1", "1"],
                                    ["1e3", "1000"]])
def test_labels_that_are_one_number_are_refused(tmp_path, labels):
    with pytest.raises(DataError, match="are one number and would be two classes"):
        load_federation({"source": classes(tmp_path / "a.jsonl", labels * 4), **CLASSES}, 0)


@pytest.mark.parametrize("labels, said", [
    ([], "each once and none of them empty"), (["a", "b", "a"], "each once"), (["a", " "], "none of them empty"),
    (["a", "b", "A"], "differ in case"), (["1", "01"], "are one number")])
def test_labels_of_the_recipe_are_told_apart_too(labels, said):
    with pytest.raises(RecipeError, match=rf"data\.labels = .*{said}"):
        checked({"source": "a.jsonl", "task": "classification", "labels": labels})
    checked({"source": "a.jsonl", "task": "classification", "labels": ["1", "2", "unknown", "C", "C++", "C#"]})


@pytest.mark.parametrize("labels, said", [
    (["not_spam", "not spam", "ham"], "differ in marks alone"), (["'a'", "a"], "differ in marks alone"),
    (["spam.", "spam"], "marks alone"), (["a-b", "a\u2013b"], "marks alone"), (["yes", "no", "Y"], "mean the same"),
    (["false", "no", "x"], "mean the same"), ([f"c{i}" for i in range(24)], "24 labels for 24 rows"),
    (["C", "C++", "C#"], None), (["-1", "1"], None), (["A-", "A", "A+"], None), (["yes", "no"], None)])
def test_labels_that_may_be_one_are_said(tmp_path, labels, said):
    rows = labels if len(labels) > 20 else labels * 8
    got = load_federation({"source": classes(tmp_path / "a.jsonl", rows), **CLASSES, "client_test": 0.0}, 0)
    assert (said is None and not got.cautions) or any(said in one for one in got.cautions), got.cautions


def test_a_label_of_no_row_and_a_text_of_two_labels_are_said(tmp_path):
    source = classes(tmp_path / "a.jsonl", ["a", "b"] * 3, text="same")
    said = load_federation({"source": source, **CLASSES, "labels": ["a", "b", "c"], "client_test": 0.0}, 0).cautions
    assert any("no row has the label 'c'" in s for s in said)
    assert any("1 texts stand there under more" in s for s in said)
    test = lines(tmp_path / "t.jsonl", [{"t": "new", "l": "z"}, {"t": "old", "l": "a"}])
    said = load_federation({"source": source, **CLASSES, "test": test}, 0).cautions
    assert any("the label 'z' is of rows of the test alone" in s for s in said)


def test_a_test_among_the_training_rows_is_said_by_its_name(tmp_path):
    (tmp_path / "s").mkdir()
    for name in ("train", "test"):
        lines(tmp_path / "s" / f"{name}.jsonl", [{"q": f"{name} {i}", "a": f"no {i}"} for i in range(4)])
    said = load_federation({"source": str(tmp_path / "s"), **QA}, 0).cautions
    assert any("test.jsonl is among the rows that are trained on" in s for s in said)
    assert not load_federation({"source": str(tmp_path / "s"), **QA, "test": str(tmp_path / "s" / "test.jsonl")},
                               0).cautions
    rows = [row | {"split": "test" if i > 8 else "train"} for i, row in enumerate(qa())]
    said = load_federation({"source": lines(tmp_path / "a.jsonl", rows), **QA}, 0).cautions
    assert any("the column 'split' calls 3 of 12 rows a test" in s for s in said)
    (tmp_path / "b.json").write_text(json.dumps({"train": qa(4), "test": [{"q": "z", "a": "w"}]}))
    said = load_federation({"source": str(tmp_path / "b.json"), **QA}, 0).cautions
    assert any("the column 'client' calls 1 of 5 rows a test" in s for s in said)


def test_rows_of_clients_own_tests_that_are_trained_on_are_said(tmp_path):
    rows = [row for row in qa(10) for _ in range(2)]
    said = load_federation({"source": lines(tmp_path / "a.jsonl", rows), **QA, "client_test": 0.2}, 0).cautions
    assert any("rows of clients' own tests stand among the training rows" in s for s in said)
    said = load_federation({"source": lines(tmp_path / "b.jsonl", qa()), **QA, "test": 0.01}, 0).cautions
    assert said == ("data.test = 0.01 of 12 rows is less than one row: there is no global test",)


@pytest.mark.parametrize("row, said", [
    ({"q": "caf\ufffd", "a": "y"}, "characters that were lost"),
    ({"q": "x", "a": "caf\u00c3\u00a9"}, "another encoding"),
    ({"q": "it\u00e2\u20ac\u2122s", "a": "y"}, "another encoding"), ({"q": "x", "a": "NaN"}, "missing value"),
    ({"q": "x", "a": "#REF!"}, "missing value"), ({"q": " \u200b", "a": "y"}, "nothing to read"),
    ({"q": "na\u00efve \u00c3O \u2014 \u20ac5", "a": "none of them"}, None)])
def test_what_rows_hold_that_was_hardly_meant_is_said(tmp_path, row, said):
    got = load_federation({"source": lines(tmp_path / "a.jsonl", [*qa(), row]), **QA, "client_test": 0.0}, 0).cautions
    assert (said is None and not got) or (said in got[0] and "a.jsonl, row 13 (line 13) has" in got[0])


@pytest.mark.parametrize("template", [{"prompt": "{q} {a}", "response": "{a}"}, {"prompt": "{a}", "response": "{a}"}])
def test_a_prompt_that_tells_the_answer_is_said(tmp_path, template):
    source = lines(tmp_path / "a.jsonl", qa())
    said = load_federation({"source": source, **QA, "template": template, "client_test": 0.0}, 0).cautions
    assert len(said) >= 2 and "into the prompt and into the response" in said[0]
    assert "every prompt ends with its own response" in said[-1]


@pytest.mark.parametrize("tags", [["X", 1], ["x", "X"], ["B-PER", "B-per"]])
def test_tags_are_held_to_what_labels_are(tmp_path, tags):
    source = lines(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": tags}] * 4)
    with pytest.raises(DataError, match=r"would (be two|all be) classes"):
        load_federation({"source": source, "task": "tokens", "partition": {"kind": "iid", "clients": 1}}, 0)


def test_a_target_that_no_loss_can_hold_and_a_hub_name_that_is_none_are_refused(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"text": "x", "target": 1.5}, {"text": "y", "target": 1e300}])
    with pytest.raises(DataError, match=r"row 2 .*'target' is 1e\+300; it must be a finite number, of 1e18 at most"):
        load_federation({"source": source, "task": "regression", "partition": {"kind": "iid", "clients": 1}}, 0)
    with pytest.raises(DataError, match=r"'hub:' names no dataset"):
        read_tables("hub:")


@pytest.mark.parametrize("ending, sign", [("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", ",")])
def test_fields_that_another_sign_parts_are_told_as_such(tmp_path, ending, sign):
    (tmp_path / f"a.{ending}").write_text(f"q{sign}a\nx{sign}y\n")
    with pytest.raises(DataError, match=r"has no field 'q'; it has .* parted by another sign than its ending says"):
        load_federation({"source": str(tmp_path / f"a.{ending}"), **QA}, 0)
