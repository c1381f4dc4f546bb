"""Scale: a thousand clients in a round, a million groups on disk, a hundred thousand clients of whom 100 take part."""

from __future__ import annotations

import functools
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from evidence.bench.rows import Row, memory_mb, row, subprocess_row
from evidence.bench.simulation import LR, Ours, Size, net_of, tokenizer_of
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.core.rng import numpy_stream
from fedllm.data.grouped import Groups
from fedllm.data.grouper import group
from fedllm.data.load import load_federation
from fedllm.data.sources import resolve
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space

TINY = Size("tiny", 128, 4, ("q_proj", "v_proj"), steps=1, batch=2, length=32, vocabulary=2048)
PLAYS = "shared:tinyshakespeare.txt"


def scale(few: int = 100, many: int = 1000) -> list[Row]:
    """Each in a process of its own, since the memory of a process never shrinks."""
    seen = {n: subprocess_row("evidence.bench.scale", "round", str(n)) for n in (few, many)}
    grown = seen[many]["peak_mb"] / seen[few]["peak_mb"]
    rows = [row(f"scale/peak memory of {many} clients", grown, "times", f"{few} clients", 1.1, least=True,
                seen={str(n): s for n, s in seen.items()})]
    with tempfile.TemporaryDirectory() as folder:
        rows += _groups(Path(folder))
    return rows


def _groups(folder: Path) -> list[Row]:
    """A million groups of Shakespeare's lines, and 100,000 of them as clients."""
    made = subprocess_row("evidence.bench.scale", "partition", str(folder), "1000000")
    read = subprocess_row("evidence.bench.scale", "stream", str(folder))
    run = subprocess_row("evidence.bench.scale", "clients", str(folder), "100000", "100", "60")
    groups = f"{made['groups']:,} groups"
    return [
        row(f"scale/{groups}: partition", made["rows"] / made["cpu_s"], "rows a CPU-second", "", seen=made),
        row(f"scale/{groups}: memory of partitioning", made["grown_mb"], "MB", "before", 100, least=True, seen=made),
        row(f"scale/{groups}: stream", read["groups"] / read["cpu_s"], "groups a CPU-second", "", seen=read),
        row(f"scale/{groups}: memory of streaming", read["grown_mb"], "MB", "before", 200, least=True, seen=read),
        row("scale/100,000 clients, 100 a round: memory at the end", run["end_mb"] / run["early_mb"], "times",
            "after 10 rounds", 1.05, least=True, seen=run)]


def one_round(clients: int) -> dict[str, float]:
    """Train `clients` clients once and say what it took."""
    start, ours = time.process_time(), Ours(replace(TINY, clients=clients), rank=4)
    before = memory_mb()
    tokens = ours.round()
    peak = memory_mb(peak=True)
    return {"peak_mb": round(peak), "grown_mb": round(peak - before), "tokens": tokens,
            "cpu_s": round(time.process_time() - start, 1)}


def speeches(path: Path) -> dict[str, list[str]]:
    """Every speaker's lines of the plays."""
    said: dict[str, list[str]] = {}
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        speaker, _, lines = block.strip().partition(":\n")
        if lines:
            said.setdefault(speaker, []).extend(lines.splitlines())
    return said


def troupes(groups: int, lines: int = 3) -> Iterator[dict[str, str]]:
    """Rows of so many groups: in each troupe (a seed) every speaker says some of the own lines, drawn anew; the rows of
    a troupe come in random order, so that no group's rows lie together."""
    said = speeches(resolve(PLAYS))
    for troupe in range(-(-groups // len(said))):
        rng, rows = random.Random(troupe), []
        for speaker in itertools.islice(said, min(len(said), groups - troupe * len(said))):
            mine = rng.choices(said[speaker], k=lines)
            rows += [{"speaker": f"{speaker} {troupe}", "prompt": "", "response": text} for text in mine]
        rng.shuffle(rows)
        yield from rows


def partition(folder: Path, groups: int) -> dict[str, float]:
    """Write the corpus, group it, and count again what the groups hold."""
    source = folder / "plays.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps(r) + "\n" for r in troupes(groups))
    before, start, clock = memory_mb(), time.process_time(), time.perf_counter()
    made = group(str(source), folder / "groups", "column:speaker", shards=16)
    spent = {"cpu_s": round(time.process_time() - start, 1), "wall_s": round(time.perf_counter() - clock, 1),
             "grown_mb": round(memory_mb(peak=True) - before)}
    return {"groups": made.groups, "rows": made.rows, "source_mb": round(source.stat().st_size / 2**20), **spent}


def stream(folder: Path) -> dict[str, float]:
    """Read every row of every group once, and compare their sum with the source's (order does not matter)."""
    before, start = memory_mb(), time.process_time()
    seen = rows = total = 0
    for name, mine in Groups(folder / "groups").stream(0):
        seen += 1
        for one in mine:
            rows, total = rows + 1, total + _mark(one, name)
    spent = round(time.process_time() - start, 1)
    grown = round(memory_mb(peak=True) - before)
    with (folder / "plays.jsonl").open() as file:
        want = sum(_mark(one := json.loads(line), one["speaker"]) for line in file)
    if want != total:
        raise AssertionError("the groups do not hold the rows of the source")
    return {"groups": seen, "rows": rows, "cpu_s": spent, "grown_mb": grown}


def _mark(one: dict[str, str], name: str) -> int:
    """The same in every process."""
    return int.from_bytes(f"{name}|{one['speaker']}|{one['response']}".encode()[:64], "little") % (2**61 - 1)


def clients(folder: Path, count: int, cohort: int, rounds: int) -> dict[str, float]:
    """So many groups as clients of FedAvg; memory after 10 rounds and after the last."""
    spec = {"source": f"grouped:{folder / 'groups'}", "test": 0.0, "partition": {"kind": "grouped", "clients": count}}
    fed = load_federation(spec, 0)
    size = replace(TINY, vocabulary=2048)
    model = Model(net_of(size), tokenizer_of(size), "generation",
                  make_space("lora", rank=4, alpha=16.0, targets=size.targets))
    world = World(model, fed, LocalSpec(lr=LR, batch_size=2, steps=1, max_length=32), completion_only=False)
    method = make_method("fedavg")
    engine, infos = Vectorized((method,), world, Record(lambda event: None)), world.infos()
    state, seen, early, start = method.init(model), set(), 0.0, time.process_time()
    for r in range(rounds):
        engine.begin(r)
        mine = [infos[i] for i in numpy_stream(0, r, "cohort").choice(len(infos), cohort, replace=False)]
        seen |= {c.id for c in mine}
        state = drive(method.round(state, mine), engine)
        engine.commit()
        early = memory_mb() if r == 9 else early
    return {"clients": len(infos), "took_part": len(seen), "rounds": rounds, "early_mb": round(early, 1),
            "end_mb": round(memory_mb(), 1), "peak_mb": round(memory_mb(peak=True), 1),
            "cpu_s": round(time.process_time() - start, 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *args = sys.argv[1:]
    jobs = {"round": lambda n: one_round(int(n)), "partition": lambda f, n: partition(Path(f), int(n)),
            "stream": lambda f: stream(Path(f)),
            "clients": lambda f, *n: clients(Path(f), *map(int, n))}
    sys.stdout.write(json.dumps(functools.partial(jobs[what], *args)()))
