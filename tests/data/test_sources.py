"""Rows of every kind of file come in as they are, and what cannot be read is refused by name."""

import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.sources import map_fields, read_tables, resolve
from fedllm.tasks.labels import index_of, label_names, raw_label
from fedllm.tasks.templates import template

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": "a, \"b\"\nc?", "answer": "007"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(path):
    return [dict(row) for table in read_tables(path) for row in table.rows]


def write_jsonl(path):
    write(path, "\n\n".join(json.dumps(row) for row in ROWS) + "\n")


def write_json(path):
    write(path, json.dumps(ROWS, indent=1))


def write_csv(path):
    write(path, '\ufeffquestion,answer\n2+2?,4\n"a, ""b""\nc?",007\n')


def write_tsv(path):
    write(path, 'question\tanswer\n2+2?\t4\n"a, ""b""\nc?"\t007\n')


def write_parquet(path):
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("name, writer", [("a.jsonl", write_jsonl), ("a.JSON", write_json), ("a.csv", write_csv),
                                          ("a.tsv", write_tsv), ("a.parquet", write_parquet)])
def test_every_format_gives_the_same_rows(tmp_path, name, writer):
    writer(tmp_path / name)
    assert rows_of(str(tmp_path / name)) == ROWS


def test_text_gives_a_row_a_line_and_keeps_its_line_number(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\n  two\n")
    (table,) = read_tables(path)
    assert list(table.rows) == [{"text": "one"}, {"text": "  two"}]
    assert table.where(1) == f"{path}, row 2 (line 3)"


def test_saved_datasets_are_read_by_split_with_their_class_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}], features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "dev": data}).save_to_disk(str(tmp_path / "many"))
    for folder in ("one", "many"):
        (table,) = read_tables(str(tmp_path / folder))
        assert list(table.rows) == [{"text": "a", "label": "yes"}]
        assert table.classes == {"label": ("no", "yes")}
    with pytest.raises(DataError, match=r"'tain'.*train, dev.*did you mean 'train'"):
        read_tables(str(tmp_path / "many"), split="tain")


def test_a_folder_is_its_files_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "notes.pdf"):
        write(tmp_path / name, name)
    assert [table.rows[0]["text"] for table in read_tables(str(tmp_path))] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name, text, said", [
    ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: broken JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2 is a JSON list"),
    ("a.json", '[{"a": 1},\n{]', r"a\.json, line 2: broken JSON"),
    ("a.json", '{"a": 1}', "holds a JSON dict, not a list"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv, line 3: Row #3: Expected 2 columns, got 3"),
    ("a.csv", "a,a\n1,2\n", "the header names .a. more than once"),
    ("a.csv", "a,b\n", "is empty"),
    ("a.csv", "", "is empty"),
    ("a.json", "", "is empty"),
    ("a.jsonl", "\n", "is empty"),
    ("a.txt", "", "is empty"),
    ("a.parquet", "nonsense", "not a Parquet file"),
    ("a.docx", "x", r"unknown extension '\.docx'; known are \.jsonl"),
])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, text, said):
    with pytest.raises(DataError, match=said):
        read_tables(write(tmp_path / name, text))


