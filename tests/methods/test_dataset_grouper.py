"""FedAvg and FedSGD on groups: one step is the same for both, and FedSGD's gradients are all at one point."""

from __future__ import annotations

import pytest

from fedllm.core.payload import leaves

ONE = {"batch_size": 4, "steps": 1}


def test_with_one_step_both_algorithms_are_the_same(begin, gap):
    one, other = (begin("dataset_grouper", algorithm=a, local=ONE).go(3) for a in ("fedavg", "fedsgd"))
    assert gap(one.state["theta"], other.state["theta"]) < 1e-9


def test_fedsgd_is_the_sum_of_gradients_at_one_point(begin, gap):
    """Twice the batches of half the rate are no other point: FedSGD's pseudo-gradient is linear in the rate."""
    big, small = (begin("dataset_grouper", local={**ONE, "steps": 3, "lr": lr}) for lr in (0.1, 0.05))
    g = [r.go(1).state["m"] for r in (big, small)]
    assert gap(g[0], {n: 2 * t for n, t in g[1].items()}) < 1e-9
    g = [begin("dataset_grouper", algorithm="fedavg", local={**ONE, "steps": 3, "lr": lr}).go(1).state["m"]
         for lr in (0.1, 0.05)]
    assert gap(g[0], {n: 2 * t for n, t in g[1].items()}) > 1e-7


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_engines_agree(begin, gap, algorithm):
    runs = [begin("dataset_grouper", algorithm=algorithm, local={**ONE, "steps": 3}, engine=e).go(2)
            for e in ("in_process", "vectorized")]
    one, other = ({p: v for p, v in leaves(r.state) if p != "t"} for r in runs)
    assert gap({k: v for k, v in one.items() if k.startswith("m")},
               {k: v for k, v in other.items() if k.startswith("m")}) < 1e-10
