"""The server runs again from what it was told."""

from pathlib import Path

import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, PayloadError, RecipeError, RunError
from fedllm.defenses.median import Median


def test_replay_is_the_run_and_other_reducers_are_not(recipe, tmp_path):
    recipe["record"] = {"replies": True}
    run = fedllm.run(recipe, root=tmp_path)
    same = fedllm.replay(run.folder)
    assert same.same and same.state_digest == run.state_digest and same.distance == 0
    assert fedllm.replay(run.folder, "mean").same
    for reducer in ("uniform", "median"):
        other = fedllm.replay(run.folder, reducer)
        assert not other.same and 0 < other.distance < 2
        assert (other.folder / "adapter" / "adapter_model.safetensors").exists()


def test_no_data_is_needed(recipe, tmp_path, rows_file):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(rows_file).read_text())
    recipe["data"] = recipe["data"] | {"source": str(rows)}
    run = fedllm.run(recipe, root=tmp_path, record={"replies": True})
    rows.unlink()
    assert fedllm.replay(run.folder, "median").rounds == 4


def test_what_cannot_be_replayed(recipe, tmp_path):
    run = fedllm.run(recipe, root=tmp_path, rounds=1)
    with pytest.raises(RunError, match=r"record\.replies=true"):
        fedllm.replay(run.folder)
    with pytest.raises(RecipeError, match="allowed are mean"):
        fedllm.replay(run.folder, "krum")
    flex = fedllm.run(recipe, root=tmp_path, method="flexlora", record={"replies": True}, rounds=1)
    assert fedllm.replay(flex.folder).same
    with pytest.raises(CompositionError, match="cannot stand for"):
        fedllm.replay(flex.folder, "median")


def test_median():
    m = Median()
    acc = m.zero()
    for t, n in (([1.0, 9.0], 1), ([2.0, -5.0], 3), ([1e9, 0.0], 2)):
        acc = m.add(acc, {"t": torch.tensor(t), "loss": t[0], "n": n})
    out = m.done(acc)
    assert out["t"].tolist() == [2.0, 0.0] and out["n"] == 6 and out["loss"] == 2.0
    even = m.done([{"t": torch.tensor([1.0])}, {"t": torch.tensor([3.0])}])
    assert even["t"].tolist() == [2.0]
    with pytest.raises(PayloadError):
        m.add(acc, {"t": torch.ones(3), "loss": 0.0, "n": 1})
    with pytest.raises(PayloadError):
        m.done([])
