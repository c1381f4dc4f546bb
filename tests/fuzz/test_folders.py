"""Runs' folders that came from elsewhere, of which anything was changed: read, or refused in a sentence."""

import json
import random
import shutil

import pytest

import fedllm
from fedllm.core.errors import FedLLMError
from fedllm.federation.operate import Tally
from fedllm.report.report import write_report
from fedllm.runs.folder import RunFolder
from fedllm.runs.received import received
from fedllm.runs.replay import replay
from fedllm.runs.result import Result
from fedllm.runs.seal import verify
from tests.fuzz.hostile import changed, garbled, tries

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


def spoiled(rnd, folder):
    """One file of the folder with something else in it, and what it was."""
    path = rnd.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html"
                       and p.stat().st_size < 1 << 18])
    data = path.read_bytes()
    if path.suffix == ".json" and rnd.random() < 0.7:
        path.write_text(json.dumps(changed(rnd, json.loads(data))[0], skipkeys=True))
    elif path.name == "events.jsonl" and rnd.random() < 0.7:
        lines = data.splitlines()
        i = rnd.randrange(len(lines))
        lines[i] = json.dumps(changed(rnd, json.loads(lines[i]))[0], skipkeys=True).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif rnd.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(garbled(rnd, data))
    return path


@pytest.mark.parametrize("name", READ)
def test_a_folder_of_which_anything_was_changed(done, tmp_path, name):
    rnd, folder = random.Random(name), tmp_path / "r"
    for _ in range(tries(4 if name in ("report", "replay") else 25)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(done, folder)
        path = spoiled(rnd, folder)
        try:
            READ[name](folder)
        except FedLLMError as error:
            assert len(str(error)) <= FedLLMError.LONGEST
        except Exception as error:
            now = path.read_bytes()[:400] if path.exists() else b""
            raise AssertionError(f"{path.relative_to(folder)}: {now!r}") from error
