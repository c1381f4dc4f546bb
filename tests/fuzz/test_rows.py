"""Files of rows that strangers bring: read as rows with words in them, or refused in a sentence that names the file."""

import contextlib
import io
import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import DataError
from fedllm.data import strict
from fedllm.data.load import load_federation
from fedllm.data.sources import READERS
from fedllm.data.stream import FORMATS, stream_rows
from tests.fuzz.hostile import changed, changes, fuzzed, garbled, met, slips

TEXTS = [k for k in READERS if k != ".parquet"]
ROWS = [{"prompt": f"say {i}", "response": "yes"} for i in range(4)]


def written(ending, rows):
    """The rows as a file of this ending would hold them."""
    if ending == ".txt":
        return "\n".join(str(r.get("prompt")) for r in rows)
    if ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        lines = [f'{r.get("prompt")}{mark}"{r.get("response")}"' for r in rows]
        return "\n".join(["prompt" + mark + "response", *lines])
    return json.dumps(rows) if ending == ".json" else "\n".join(json.dumps(r) for r in rows)


def packed(rows):
    """The rows as Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    held = io.BytesIO()
    with contextlib.suppress(pa.ArrowException):
        parquet.write_table(pa.Table.from_pylist(rows), held)
    return held.getvalue()


@st.composite
def files(draw, ending):
    """Bytes of such a file: of rows of which something was changed, garbled on their way, or both."""
    rows, _ = changed(ROWS, draw(st.just([]) | changes(ROWS)))
    if ending not in (".json", ".jsonl", ".ndjson"):  # in the others there is nothing but rows
        rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    try:
        data = packed(rows) if ending == ".parquet" else written(ending, rows).encode(errors="surrogatepass")
    except (TypeError, ValueError, OverflowError):  # nothing that such a file can hold
        data = b""
    return garbled(data, draw(st.just([]) | slips(data)))


@pytest.mark.parametrize("ending", READERS)
def test_any_file(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    shape = {"template": {"prompt": "{text}", "response": "{text}"}} if ending == ".txt" else {}
    spec = {"source": str(path), "test": 0.0, "partition": {"kind": "iid", "clients": 2}, **shape}

    @fuzzed(10 if ending == ".parquet" else 25)
    @given(files(ending))
    def each(data):
        path.write_bytes(data)
        found = met(lambda: load_federation(spec, 0), DataError, 5000)
        if isinstance(found, DataError):
            assert str(path) in str(found) or "rows" in str(found), str(found)[:200]
        else:
            for shard in found.clients.values():
                assert all(str(r["response"]).strip() for r in shard.train)
        if ending in FORMATS:
            met(lambda: list(stream_rows(str(path))), DataError, 5000)

    each()


SHAPES = {
    "chat": ({"template": "chat"}, {"messages": [{"role": "user", "content": "say"},
                                                 {"role": "assistant", "content": "yes"}]}),
    "choices": ({}, {"prompt": "say", "response": "A", "choices": ["yes", "no"]}),
    "classification": ({"task": "classification"}, {"text": "say", "label": "good"}),
    "image_text": ({"task": "image_text"}, {"image": "say.png", "label": "good"}),
    "masked_words": ({"task": "masked_words"}, {"text": "say"}),
    "preference": ({"task": "preference"}, {"prompt": "say", "chosen": "yes", "rejected": "no"}),
    "regression": ({"task": "regression"}, {"text": "say", "target": 0.5}),
    "tokens": ({"task": "tokens"}, {"tokens": ["say", "it"], "tags": ["O", "B-x"]})}
"""What a task asks for in the recipe's data, and a row of it."""


@pytest.mark.parametrize("name", SHAPES)
def test_any_row_of_any_task(tmp_path, name):
    path, (told, row) = tmp_path / "rows.jsonl", SHAPES[name]
    spec = {"source": str(path), "test": 0.0, "partition": {"kind": "iid", "clients": 2}, **told}

    @fuzzed(20)
    @given(changes(row))
    def each(made):
        try:
            path.write_text("\n".join(json.dumps(r) for r in (row, changed(row, made)[0], row)))
        except (TypeError, ValueError):
            return  # nothing that JSON can hold
        found = met(lambda: load_federation(spec, 0), DataError, 5000)
        assert not isinstance(found, DataError) or str(path) in str(found) or "label" in str(found), str(found)[:200]

    each()


@pytest.mark.parametrize("ending", [t for t in TEXTS if t != ".json"])
def test_a_line_without_an_end_is_refused_before_it_is_held(tmp_path, ending, monkeypatch):
    """Sixteen million characters are the bound; here it is lower, and `/dev/zero` has no end at all."""
    monkeypatch.setattr(strict, "LINE", 1000)
    path = tmp_path / f"rows{ending}"
    path.write_text(written(ending, [{"prompt": "say", "response": "x" * 5000 if ending != ".txt" else ""},
                                     {"prompt": "y" * 5000, "response": "x"}]))
    for read in (lambda: load_federation({"source": str(path), "test": 0.0}, 0), lambda: list(stream_rows(str(path)))):
        with pytest.raises(DataError, match=r"line \d is longer than 1,000 characters"):
            read()


def test_a_list_that_is_too_large_to_be_read_whole_is_refused_before_it_is_held(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes.*may have 268,435,456.*call it \.jsonl"):
            load_federation({"source": str(path), "test": 0.0}, 0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    path.write_text(written(".json", ROWS))
    spec = {"source": str(path), "test": 0.0, "partition": {"kind": "iid", "clients": 2}}
    for most, fits in ((path.stat().st_size, True), (path.stat().st_size - 1, False)):
        monkeypatch.setattr(strict, "WHOLE", most)
        assert isinstance(met(lambda: load_federation(spec, 0)), DataError) is not fits


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for source in (str(tmp_path / "a.jsonl"), "/dev/zero", "x" * 5000, "a\0b", "~nobody-of-that-name/x.jsonl"):
        with pytest.raises(DataError):
            load_federation({"source": source, "test": 0.0}, 0)
    with pytest.raises(DataError):
        list(stream_rows(str(tmp_path / "a.jsonl")))
