"""The package as others install it: the built wheel, in an environment of its own, in an empty folder."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_stands_in_the_table():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert sorted(table) == sorted(PROJECT["optional-dependencies"])


def test_torch_is_a_range_and_the_pin_is_the_makefiles():
    assert [d for d in PROJECT["dependencies"] if d.startswith("torch")] == ["torch>=2.9"]
    assert "torch==" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_in_an_empty_environment(tmp_path):
    """`make wheel`: minutes, most of them pip's."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("fedlm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fedllm/py.typed", "fedllm/cli/demo.yaml", "fedllm/report/report.css"} <= set(names)
    assert not [n for n in names if n.split("/")[0] in ("evidence", "tests", "recipes", "docs")]
    venv.create(tmp_path / "env", with_pip=True)
    here, home = tmp_path / "env" / "bin", tmp_path / "empty"
    home.mkdir()
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert torch is not None
    subprocess.run([here / "python", "-m", "pip", "install", "--quiet", torch[1], wheel], check=True, env=plain)

    def call(*words):
        return subprocess.run([here / words[0], *words[1:]], cwd=home, env=plain, capture_output=True, text=True)

    shown = call("fedllm", "demo")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert (home / "runs" / "demo" / "report.html").is_file() and "federated" in shown.stdout
    for tool in ("bench", "claims"):
        told = call("fedllm", tool)
        assert told.returncode == 2 and "checkout" in told.stderr, told.stderr
    assert call("python", "-c", "import evidence").returncode != 0
