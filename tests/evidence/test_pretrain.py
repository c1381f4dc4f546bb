"""The pre-training run on a few lines of text: what is there is not run again, and bytes are what crosses the wire."""

import json

import pytest

from evidence import pretrain
from evidence.pages.pretrain import compared


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    plays = tmp_path / "plays.txt"
    plays.write_text("To be, or not to be, that is the question.\n" * 800)
    small = {"OUT": tmp_path / "pretrain.json", "PLAYS": str(plays), "STEPS": 4, "EVERY": 2, "OFFICE": 40, "HELD": 4,
             "SPANS": (2, 4), "RATES": (1e-3,), "LOCAL": {**pretrain.LOCAL, "warmup": 1}}
    for name, value in small.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "ARMS", {n: a for n, a in pretrain.ARMS.items() if n in ("diloco", "sparse_loco")})
    pretrain.blocks.cache_clear()
    pretrain.main([0])
    found = json.loads(small["OUT"].read_text())
    want = {("ddp", 1), *((a, h) for a in pretrain.ARMS for h in (2, 4))}
    assert {(c["arm"], c["H"]) for c in found["cells"]} == want
    assert len({c["tokens"] for c in found["cells"]}) == 1
    rows = {(r["arm"], r["H"]): r for r in compared(found["cells"])}
    assert rows["diloco", 4]["fewer"] == pytest.approx(4, rel=0.01)
    assert rows["sparse_loco", 4]["fewer"] > 100
    monkeypatch.setattr(pretrain, "TIMES", 2)
    pretrain.main([0], longer=True)
    long = json.loads(small["OUT"].read_text())["longer"]
    assert {(c["arm"], c["H"], c["tokens"]) for c in long} == {
        (arm, 1 if arm == "ddp" else 4, 2 * found["cells"][0]["tokens"]) for arm in ("ddp", "diloco", "sparse_loco")}
    assert "## 2 times as long" in (tmp_path / "pretrain.md").read_text()
    lost = {**found, "cells": found["cells"][:-1]}
    small["OUT"].write_text(json.dumps(lost))
    monkeypatch.setattr(pretrain, "ddp", None)  # nothing of it is left to do
    pretrain.main([0])
    again = json.loads(small["OUT"].read_text())
    assert "times as long" not in (tmp_path / "pretrain.md").read_text()
    for c in (found, again):
        for cell in c["cells"]:
            cell.pop("cpu_seconds")
    assert again == found
    pretrain.blocks.cache_clear()
