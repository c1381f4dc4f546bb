"""Values survive the disk, and the disk may fail."""

import errno
import resource
import signal

import numpy as np
import pytest
import torch

from fedllm.core.errors import RunError
from fedllm.core.payload import digest
from fedllm.runs.event_log import EventLog
from fedllm.runs.folder import KEEP, RunFolder, fresh_path
from fedllm.runs.store import Blobs, blobs_in, freeze, thaw, write_atomic


def test_values_come_back_as_they_were(tmp_path):
    blobs = Blobs(tmp_path)
    value = {"t": torch.randn(3, 2), "h": torch.ones(2, dtype=torch.bfloat16), "empty": torch.empty(0, 3), 5: "five",
             "nested": {"l": [1, 2.5, None, True], "t": (1, "x"), "s": {3, 1}, "b": b"\x00\xff"},
             "a": np.arange(4).reshape(2, 2), "n": np.float32(2), "scalar": torch.tensor(3), "inf": float("inf")}
    back = thaw(freeze(value, blobs), blobs)
    assert list(back) == list(value) and digest(back["t"]) == digest(value["t"])
    assert back["h"].dtype == torch.bfloat16 and back["empty"].shape == (0, 3) and back["scalar"].shape == ()
    assert back["nested"] == value["nested"] and isinstance(back["nested"]["t"], tuple)
    assert back["a"].tolist() == [[0, 1], [2, 3]] and back[5] == "five" and back["inf"] == float("inf")


def test_equal_tensors_are_stored_once_and_damage_is_seen(tmp_path):
    blobs = Blobs(tmp_path)
    doc = freeze({"a": torch.ones(4), "b": torch.ones(4)}, blobs)
    (name,) = set(blobs_in(doc))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match="damaged"):
        thaw(doc, blobs)


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(RunError, match=r"state\.x\.y holds a object"):
        freeze({"x": {"y": object()}}, Blobs(tmp_path))


def test_old_checkpoints_go_and_their_blobs_with_them(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"name": "x"})
    for n in range(5):
        folder.save(n, {"t": torch.full((2,), float(n))}, pin=n == 0)
    assert folder.rounds() == [0, 3, 4] and len(folder.rounds()) == KEEP + 1
    assert len(list((folder.checkpoints / "blobs").iterdir())) == 3
    assert folder.load()[1]["t"].tolist() == [4.0, 4.0] and folder.load(0)[1]["t"].tolist() == [0.0, 0.0]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"name": "x"})
    folder.save(1, {"n": 1})
    folder.save(2, {"n": 2})
    (folder.checkpoints / "000002.json").write_text('{"$map": [["n"')
    assert folder.load() == (1, {"n": 1})


def test_events_are_cut_at_the_checkpoint(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append({"kind": "round", "round": 0})
    at = log.sync()
    log.append({"kind": "round", "round": 1})
    log.close()
    again = EventLog(tmp_path / "events.jsonl", at)
    again.append({"kind": "round", "round": 1, "again": True})
    again.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"again"' in lines[1]


def test_no_run_is_overwritten(tmp_path):
    (tmp_path / "demo").mkdir()
    assert fresh_path(tmp_path, "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "recipe.yaml").write_text("")
    assert fresh_path(tmp_path, "demo") == tmp_path / "demo-2"


@pytest.fixture
def small_files():
    """No file may grow beyond 2,000 bytes: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, small_files):
    path = tmp_path / "x"
    write_atomic(path, b"old")
    with pytest.raises(OSError) as error:
        write_atomic(path, b"n" * 5000)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_events_wait_while_the_disk_is_full(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log.append({"kind": "round", "round": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        log.append({"kind": "round", "text": "x" * 200})
        assert log.trouble and (tmp_path / "events.jsonl").read_text().count("\n") == 1
        with pytest.raises(OSError):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    log.append({"kind": "round", "round": 2})
    log.close()
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("doc", [{"version": 99}, {"$map": [], "$list": []}, {}])
def test_what_another_version_wrote_is_named(tmp_path, doc):
    with pytest.raises(RunError, match="which this version of fedllm has not written"):
        thaw(doc, Blobs(tmp_path / "blobs"))
