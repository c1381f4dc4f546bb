"""Memory of each process that trains one client, by how many they are: weights, gradients and moments in shards; and
what they train beside what one process does, in fp32. SGD takes rounding as it is; Adam divides a gradient by its own
size, so that one which is next to nothing is mostly rounding (tests/local/test_group.py holds both to 1e-10 in fp64).

A program for each number of processes: 10 s of processor time for one, 30 for two, most of it libraries.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.bench.rows import Row, memory_mb, row, subprocess_row
from fedllm.data.encode import Encoded
from fedllm.local.fit import run_fits
from fedllm.local.group import Group
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.kernels import give_back_freed_memory
from fedllm.models.model import Model
from fedllm.spaces import make_space

VOCABULARY, LENGTH, STEPS = 4096, 32, 4


def made(rank: int = 0) -> Model:
    """A Llama of 28 M weights (107 MB in fp32) in space `full`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8,
            num_key_value_heads=8, tie_word_embeddings=True))
    return Model(net, None, "generation", make_space("full"), name="bench")


def one(processes: int, trained: Path) -> dict[str, Any]:
    """Train one client by so many processes, and say what each held after a step of AdamW, beyond what its libraries
    take; the weights that it ends with, and those after SGD, go to the file `trained`."""
    torch.set_num_threads(1)
    before, model, draw = memory_mb(), made(), np.random.default_rng(0)
    rows = [Encoded(ids.astype(np.int32), ids.astype(np.int64), LENGTH - 1)
            for ids in draw.integers(3, VOCABULARY, size=(4, LENGTH))]
    give_back_freed_memory()
    group = Group(made, model, processes) if processes > 1 else None
    seen: list[dict[str, Any]] = []

    def look(clients: int, tokens: int) -> None:
        held = memory_mb() - before
        seen.append({"client": held, "each": [_beyond(pid) for pid in group.pids] if group else [held]})

    fit = Fit("a", model, model.initial(), None, rows, [np.arange(4)] * STEPS, LocalSpec(lr=1e-3, batch_size=4))
    (done,) = run_fits([fit], Limits(did=look, group=group))
    (plain,) = run_fits([replace(fit, spec=LocalSpec(optimizer="sgd", lr=0.1, batch_size=4))], Limits(group=group))
    if group:
        group.close()
    ends = {"adamw": done.theta, "sgd": plain.theta, "start": fit.theta}
    save_file({f"{by}/{n}": t.clone() for by, theta in ends.items() for n, t in theta.items()}, trained)
    weights = sum(p.numel() for p in model.net.parameters())
    return {"weights": weights, "loss": done.loss, "libraries_mb": round(before),
            "client_mb": round(max(s["client"] for s in seen[1:])),
            "each_mb": [round(max(s["each"][i] for s in seen[1:])) for i in range(len(seen[0]["each"]))]}


def _beyond(pid: int) -> float:
    """MB that a process holds beyond its libraries."""
    facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return float(facts["VmRSS"].split()[0]) / 1024 - LIBRARIES


LIBRARIES = memory_mb()
"""MB of a process that has loaded what the processes load, and no model."""


def shards(counts: tuple[int, ...] = (1, 2)) -> list[Row]:
    """Each number of processes in a program of its own, since the memory of a process never shrinks."""
    with tempfile.TemporaryDirectory() as folder:
        files = {n: Path(folder) / f"{n}.safetensors" for n in counts}
        seen = {n: subprocess_row("evidence.bench.shards", str(n), str(files[n])) for n in counts}
        ends = {n: load_file(file) for n, file in files.items()}
    alone, rows = max(seen[1]["each_mb"]), list[Row]()
    for n in (n for n in counts if n > 1):
        rows.append(row(f"shards/memory of a process, {n} of them", max(seen[n]["each_mb"]) / alone, "times",
                        "one process", 1.3 / n, least=True, seen=seen[n], alone=seen[1]))
        rows += [row(f"shards/largest difference of a weight after {by}, {n} of them", _apart(ends[1], ends[n], by, by),
                     "", "one process", gate, least=True, steps=STEPS, moved=_apart(ends[1], ends[1], by, "start"))
                 for by, gate in (("sgd", 1e-6), ("adamw", None))]
    return rows


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], by: str, than: str) -> float:
    """How far the weight that differs most is from what it is in the other."""
    names = [n.removeprefix(f"{by}/") for n in one if n.startswith(f"{by}/")]
    return max(float((one[f"{by}/{n}"] - other[f"{than}/{n}"]).abs().max()) for n in names)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(one(int(sys.argv[1]), Path(sys.argv[2]))))
