"""Kinds that went wrong in silence: nulls that a file made, times out of order, keys that nobody reads, rows that are
elsewhere too."""

import contextlib
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.data.partition import partitioner
from fedllm.data.sources import read_tables
from fedllm.data.times import Clock

ONE = {"test": 0.0, "partition": {"kind": "iid", "clients": 1}}
QA = {**ONE, "fields": {"prompt": "q", "response": "a"}, "template": "plain"}
CHAT = {**ONE, "template": "chat"}
CLASSES = {**ONE, "task": "classification", "fields": {"text": "t", "label": "l"}}
PAIRS = {**ONE, "task": "preference"}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(n=12, **more):
    return [{"q": f"{i} and {i}?", "a": f"it is {2 * i}", **more} for i in range(n)]


def said(tmp_path, rows, base, **more):
    return "\n".join(load_federation({"source": lines(tmp_path / "a.jsonl", rows), **base, **more}, 0).cautions)


def talk(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def calls(tool, **arguments):
    schema = {"type": "function", "function": {"name": tool, "parameters": {"properties": {
        name: {"type": "string"} for name in arguments}}}}
    call = {"id": tool, "type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "go"},
                         {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [schema]}


def test_a_call_is_learned_without_the_arguments_of_other_tools(tmp_path):
    rows = [calls("weather", city="Rome"), calls("mail", to="x", body="y")]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    plain = load_federation({"source": lines(tmp_path / "a.jsonl", rows), **CHAT}, 0).clients["client-00"].train
    for name in ("a.parquet", "saved"):
        got = load_federation({"source": str(tmp_path / name), **CHAT}, 0).clients["client-00"].train
        assert [dict(row) for row in got] == [dict(row) for row in plain], name


@pytest.mark.parametrize("turns, why", [
    ([("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")], r"turn 2 \(the assistant's\) .* is empty"),
    ([("user", "a"), ("narrator", "b")], r"turn 2: the role is 'narrator'; allowed are"), ([], "holds no turns")])
def test_turns_that_teach_nothing_are_refused_where_they_stand(tmp_path, turns, why):
    with pytest.raises(DataError, match=why):
        said(tmp_path, [talk(*turns)], CHAT)


def test_roles_are_read_as_people_write_them(tmp_path):
    assert said(tmp_path, [talk(("Human ", "a"), ("AI", "b"))], CHAT) == ""


@pytest.mark.parametrize("key", ["images", "refusal", "reasoning_content"])
def test_what_a_turn_has_beside_text_is_refused(tmp_path, key):
    with pytest.raises(DataError, match=f"turn 1 has '{key}', which is not learned"):
        said(tmp_path, [{"messages": [{"role": "user", "content": "a", key: ["x"]}, {"role": "assistant",
                                                                                     "content": "b"}]}], CHAT)


def test_arguments_with_one_key_twice_are_refused(tmp_path):
    row = calls("f", x=1)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"x": 1, "x": 2}'
    with pytest.raises(DataError, match="the key 'x' is given twice"):
        said(tmp_path, [row], CHAT)


@pytest.mark.parametrize("rows, base, why", [
    ([{**calls("f", x=1), "tools": calls("g")["tools"]}], CHAT, "calls 'f', which is none of its tools"),
    ([talk(("user", " "), ("assistant", "b"))], CHAT, "nothing to read"),
    (qa(context="long"), {**QA, "fields": {"prompt": "q", "response": "a", "system": "context"}},
     r"data\.fields\.system: data\.template = 'plain' reads no 'system'"),
    ([{"prompt": "p", "response": "r", "answer": "x"}], {**ONE, "fields": {"responce": "answer"}},
     "reads no 'responce'.*did you mean 'response'"),
    ([{"t": "a", "hypothesis": "b", "l": "x"}, {"t": "c", "hypothesis": "d", "l": "y"}], CLASSES,
     "no row's 'hypothesis' is read by data.task = 'classification'"),
    (qa(image="x.png"), QA, "no row's 'image' is read"),
    (qa(), {**ONE, "template": {"prompt": "{q} ({a})", "response": "{a}"}}, "the answer is told before it is asked"),
    ([{"q": f"Q{i}", "a": f"Q{i} it is"} for i in range(4)], QA, "every response begins with its own prompt"),
    (qa(), {**ONE, "template": {"prompt": "{q}", "response": "yes"}}, "every response is the same"),
    (qa(), {**ONE, "template": {"prompt": "say:", "response": "{a}"}}, "every prompt is the same"),
    ([{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("ab", "ba")], PAIRS, "2 pairs .* both ways")])
def test_what_is_hardly_meant_is_said(tmp_path, rows, base, why):
    assert re.search(why, said(tmp_path, rows, base))


def test_plain_rows_are_passed_over(tmp_path):
    assert said(tmp_path, qa(category="x"), QA) == ""
    assert said(tmp_path, [{"t": f"t{i}", "l": "ab"[i % 2]} for i in range(8)], CLASSES) == ""
    assert said(tmp_path, [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(8)], PAIRS) == ""
    assert said(tmp_path, [talk(("user", f"a{i}"), ("assistant", "b")) for i in range(8)], CHAT) == ""


def test_answers_that_differ_in_blanks_are_no_preference(tmp_path):
    with pytest.raises(DataError, match="the same text"):
        said(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "a "}], PAIRS)


