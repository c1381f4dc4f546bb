"""A run that was begun before the rooms moved (version 0.1.0, killed in its fourth round) goes on as if nothing had."""

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import fedllm
from fedllm.runs.folder import RunFolder

KEPT = Path(__file__).parent / "begun_before"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The kept folder beside its rows, and what the same recipe gives when it is run today."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(KEPT.with_suffix(".jsonl"), "rows.jsonl")
    shutil.copytree(KEPT, "begun_before")
    recipe = yaml.safe_load(Path("begun_before/recipe.yaml").read_text())
    return Path("begun_before"), fedllm.run(recipe, root="fresh")


def test_it_resumes_from_its_last_round(room):
    """The rounds before the kill were computed on another machine, whose products may round otherwise."""
    old, fresh = room
    got = fedllm.resume(old)
    assert got.rounds == fresh.rounds and got.bytes == fresh.bytes and not got.skipped
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (got.folder, fresh.folder))
    for name, t in theirs.items():
        assert (ours[name] - t).abs().max() < 1e-4, name
    assert fedllm.replay(old).same
    assert [e["round"] for e in RunFolder(old).events() if e["kind"] == "round"] == list(range(12))


def test_it_resumes_from_its_first_checkpoint_with_the_same_digest(room):
    """What stood before the first round was drawn, not computed: from there the bits are this machine's."""
    old, fresh = room
    for later in ("000002.json", "000003.json"):
        (old / "checkpoints" / later).unlink()
    got = fedllm.resume(old)
    assert got.state_digest == fresh.state_digest and got.evaluation == fresh.evaluation
