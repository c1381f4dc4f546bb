"""Baselines in a process beside the run say what they say within it, and leave the rest to it when they are killed."""

import os

import pytest

from fedllm.runs.beside import FILE, Beside, baselines, beside, run_baselines
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import Quiet
from fedllm.runs.recipe import load_recipe
from fedllm.runs.resolved import resolved

NAMES = ["local_only", "centralized"]


@pytest.fixture
def parts(tiny_llama_folder):
    office = {"clients": 2, "rows": 8, "test_rows": 12, "client_test_rows": 4}
    return build(load_recipe({
        "model": tiny_llama_folder, "data": {"source": "office", "office": office}, "method": "fedavg", "rounds": 2,
        "space": {"name": "lora", "rank": 2}, "local": {"lr": 1e-2, "steps": 2, "batch_size": 4, "max_length": 64},
        "evaluate": {"exact_match": False, "samples": 0, "baselines": NAMES}}))


@pytest.mark.slow
def test_a_process_beside_says_the_same(parts, tmp_path):
    far, here = (RunFolder.create(tmp_path / n, resolved(parts)) for n in ("far", "here"))
    process = Beside(far.path)
    process.wait()
    assert process.process.returncode == 0, process.log.read_text()
    assert "Centralized: round 2 of 2" in process.log.read_text()
    assert baselines(far) == run_baselines(parts, here, Quiet()) and list(baselines(far)) == NAMES


def test_what_a_killed_process_left_is_done_by_the_run(parts, tmp_path):
    folder = RunFolder.create(tmp_path / "run", resolved(parts))
    process = Beside(folder.path)
    process.stop()
    assert process.process.returncode == -9 and not (folder.path / FILE).exists()
    assert list(run_baselines(parts, folder, Quiet())) == NAMES


def test_no_process_is_started_without_an_idle_core_or_work(parts, tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run", resolved(parts))
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0})
    assert beside(parts, folder) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0, 1})
    folder.write_json(FILE, {name: {} for name in NAMES})
    assert beside(parts, folder) is None