def test_rows_of_a_test_are_found_elsewhere_whatever_stands_beside_them(tmp_path):
    test = lines(tmp_path / "t.jsonl", [{"q": r["q"].upper() + " ", "a": r["a"], "id": 2} for r in qa()])
    fields = {"prompt": "q", "response": "a", "id": "id"}
    assert "12 of 12 rows of the global test" in said(tmp_path, qa(id=1), {**QA, "fields": fields}, test=test)
    public = lines(tmp_path / "p.jsonl", [{"q": "z", "a": "w"}])
    assert "among the public rows" in said(tmp_path, qa(), QA, test=public, public=public)
    public = lines(tmp_path / "p.jsonl", qa()[:3])
    assert "3 of 3 rows of data.public stand among the clients' rows" in said(tmp_path, qa(), QA, public=public)


def test_a_class_that_a_test_file_lacks_is_said(tmp_path):
    test = lines(tmp_path / "t.jsonl", [{"t": f"u{i}", "l": "ab"[i % 2]} for i in range(6)])
    rows = [{"t": f"t{i}", "l": "abc"[i % 3]} for i in range(9)]
    assert "no row of the test has the label 'c'" in said(tmp_path, rows, CLASSES, test=test)


@pytest.mark.parametrize("key, value", [("split", "validation"), ("subset", "main")])
def test_a_part_of_what_has_no_parts_is_refused(tmp_path, key, value):
    with pytest.raises(RecipeError, match=rf"data\.{key} = '{value}' picks a part"):
        said(tmp_path, qa(), QA, **{key: value})


def test_a_split_of_a_saved_dataset_is_picked(tmp_path):
    datasets = pytest.importorskip("datasets")
    few = datasets.Dataset.from_list(qa(3))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(qa()), "dev": few}).save_to_disk(str(tmp_path / "s"))
    few.save_to_disk(str(tmp_path / "one"))
    fed = load_federation({"source": str(tmp_path / "s"), **QA, "split": "dev"}, 0)
    assert len(fed.clients["client-00"].train) == 3
    with pytest.raises(RecipeError, match=r"data\.split = 'dev'"):
        load_federation({"source": str(tmp_path / "one"), **QA, "split": "dev"}, 0)


def test_a_password_in_a_url_is_not_repeated():
    with pytest.raises(DataError, match=r"https://\*\*\*@host/a.jsonl.*nothing is fetched from a URL"):
        read_tables("https://user:SECRET@host/a.jsonl")


@pytest.mark.parametrize("text, fine", [('q,a\nx, "y"\n', False), ('q, "a"\nx,y\n', False), ('q,a\nx, y "z"\n', True),
                                        ('q,a\n"x ""y""",z\n', True), ('q\n "x"\n', False)])
def test_quotes_after_a_blank_are_no_quotes(tmp_path, text, fine):
    (tmp_path / "a.csv").write_text(text)
    with contextlib.nullcontext() if fine else pytest.raises(DataError, match="a blank before a quote"):
        read_tables(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("times", [
    ["9", 10.0, "1e2"], ["2026-09-30", "2026-10-01", "2026-10-01T08:00"], ["08:30", "10:00"], ["2025-Q4", "2026Q1"],
    ["2026-01-01T02:00+05:00", "2026-01-01T00:00Z"], ["2025-12", "2026-01"], ["2026/01/02", "2026/11/01"]])
def test_times_are_in_the_order_in_which_they_passed(times):
    clock = Clock()
    got = [clock(value, "t", f"row {i}") for i, value in enumerate(times)]
    assert got == sorted(got) and len(set(got)) == len(got)


@pytest.mark.parametrize("times, why", [
    (["30/11/2026"], "no time that can be put in order"), (["9:00"], "no time"), (["Jan"], "no time"),
    ([None], "no time"),
    ([float("nan")], "no time"), ([True], "no time"), ([""], "no time"),
    ([1, "2026-01-01"], "is a date .* a number in"),
    (["2026-01-01T00:00", "2026-01-01T00:00Z"], "a date with its zone")])
def test_times_that_have_no_order_are_refused(times, why):
    clock = Clock()
    with pytest.raises(DataError, match=why):
        for i, value in enumerate(times):
            clock(value, "t", f"row {i}")


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e300])
def test_a_skew_that_cannot_be_drawn_is_refused(alpha):
    with pytest.raises(RecipeError, match=r"data\.partition\.alpha = .* from 1e-06 to 1e\+06"):
        partitioner({"kind": "dirichlet", "clients": 3, "alpha": alpha})
    rows = [{"label": i % 2} for i in range(40)]
    for edge in (1e-6, 1e6):
        parts = partitioner({"kind": "dirichlet", "clients": 4, "alpha": edge}).split(rows, np.random.default_rng(0))
        assert sum(map(len, parts.values())) == 40
