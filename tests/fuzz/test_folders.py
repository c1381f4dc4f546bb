"""Runs' folders that came from elsewhere, of which anything was changed: read, or refused in a sentence."""

import functools
import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fedllm
from fedllm.federation.operate import Tally
from fedllm.report.report import write_report
from fedllm.runs.folder import RunFolder
from fedllm.runs.received import received
from fedllm.runs.replay import replay
from fedllm.runs.result import Result
from fedllm.runs.seal import verify
from tests.fuzz.hostile import changed, changes, fuzzed, garbled, met, slips

READ = {"result": Result.load, "verify": verify, "recipe": received, "checkpoint": lambda p: RunFolder(p).load(),
        "status": lambda p: Tally(p).look().as_json(), "report": write_report, "replay": replay}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("done")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "red"}) + "\n" for i in range(12)))
    spec = {"name": "r", "model": tiny_llama_folder, "rounds": 2, "local": {"steps": 1, "batch_size": 4},
            "space": {"name": "lora", "rank": 2}, "record": {"replies": True},
            "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 2}, "test": 0.0},
            "evaluate": {"exact_match": False, "samples": 0, "clients": False}}
    return fedllm.run(spec, root=folder / "runs").folder


@functools.cache
def small(folder):
    """The files of a folder that somebody may have changed, by their paths in it."""
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html"
            and p.stat().st_size < 1 << 18]


def as_json(doc):
    """What JSON holds of a document."""
    try:
        return json.dumps(doc, skipkeys=True).encode()
    except (TypeError, ValueError):
        return b"null"


@st.composite
def spoiled(draw, folder):
    """One file of the folder and what it holds now; None where it is gone."""
    name = draw(st.sampled_from(small(folder)))
    data, ways = (folder / name).read_bytes(), ["garbled", "gone"]
    ways = ["changed", *ways] if name.endswith((".json", "events.jsonl")) else ways
    way = draw(st.sampled_from(ways))
    if way == "gone":
        return name, None
    if way == "garbled":
        return name, garbled(data, draw(slips(data)))
    lines = data.splitlines() if name.endswith("events.jsonl") else [data]
    i = draw(st.integers(0, len(lines) - 1))
    doc = json.loads(lines[i])
    lines[i] = as_json(changed(doc, draw(changes(doc)))[0])
    return name, b"\n".join(lines) + (b"\n" if len(lines) > 1 else b"")


@pytest.mark.parametrize("name", READ)
def test_a_folder_of_which_anything_was_changed(done, tmp_path, name):
    folder = tmp_path / "r"

    @fuzzed(4 if name in ("report", "replay") else 10)
    @given(spoiled(done))
    @example(("events.jsonl", None))
    def each(made):
        path, data = made
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(done, folder)
        (folder / path).unlink()
        if data is not None:
            (folder / path).write_bytes(data)
        met(lambda: READ[name](folder))

    each()