def test_missing_files_empty_lists_empty_folders_and_other_encodings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl': no such file or folder"):
        read_tables(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="empty list"):
        read_tables([])
    with pytest.raises(DataError, match=r"no saved dataset, no folders of pictures .* and no file with one of"):
        read_tables(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_tables(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("source", ["owner/name", "hub:name"])
def test_the_hub_is_asked_by_id_and_an_unreachable_hub_is_named(monkeypatch, source):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        raise ConnectionError("no route\nRetrying")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"name' is no local file and could not be reached on the Hub \(no route\)"):
        read_tables(source, "test", "main")
    assert asked == [(source.removeprefix("hub:"), "main", "test")]


def test_shared_paths_resolve_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_DATA", str(tmp_path))
    path = write(tmp_path / "a.txt", "x")
    assert str(resolve("shared:a.txt")) == path
    with pytest.raises(DataError, match=r"there is no .*b\.txt; FEDLLM_DATA is .* and the default folder is"):
        resolve("shared:b.txt")


def test_fields_are_mapped_and_a_missing_one_names_the_nearest():
    assert map_fields(ROWS[0], {"prompt": "question"}, "x")["prompt"] == "2+2?"
    with pytest.raises(DataError, match=r"f, row 1 has no field 'questoin'; it has question, answer; .*'question'"):
        map_fields(ROWS[0], {"prompt": "questoin"}, "f, row 1")


def test_templates_make_prompt_and_response():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "question": "q", "answer": 7, "text": "t"}
    assert template("alpaca")(row, "r")["prompt"].endswith("### Input:\n1 2\n\n### Response:\n")
    assert "### Input" not in template("alpaca")({**row, "input": None}, "r")["prompt"]
    assert template("question_answer")(row, "r") == {"prompt": "Question: q\nAnswer:", "response": " 7"}
    assert template("text")(row, "r") == {"prompt": "", "response": "t"}
    own = template({"prompt": "{{x}} {question}", "response": "{answer}"})
    assert own(row, "r") == {"prompt": "{x} q", "response": "7"}
    assert template(None)({"prompt": "p", "response": "r"}, "r") == {"prompt": "p", "response": "r"}
    with pytest.raises(DataError, match=r"r has no field 'qestion'.*did you mean 'question'"):
        template("{qestion}")(row, "r")


@pytest.mark.parametrize("bad", ["alpca", "{x", "{}", "{x!r}", "{x:>3}", {"response": "{a}"},
                                 {"prompt": "a", "b": "c"}])
def test_broken_templates_are_refused_before_any_row(bad):
    with pytest.raises(RecipeError, match=r"data\.template"):
        template(bad)


def test_chat_keeps_messages_and_makes_them_of_a_pair():
    made = template("chat")({"prompt": "p", "response": "r"}, "x")
    assert made["messages"] == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
    assert template("chat")({"messages": made["messages"]}, "x") == made
    for wrong in ("hi", made["messages"][:1], [{"role": "user"}, {"role": "assistant"}]):
        with pytest.raises(DataError, match="'messages' must"):
            template("chat")({"messages": wrong}, "x")


def test_labels_sort_and_index():
    assert label_names(["10", "2", "2"]) == ("2", "10")
    assert label_names([1, -1]) == ("-1", "1")
    assert index_of("b", ("a", "b"), "x") == 1
    assert index_of(1, ("a", "b"), "x") == 1
    for label, said in (("sports", "mean 'sport'"), (2, "the labels are"), (0.5, "whole number"), (None, "whole")):
        with pytest.raises(DataError, match=said):
            index_of(raw_label({"label": label}, "x"), ("sport", "b"), "x")


@pytest.mark.parametrize("label", [0, "0", 6, "-1"])
def test_a_number_is_no_place_where_labels_are_numbers(label):
    """Five stars are 1 to 5: a 0 must not become the class "1" in silence, nor a 1 the class "2"."""
    stars = ("1", "2", "3", "4", "5")
    assert index_of(1, stars, "x") == 0
    with pytest.raises(DataError, match=r"'label' is .*; the labels are 1, 2, 3, 4, 5"):
        index_of(label, stars, "notes.csv, row 3")


@pytest.mark.parametrize("values, said", [
    (["urgent", "Urgent"], "the labels 'Urgent' and 'urgent' differ in case or blanks alone"),
    (["urgent", "urgent "], "differ in case or blanks"),
    (["urgent", "calm", 0], "labels are numbers here and words there \\('0', 'calm'\\)"),
])
def test_one_label_written_in_two_ways_is_refused(values, said):
    with pytest.raises(DataError, match=said):
        label_names(values)
