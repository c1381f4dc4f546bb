"""Files of rows that strangers bring: read as rows with words in them, or refused in a sentence that names the file."""

import contextlib
import json
import os
import random

import pytest

from fedllm.core.errors import DataError
from fedllm.data import strict
from fedllm.data.load import load_federation
from fedllm.data.sources import READERS
from fedllm.data.stream import stream_rows
from tests.fuzz.hostile import ODD, bent, garbled, tries

TEXTS = [k for k in READERS if k != ".parquet"]


def written(rnd, ending, rows):
    """The rows as a file of this ending would hold them."""
    if ending == ".txt":
        return "\n".join(str(r.get("prompt")) for r in rows)
    if ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        lines = [f'{r.get("prompt")}{mark}"{r.get("response")}"' for r in rows]
        return "\n".join(["prompt" + mark + "response", *lines])
    return json.dumps(rows) if ending == ".json" else "\n".join(json.dumps(r) for r in rows)


@pytest.mark.parametrize("ending", TEXTS)
def test_any_file(tmp_path, ending):
    rnd, path = random.Random(ending), tmp_path / f"rows{ending}"
    shape = {"template": {"prompt": "{text}", "response": "{text}"}} if ending == ".txt" else {}
    spec = {"source": str(path), "test": 0.0, "partition": {"kind": "iid", "clients": 2}, **shape}
    for _ in range(tries(40)):
        rows = [{"prompt": f"say {i}", "response": "yes"} for i in range(4)]
        for row in rows:
            if rnd.random() < 0.4:
                key = rnd.choice(list(row))
                row[key] = bent(rnd, row[key]) if rnd.random() < 0.5 else rnd.choice(ODD)
        try:
            data = written(rnd, ending, rows).encode(errors="surrogatepass")
        except (TypeError, ValueError):
            continue  # nothing that JSON can hold
        path.write_bytes(data := garbled(rnd, data) if rnd.random() < 0.6 else data)
        try:
            found = load_federation(spec, 0)
        except DataError as error:
            assert str(path) in str(error) or "rows" in str(error), (data[:300], str(error)[:200])
            assert len(str(error)) < 5000
        else:
            for shard in found.clients.values():
                assert all(str(r["response"]).strip() for r in shard.train), data[:300]
        if ending != ".json":
            with contextlib.suppress(DataError):
                list(stream_rows(str(path)))


@pytest.mark.parametrize("ending", TEXTS)
def test_a_line_without_an_end_is_refused_before_it_is_held(tmp_path, ending, monkeypatch):
    """Sixteen million characters are the bound; here it is lower, and `/dev/zero` has no end at all."""
    monkeypatch.setattr(strict, "LINE", 1000)
    path = tmp_path / f"rows{ending}"
    path.write_text(written(None, ending, [{"prompt": "say", "response": "x" * 5000 if ending != ".txt" else ""},
                                           {"prompt": "y" * 5000, "response": "x"}]))
    if ending == ".json":
        return  # a list may be one line: the whole of it is read as one value
    for read in (lambda: load_federation({"source": str(path), "test": 0.0}, 0), lambda: list(stream_rows(str(path)))):
        with pytest.raises(DataError, match=r"line \d is longer than 1,000 characters"):
            read()


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for source in (str(tmp_path / "a.jsonl"), "/dev/zero", "x" * 5000, "a\0b", "~nobody-of-that-name/x.jsonl"):
        with pytest.raises(DataError):
            load_federation({"source": source, "test": 0.0}, 0)
    with pytest.raises(DataError):
        list(stream_rows(str(tmp_path / "a.jsonl")))
