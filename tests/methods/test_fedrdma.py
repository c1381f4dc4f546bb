"""FedRDMA's chunks under methods: nothing changes, and a bad chunk alone comes again."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.program import drive
from fedllm.engines import Vectorized
from fedllm.privacy.composition import clash
from fedllm.privacy.secagg import SecAgg
from fedllm.wire.fedrdma import OWN, FedRDMA


class BadLine(Vectorized):
    """Flips a bit of some chunks of c1 on their way, so often."""

    times = 1

    def work(self, job, submit):
        got = super().work(job, submit)
        chunks = [k for k in got if k.startswith(OWN + "chunk/")] if isinstance(got, dict) else []
        if chunks and job.client == "c1" and self.times:
            self.times -= 1
            got = {**got, chunks[-1]: got[chunks[-1]].clone()}
            got[chunks[-1]][5] ^= 1
        return got


@pytest.mark.parametrize("name", ["fedavg", "flexlora", "local_only"])
@pytest.mark.parametrize("times", [0, 2])
def test_it_changes_nothing(begin, gap, name, times):
    flat = begin(name, dtype=torch.float32).go(2)
    line = begin(name, dtype=torch.float32, kind=BadLine, layers=(FedRDMA(chunk_bytes=4096),))
    line.engine.times = times
    line.go(2)
    worst = gap(flat.method.served(flat.state)[0], line.method.served(line.state)[0])
    assert worst == 0 or (times and worst < 1e-5)  # a late reply is folded last: rounding alone


def test_one_chunk_alone_is_sent_again(begin):
    run = begin("fedavg", dtype=torch.float32, kind=BadLine, layers=(layer := FedRDMA(chunk_bytes=4096),))
    states = [layer.init()]
    drive(run.method.round(run.state, run.world.infos()), run.engine, (layer,), states)
    by = run.engine.record.totals()["by_phase"]
    assert states[0]["resent"] == 1 and states[0]["chunks"] >= 8
    assert by["FedRDMA.again"]["up"] < 5000 < by["FedAvg.local"]["up"]


def test_what_is_bad_too_often_is_missing(begin, gap):
    run = begin("fedavg", kind=BadLine, layers=(FedRDMA(chunk_bytes=4096, max_retries=2),))
    run.engine.times = 9
    assert gap(run.go(1).state["theta"], begin("fedavg").go(1, ["c0", "c2", "c3"]).state["theta"]) < 1e-12
    alone = begin("fedavg", kind=BadLine, layers=(FedRDMA(chunk_bytes=4096, max_retries=0),))
    with pytest.raises(QuorumError, match="0 of 1 replies came whole, 1 needed"):
        alone.go(1, ["c1"])


def test_it_stands_next_to_the_wire(begin, gap):
    assert "list layer 'secagg' first" in (clash(FedRDMA(), SecAgg()) or "")
    masked = begin("fedavg", dtype=torch.float32, layers=(SecAgg(), FedRDMA(chunk_bytes=4096))).go(1)
    assert gap(masked.state["theta"], begin("fedavg", dtype=torch.float32).go(1).state["theta"]) < 1e-4
    with pytest.raises(RecipeError, match="chunk_bytes = 10 is not allowed"):
        FedRDMA(chunk_bytes=10)
    with pytest.raises(CompositionError):
        begin("fedavg", layers=(FedRDMA(), SecAgg())).go(1)
