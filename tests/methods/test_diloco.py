"""DiLoCo against its identities, and what stays at the clients."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.payload import sub

ADAM = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}


def test_outer_rate_1_without_momentum_is_fedavg_whose_clients_keep_their_moments(begin, gap):
    plain = {"outer_lr": 1.0, "outer_momentum": 0.0}
    reset = begin("diloco", local=ADAM, inner_state="reset", **plain).go(3)
    average = begin("fedavg", local=ADAM, weighting="uniform").go(3)
    keeps = begin("diloco", local=ADAM, **plain).go(3)
    assert gap(reset.state["theta"], average.state["theta"]) < 1e-12
    assert gap(keeps.state["theta"], average.state["theta"]) > 1e-4


def test_one_inner_step_of_sgd_is_synchronous_sgd_with_torchs_nesterov(begin, gap):
    one = {"optimizer": "sgd", "lr": 0.1, "steps": 1}
    got = begin("diloco", local=one).go(3)
    theirs = begin("fedavg", local=one, weighting="uniform")
    w = {n: torch.nn.Parameter(t.clone()) for n, t in theirs.state["theta"].items()}
    outer = torch.optim.SGD(w.values(), 0.7, momentum=0.9, nesterov=True)
    for _ in range(3):  # what FedAvg would move, as a gradient of the outer optimizer
        theta = {n: p.detach().clone() for n, p in w.items()}
        theirs.state = {"theta": theta}
        for n, change in sub(theta, theirs.go(1).state["theta"]).items():
            w[n].grad = change
        outer.step()
    assert gap(got.state["theta"], {n: p.detach() for n, p in w.items()}) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_engines_agree_on_moments_too(begin, gap, dtype, tolerance):
    """Unequal rows: from the second round on clients have other step counters."""
    local = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9} if dtype is torch.float32 else ADAM
    one, many = (begin("diloco", engine=e, dtype=dtype, local=local).go(3) for e in ("in_process", "vectorized"))
    assert gap(one.state["theta"], many.state["theta"]) <= tolerance
    steps = set()
    for client, kept in one.engine.memory.items():
        assert gap(kept["inner"], many.engine.memory[client]["inner"]) <= tolerance
        steps.add(int(kept["inner"]["step"]))
    assert len(steps) > 1


def test_moments_stay_at_home_and_the_server_keeps_its_own(begin):
    run = begin("diloco", local=ADAM, loopback=True).go(2)
    assert set(run.state) == {"theta", "b"}
    sizes = {e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"}
    numbers = sum(t.numel() * t.element_size() for t in run.state["theta"].values())
    assert max(sizes) < 1.5 * numbers
