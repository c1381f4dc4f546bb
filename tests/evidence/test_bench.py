"""The benches measure what they say: rows are complete, and both sides of a race do the same work."""

import json

import pytest
import torch

from evidence.bench import __main__ as bench
from evidence.bench import simulation as bench_simulation
from evidence.bench.rows import row, subprocess_row
from evidence.bench.server import stream, svd, update
from evidence.bench.simulation import Ours, Size, plain_peft, race, ratio
from fedllm.core.errors import RecipeError

FIELDS = {"name", "value", "unit", "baseline", "gate", "moonshot", "pass"}
SMALL = Size("small", 64, 2, clients=3, steps=2, batch=2, length=12, vocabulary=128)


def change(after, before):
    return {n: (after[n] - before[n]).double() for n in before}


def test_ours_and_the_plain_peft_loop_do_the_same_work(monkeypatch):
    monkeypatch.setattr(bench_simulation, "LR", 1.0)  # plain SGD at 1e-3 moves less than fp32 can tell
    ours = Ours(SMALL, optimizer="sgd")
    loop = plain_peft(SMALL, ours, optimizer="sgd")
    # PEFT starts its own A; both sides start from ours, and B is moved off zero so that A learns too.
    start = {n: t + 0.02 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) if "lora_B" in n else t
             for n, t in ours.state["theta"].items()}
    ours.state, loop.state = {"theta": start}, {n: t.clone() for n, t in start.items()}
    assert ours.round() == loop.round() == 3 * 2 * 2 * 12
    mine, theirs = change(ours.state["theta"], start), change(loop.state, start)
    size = sum(float(t.pow(2).sum()) for t in theirs.values()) ** 0.5
    apart = sum(float((mine[n] - theirs[n]).pow(2).sum()) for n in theirs) ** 0.5
    assert size > 0 and apart / size < 1e-4


def test_a_race_takes_turns_and_gives_speeds():
    ours = Ours(SMALL)
    speeds = race({"ours": ours, "plain_peft": plain_peft(SMALL, ours)}, repeats=2, floor=0.0)
    assert [len(s) for s in speeds.values()] == [2, 2]
    assert ratio(speeds, "ours", "plain_peft") > 0


def test_a_row_passes_on_its_side_of_the_gate():
    assert row("x/y", 9, "times", "z", 8)["pass"] is True
    assert row("x/y", 7, "times", "z", 8)["pass"] is False
    assert row("x/y", 9, "updates", "z", 8, least=True)["pass"] is False
    assert row("x/y", 9, "times", "z")["pass"] is None


def test_streaming_gives_the_mean():
    each = [update(seed) for seed in (0, 1, 2)]
    got = stream(iter(each))
    torch.testing.assert_close(got["w3"], sum(u["w3"] for u in each) / 3)


def test_svd_rows_are_complete_and_exact():
    rows = svd(d=64, clients=3, rank=2, repeats=1)
    assert all(set(r) >= FIELDS for r in rows)
    assert rows[1]["pass"] is True


def test_memory_is_measured_in_a_process_of_its_own():
    assert 1.5 < subprocess_row("evidence.bench.server", "peak", "3")["updates"] < 3


def test_run_bench_merges_into_the_file(tmp_path, monkeypatch):
    out = tmp_path / "results" / "bench.json"
    value = iter([1.0, 2.0])
    monkeypatch.setitem(bench.BENCHES, "codec", lambda: [row("codec/a", next(value), "times", "b", 1)])
    monkeypatch.setitem(bench.BENCHES, "svd", lambda: [row("svd/a", 5, "times", "b")])
    bench.run_bench(["codec"], out)
    bench.run_bench(["svd"], out)
    rows = bench.run_bench(["codec"], out)
    assert [r["value"] for r in rows] == [2.0]
    kept = json.loads(out.read_text())
    assert {r["name"]: r["value"] for r in kept["rows"]} == {"svd/a": 5.0, "codec/a": 2.0}
    assert all(set(r) >= FIELDS | {"measured"} for r in kept["rows"])
    assert set(kept["machine"]) >= {"cpu", "torch", "date"}


def test_an_unknown_bench_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match="Allowed: simulation"):
        bench.run_bench(["codec", "speed"], tmp_path / "bench.json")



def test_what_a_bench_measured_before_it_was_stopped_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "bench.json"

    def cut():
        yield row("codec/a", 2.0, "times", "b")
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.BENCHES, "codec", lambda: [row(f"codec/{n}", 1.0, "times", "b") for n in "ab"])
    bench.run_bench(["codec"], out)
    monkeypatch.setitem(bench.BENCHES, "codec", cut)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(["codec"], out)
    assert {r["name"]: r["value"] for r in json.loads(out.read_text())["rows"]} == {"codec/a": 2.0, "codec/b": 1.0}
