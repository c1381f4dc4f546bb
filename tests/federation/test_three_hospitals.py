"""docs/tutorials/three-hospitals.md does what it says, line by line, with real processes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedllm.federation.process import end_tree, free_port

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "three-hospitals.md"


def commands(text):
    """The lines of all `sh` blocks; a here-document is one of them."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [c for block in blocks for c in re.findall(r"^[^\n]*<<'END'\n.*?^END$|^[^\n]+$", block, re.S | re.M)]


def test_the_tutorial_has_commands():
    found = commands(TUTORIAL.read_text())
    assert len(found) >= 14 and sum(c.endswith("&") for c in found) == 3 and sum("<<" in c for c in found) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hospitals(tmp_path):
    if importlib.util.find_spec("nvflare") is None:
        pytest.skip("nvflare is not installed")
    port, figures = free_port(), free_port()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fedllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedllm.cli.main "$@"\n')
    (tmp_path / "bin" / "fedllm").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    background, said = [], []
    try:
        for command in commands(TUTORIAL.read_text()):
            command = command.replace("18002", str(port)).replace("19102", str(figures))
            if command.endswith("&"):
                background.append(subprocess.Popen(["sh", "-c", "exec " + command[:-1]], cwd=tmp_path, env=env))
                continue
            done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True,
                                  timeout=400, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
        assert all(p.poll() is None for p in background)
    finally:
        for process in background:
            end_tree(process.pid)
            process.wait(20)
    result = json.loads((tmp_path / "runs" / "recipe" / "result.json").read_text())
    assert result["rounds"] == 3 and result["skipped"] == []
    assert set(result["evaluation"]["clients"]) >= {"hospital-a", "hospital-b", "hospital-c"}
    assert any("finished" in s and "3 of 3 rounds" in s for s in said)
    assert any("hospital-c" in s and "do not allow to train this space" in s for s in said)
    left = [p for p in psutil.process_iter(["cmdline"]) if any(str(tmp_path) in w for w in p.info["cmdline"] or [])]
    assert left == []
