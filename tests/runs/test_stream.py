"""Rows in a stream: over rounds, over a kill in mid-epoch, each row of an epoch is trained on exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import fedllm
from fedllm.core.errors import CompositionError
from fedllm.data.order import PLACE, onward
from fedllm.engines.carry import RUNNERS
from fedllm.engines.client import ClientCall
from fedllm.local.requests import Fit
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe

ROWS = {"c0": 11, "c1": 7}
STEPS, LOT, ROUNDS = 3, 2, 5
LOGGED = """
import json, sys, time, fedllm
from fedllm.engines.client import ClientCall
plain = ClientCall._onward
def onward(self, rows, lot, steps):
    plan = plain(self, rows, lot, steps)
    with open(sys.argv[3], "a") as log:
        log.write(json.dumps([self.round, self.id, [int(i) for at in plan for i in at]]) + chr(10))
    time.sleep(0.2)
    return plan
ClientCall._onward = onward
"""


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder):
    for k, (client, n) in enumerate({**ROWS, "test": 3}.items()):  # tests take no row of the clients'
        rows = [{"prompt": " ".join(["red", "cat", "one", "dog"][(i + j) % 4] for j in range(1 + i % 5)),
                 "response": ["yes", "no", "word"][(i + k) % 3]} for i in range(n)]
        (tmp_path / "rows").mkdir(exist_ok=True)
        folder = tmp_path / "rows" if client in ROWS else tmp_path
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"name": "stream", "model": {"name": tiny_llama_folder}, "method": "fedavg",
            "space": {"name": "lora", "rank": 2}, "rounds": ROUNDS,
            "local": {"steps": STEPS, "batch_size": LOT, "order": "stream", "optimizer": "sgd", "lr": 0.05},
            "data": {"source": str(tmp_path / "rows"), "partition": {"kind": "per_file"}, "client_test": 0.0,
                     "test": str(tmp_path / "test.jsonl")},
            "evaluate": {"exact_match": False, "samples": 0}, "engine": "in_process"}


def once_each(seen, folder):
    """Of every whole epoch each row exactly once, and of the last one none twice; the place says how many."""
    _, kept = RunFolder.open(folder).load()
    for client, n in ROWS.items():
        rows = [i for round in range(ROUNDS) for i in seen[client, round]]
        assert len(rows) > 2 * n  # the third epoch has begun
        for epoch in range(0, len(rows), n):
            counted = Counter(rows[epoch : epoch + n])
            assert set(counted.values()) == {1}
        assert len({tuple(rows[e : e + n]) for e in range(0, 2 * n, n)}) == 2  # each epoch in an order of its own
        place = kept["memory"][client][PLACE]
        assert place["epoch"] * n + place["at"] == len(rows)


def test_a_run_that_is_stopped_in_mid_epoch_sees_every_row_once(recipe, tmp_path, monkeypatch):
    seen, attempts, train, plain = {}, Counter(), RUNNERS[Fit], ClientCall._onward

    def watched(self, rows, lot, steps):
        plan = plain(self, rows, lot, steps)
        seen[self.id, self.round] = np.concatenate(plan).tolist()
        attempts[self.id, self.round] += 1
        return plan

    def stopped(requests, limits):
        done = train(requests, limits)
        if requests[0].client == "c0" and attempts["c0", 3] == 1 and attempts["c0", 4] == 0:
            raise KeyboardInterrupt  # c0 has trained in round 3, c1 has not, and both are in mid-epoch
        return done

    monkeypatch.setattr(ClientCall, "_onward", watched)
    whole = fedllm.run(recipe, root=tmp_path / "whole")
    once_each(seen, whole.folder)
    seen.clear(), attempts.clear()
    monkeypatch.setitem(RUNNERS, Fit, stopped)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(recipe, root=tmp_path / "cut")
    assert all(3 * STEPS % -(-n // LOT) for n in ROWS.values()) and ("c1", 3) not in seen
    monkeypatch.setitem(RUNNERS, Fit, train)
    again = fedllm.resume(tmp_path / "cut" / "stream")
    assert attempts["c0", 3] == 2 and attempts["c1", 3] == 1
    once_each(seen, again.folder)
    assert again.state_digest == whole.state_digest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_goes_on_in_mid_epoch(recipe, tmp_path):
    log, run, kills = tmp_path / "seen.jsonl", tmp_path / "cut" / "stream", 0
    begin = [sys.executable, "-c", LOGGED + "fedllm.run(json.loads(sys.argv[1]), root=sys.argv[2])", json.dumps(recipe),
             str(tmp_path / "cut"), str(log)]
    go_on = [sys.executable, "-c", LOGGED + "fedllm.resume(sys.argv[1])", str(run), "", str(log)]
    for words, lines in ((begin, 3), (go_on, 8)):
        process, ends = subprocess.Popen(words), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < ends:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        kills += process.wait(30) == -signal.SIGKILL
    assert kills == 2
    subprocess.run(go_on, check=True, timeout=120)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) > len(ROWS) * ROUNDS  # some round was begun more than once
    once_each({(client, round): rows for round, client, rows in lines}, run)  # its last attempt is the one that counted


def test_batches_of_an_epoch_and_what_does_not_go_with_a_stream(recipe):
    order = lambda epoch: np.arange(5) + 10 * epoch  # noqa: E731
    plan, place = onward(5, 2, 4, None, order)
    assert [at.tolist() for at in plan] == [[0, 1], [2, 3], [4], [10, 11]] and place == {"epoch": 1, "at": 2}
    plan, place = onward(5, 2, 2, place, order)
    assert [at.tolist() for at in plan] == [[12, 13], [14]] and place == {"epoch": 2, "at": 0}
    with pytest.raises(CompositionError, match=r"local\.order = 'stream' and layer 'dp_sgd'"):
        build(load_recipe({**recipe, "layers": [{"name": "dp_sgd", "noise_multiplier": 1.0}]}, {}))
