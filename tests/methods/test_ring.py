"""A ring all-reduce: equal to the flat sum, sealed to the server, broken by silence."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fedllm.core.errors import CompositionError, PayloadError, QuorumError
from fedllm.core.layer import Facts
from fedllm.core.program import drive
from fedllm.engines import Vectorized
from fedllm.privacy.composition import clash
from fedllm.privacy.secagg import SecAgg
from fedllm.wire import codec
from fedllm.wire.codec_quant import CodecQuant
from fedllm.wire.ring_all_reduce import HELD, OWN, RingAllReduce
from fedllm.wire.server_tree import ServerTree


@pytest.mark.parametrize("name, knobs", [("fedavg", {}), ("fedex_lora", {}), ("scaffold", {})])
@pytest.mark.parametrize("sizes", [(5,), (5, 7), (5, 7, 9, 12, 6)])
def test_it_is_the_flat_sum(begin, gap, name, knobs, sizes):
    flat = begin(name, sizes=sizes, **knobs).go(2)
    ring = begin(name, sizes=sizes, layers=(RingAllReduce(),), engine="in_process", loopback=True, **knobs).go(2)
    assert gap(flat.method.served(flat.state)[0], ring.method.served(ring.state)[0]) < 1e-10
    assert not any(HELD in memory for memory in ring.engine.memory.values())


def test_under_a_tree_each_edge_has_its_ring(begin, gap):
    sizes = (5, 7, 9, 12, 6, 8)
    flat = begin("fedavg", sizes=sizes).go(2)
    both = begin("fedavg", sizes=sizes, layers=(ServerTree(fan_out=(2,)), RingAllReduce())).go(2)
    assert gap(flat.state["theta"], both.state["theta"]) < 1e-10


class Watching(Vectorized):
    """Keeps every reply as the server gets it."""

    got: tuple = ()

    def work(self, job, submit):
        reply = super().work(job, submit)
        self.got = (*self.got, (job.fold.ask.phase, job.client, reply))
        return reply


def test_the_server_reads_no_single_reply_and_clients_send_no_more(begin):
    flat = begin("fedavg", dtype=torch.float32, kind=Watching).go(1)
    ring = begin("fedavg", dtype=torch.float32, kind=Watching, layers=(RingAllReduce(),)).go(1)
    deltas = [v * r["n"] for _, _, r in flat.engine.got for k, v in r.items()
              if k.startswith("delta/") and v.reshape(-1)[:16].all()]
    sent = b"".join(bytes(codec.encode(r)) for _, _, r in ring.engine.got)
    assert deltas and all(d.reshape(-1)[:16].numpy().tobytes() not in sent for d in deltas)
    up = {run: Counter() for run in ("flat", "ring")}
    for name, run in (("flat", flat), ("ring", ring)):
        for e in run.engine.record.events:
            if e["kind"] == "wire" and e["direction"] == "up":
                up[name][e["client"]] += e["bytes"]
    for c in up["flat"]:  # N letters with their framing
        assert up["ring"][c] < up["flat"][c] + 4 * 700


def test_a_client_that_falls_silent_breaks_the_ring(begin):
    class Deaf(Vectorized):
        def work(self, job, submit):
            late = job.client == "c2" and job.fold.ask.phase == "RingAllReduce.turn" and job.visit == 2
            return "fell silent" if late else super().work(job, submit)

    with pytest.raises(QuorumError, match=r"the ring broke in step 2 of 4 \(c2: fell silent\)"):
        begin("fedavg", kind=Deaf, layers=(RingAllReduce(),)).go(1)


def test_who_is_silent_from_the_start_is_left_out(begin, gap):
    ring = begin("fedavg", layers=(RingAllReduce(),))
    info = ring.engine.infos["c1"]
    ring.engine.infos["c1"] = dataclasses.replace(info, profile=dataclasses.replace(info.profile, availability=0.0))
    assert gap(ring.go(1).state["theta"], begin("fedavg").go(1, ["c0", "c2", "c3"]).state["theta"]) < 1e-12


@pytest.mark.parametrize("above, below, says", [
    (SecAgg(), RingAllReduce(), "the same work twice"), (RingAllReduce(), ServerTree(), "use secagg"),
    (RingAllReduce(), CodecQuant(), "cannot be compressed"), (CodecQuant(), RingAllReduce(), "do not add up")])
def test_what_does_not_fit(above, below, says):
    assert says in (clash(above, below) or "")


def test_single_replies_are_refused(begin):
    run = begin("local_only", layers=(RingAllReduce(),))
    with pytest.raises(CompositionError, match="needs every single reply"):
        drive(run.method.round(run.state, run.world.infos()), run.engine, run.engine.stack[1:])
    assert OWN == "ring/"


def test_a_ring_of_one_in_a_run_of_many_reads_nothing(begin):
    """A server that names a ring of its own would read a whole reply in one step."""
    layer = RingAllReduce().bind(Facts(dict.fromkeys("abcde", 3), 5, 2))
    client = SimpleNamespace(id="a", memory={HELD: {"x": torch.ones(4), "y": torch.ones(1)}})
    with pytest.raises(PayloadError, match="refuses a ring of 1"):
        layer.turn({"sid": "1", "step": 0, "place": 0, "n": 1}, client)
