"""A disk that takes no more: what an export or a lock leaves, and what is said."""

import pytest
from safetensors import SafetensorError

import fedllm
from fedllm.core.errors import RunError
from fedllm.runs.export import export
from fedllm.runs.folder import RunFolder

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fedllm.run({
        "name": "small", "model": {"name": "embedded"}, "rounds": 1, "space": {"name": "lora", "rank": 2},
        "data": {"source": "office", "office": {"clients": 2, "rows": 8, "test_rows": 2, "client_test_rows": 2}},
        "evaluate": {"exact_match": False, "samples": 0},
        "local": {"optimizer": "sgd", "lr": 0.05, "steps": 1, "batch_size": 2, "max_length": 64}},
        root=tmp_path_factory.mktemp("runs")).folder


def broken(error):
    """Writes half of what is wanted."""
    def write(*args, **more):
        for folder in args:
            if getattr(folder, "name", "") == "whole":
                (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(("options", "writes", "error"), [
    ({}, "as_exported", FULL), ({"merge": True}, "_merge", FULL),
    ({"merge": True}, "_merge", SafetensorError("I/O error: No space left on device")),
    ({"round": 1}, "write_tree", FULL), ({"round": 1, "merge": True}, "_merge", SafetensorError("No space left")),
    ({"gguf": "f32"}, "_merge", FULL)], ids=str)
def test_an_export_is_whole_or_not_there(run, tmp_path, monkeypatch, options, writes, error, there):
    goal = tmp_path / "out"
    if there:
        goal.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(f"fedllm.runs.export.{writes}", broken(error))
        with pytest.raises(RunError, match=rf"{tmp_path}.* cannot be written: .*No space left.*; make room"):
            export(run, goal, **options)
    assert list(tmp_path.rglob("*")) == [goal] * there
    if writes == "as_exported":
        assert export(run, goal) == goal and (goal / "adapter_config.json").is_file()  # once there is room
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_lock_that_cannot_be_written(run):
    lock = run / ".lock"
    lock.unlink()
    lock.symlink_to("/dev/full")
    try:
        with pytest.raises(RunError, match=r"\.lock cannot be written: .*; make room"), RunFolder(run).held(0.1):
            pass
    finally:
        lock.unlink()
