"""A run that is killed at any moment ends as if it had not been."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedllm
from fedllm.core.errors import RunError
from fedllm.runs.folder import RunFolder

START = "import json, sys, fedllm; fedllm.run(json.loads(sys.argv[1]), root=sys.argv[2])"
RESUME = "import sys, fedllm; fedllm.resume(sys.argv[1])"


def killed(args, events, after_lines, wait):
    """Run a Python process until `events` has so many lines, wait a moment more, and kill it for good."""
    process = subprocess.Popen([sys.executable, "-c", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < ends:
        if events.exists() and events.read_bytes().count(b"\n") >= after_lines:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_again_and_again(recipe, tmp_path):
    recipe |= {"rounds": 10, "method": "scaffold", "local": {"lr": 0.05, "optimizer": "sgd"}}  # clients that remember
    recipe["record"] = {"replies": True}
    whole = fedllm.run(recipe, root=tmp_path / "whole")
    draw, run = random.Random(), tmp_path / "cut" / "small"
    events = run / "events.jsonl"
    kills = killed([START, json.dumps(recipe), str(tmp_path / "cut")], events, 12, draw.random() * 0.1)
    for lines in (30, 50):
        kills += killed([RESUME, str(run)], events, lines, draw.random() * 0.1)
    assert kills >= 2
    result = fedllm.resume(run)
    assert result.state_digest == whole.state_digest
    assert result.bytes == whole.bytes and result.evaluation == whole.evaluation
    kinds = [e for e in RunFolder(run).events() if e["kind"] == "round"]
    assert [e["round"] for e in kinds] == list(range(10))
    assert fedllm.replay(run).same
    assert fedllm.resume(run).state_digest == whole.state_digest  # a finished run is left as it is


@pytest.mark.parametrize("lost", ["last checkpoint", "all checkpoints", "half an event", "products"])
def test_whatever_is_missing(recipe, tmp_path, lost):
    whole = fedllm.run(recipe, root=tmp_path)
    folder = RunFolder(whole.folder)
    (whole.folder / "result.json").unlink()
    if lost == "last checkpoint":
        (folder.checkpoints / f"{folder.rounds()[-1]:06d}.json").unlink()
    elif lost == "all checkpoints":
        shutil.rmtree(folder.checkpoints)
        folder.checkpoints.mkdir()
    elif lost == "half an event":
        with (whole.folder / "events.jsonl").open("a") as file:
            file.write('{"kind": "rou')
    else:
        shutil.rmtree(whole.folder / "adapter")
        (whole.folder / "report.html").unlink()
    again = fedllm.resume(whole.folder)
    assert (again.state_digest, again.bytes) == (whole.state_digest, whole.bytes)
    assert again.adapter_path.is_dir() and again.report_path.exists()


def test_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        fedllm.resume(tmp_path / "none")


class Full:
    """No file may grow beyond a size, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.old, self.limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.old)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(recipe, tmp_path, monkeypatch):
    """The disk fills in round 2 and has room again after round 3."""
    from fedllm.runs.course import Course

    whole, step, full = fedllm.run(recipe, root=tmp_path / "whole"), Course.step, Full(1500)

    def filling(self, round):
        if round == 2:
            full.__enter__()
        facts = step(self, round)
        if round == 3:
            full.__exit__()
        return facts

    monkeypatch.setattr(Course, "step", filling)
    result = fedllm.run(recipe, root=tmp_path / "full")
    assert result.state_digest == whole.state_digest and result.bytes == whole.bytes
    events = RunFolder(result.folder).events()
    (failed,) = [e for e in events if e["kind"] == "checkpoint_failed"]
    assert failed["round"] == 3 and failed["why"] == "File too large"
    assert len([e for e in events if e["kind"] == "wire"]) == len(
        [e for e in RunFolder(whole.folder).events() if e["kind"] == "wire"])


def test_a_disk_that_stays_full_stops_the_run_and_loses_nothing(recipe, tmp_path, monkeypatch):
    from fedllm.runs.course import Course

    whole, step, full = fedllm.run(recipe, root=tmp_path / "whole"), Course.step, Full(1500)

    def filling(self, round):
        if round == 2:
            full.__enter__()
        return step(self, round)

    monkeypatch.setattr(Course, "step", filling)
    try:
        with pytest.raises(RunError, match=r"cannot be written: File too large; its last checkpoint is before round 2"):
            fedllm.run(recipe, root=tmp_path)
    finally:
        full.__exit__()
    monkeypatch.undo()
    assert fedllm.resume(tmp_path / "small").state_digest == whole.state_digest


def test_a_disk_that_is_really_full(recipe, tmp_path):
    """A file system of 300 kB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(RunError, match="No space left on device"):
            fedllm.run(recipe, root=disk)
        folder = RunFolder(disk / "small")
        assert folder.load() is None or folder.load()[1]["state"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        whole = fedllm.run(recipe, root=tmp_path / "whole")
        assert fedllm.resume(disk / "small").state_digest == whole.state_digest
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_paths_are_paths(recipe, tmp_path):
    result = fedllm.run(recipe, root=str(tmp_path), rounds=1)
    assert isinstance(result.folder, Path)
