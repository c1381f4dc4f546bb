"""A run that was begun before the rooms moved (version 0.1.0, killed in its fourth round) goes on as if nothing had."""

import shutil
from pathlib import Path

import pytest
import yaml

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
    """The rounds before the kill were computed on another machine, whose products may round otherwise: what lies there
    is what three rounds give today, and after twelve rounding alone takes two runs of this recipe 0.1 apart."""
    old, fresh = room
    three = fedllm.run({**yaml.safe_load((old / "recipe.yaml").read_text()), "rounds": 3}, root="three")
    theirs, mine = (RunFolder(f).load(3)[1]["state"]["theta"] for f in (old, three.folder))
    for name, t in mine.items():
        assert (theirs[name] - t).abs().max() < 1e-4, name
    got = fedllm.resume(old)
    assert got.rounds == fresh.rounds and got.bytes == fresh.bytes and not got.skipped
    assert fedllm.replay(old).same
    assert [e["round"] for e in RunFolder(old).events() if e["kind"] == "round"] == list(range(12))


def test_it_resumes_from_its_first_checkpoint_with_the_same_digest(room):
    """What stood before the first round was drawn, not computed: from there the bits are this machine's. The test of
    the untrained model is the other machine's."""
    old, fresh = room
    for later in ("000002.json", "000003.json"):
        (old / "checkpoints" / later).unlink()
    got = fedllm.resume(old)
    before, now = got.evaluation["before"]["global"], fresh.evaluation["before"]["global"]
    assert got.state_digest == fresh.state_digest and before == pytest.approx(now, rel=1e-6)
    assert {**got.evaluation, "before": 0} == {**fresh.evaluation, "before": 0}
