"""Rows of measured numbers, and the file that keeps them with the machine that gave them."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.core.errors import FedLLMError

Row = dict[str, Any]


def row(name: str, value: float, unit: str, baseline: str, gate: float | None = None, moonshot: float | None = None, *,
        least: bool = False, **more: Any) -> Row:
    """One measurement; it passes when it reaches its gate (`least`: when it stays at or below it).

    `more` keeps what the number was made of. Without a gate `pass` is None.
    """
    good = None if gate is None else bool(value <= gate if least else value >= gate)
    return {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "baseline": baseline, "gate": gate,
            "moonshot": moonshot, "pass": good, **more}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "isa": torch.backends.cpu.get_cpu_capability(),
            "load": round(os.getloadavg()[0], 1), "python": platform.python_version(), "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "threads": 1, "clock": "process CPU time"}


def _cpu_name() -> str:
    facts = dict(line.split(":", 1) for line in _cpuinfo().split("\n\n")[0].splitlines() if ":" in line)
    facts = {k.strip(): v.strip() for k, v in facts.items()}
    family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return facts.get("model name", platform.processor() or platform.machine()) + family


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def merge(rows: Sequence[Row], bench: str, out: Path, whole: bool = True) -> None:
    """Put this bench's rows into the file, in the place of its earlier ones (not `whole`: of those of the same names
    alone); rows of other benches stay."""
    kept = json.loads(out.read_text())["rows"] if out.exists() else []
    mine = {r["name"] for r in rows}
    kept = [r for r in kept if not (r["name"].split("/")[0] == bench if whole else r["name"] in mine)]
    where = machine()
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": where, "rows": kept + [{**r, "measured": where["date"]} for r in rows]}, indent=1)
    out.write_text(text + "\n")


def peer(name: str) -> Any:
    """A module of `benchmarks/peers`, which lies in a checkout of the repository and not in the package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fedllm_peer_{name}", path)
    if not path.exists() or spec is None or spec.loader is None:
        raise FedLLMError(f"bench: {path} is missing; run it from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise FedLLMError(f"bench: {error}; pip install 'fedlm[bench]'") from error
    return module


def subprocess_row(module: str, *args: str) -> dict[str, Any]:
    """What a module of ours writes as JSON when it runs in a process of its own (for memory, which never shrinks)."""
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedLLMError(f"bench: {module} {' '.join(args)} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_mb(peak: bool = False) -> float:
    """Memory of this process now, or the most that it has held (`getrusage` would count the parent's as well)."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(facts["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
