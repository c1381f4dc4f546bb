"""FedMRL: without its parts it is FedAvg or FedProx, the map tells who is odd, and agents learn what pays."""

import numpy as np
import pytest
import torch

from fedllm.methods._qmix import Step, made, mixed, taught, values
from fedllm.methods._som import organized, typical
from fedllm.methods.agents.fedmrl import entropy
from tests.methods.conftest import begin

PLAIN = {"fairness": 0.0, "agg": "mean"}


def test_without_its_parts_it_is_fedavg_and_fedprox(gap):
    off = begin("fedmrl", fixed=0.0, **PLAIN).go(3)
    assert gap(off.state["theta"], begin("fedavg").go(3).state["theta"]) < 1e-12
    held = begin("fedmrl", fixed=0.3, **PLAIN).go(3)
    assert gap(held.state["theta"], begin("fedprox", mu=0.3).go(3).state["theta"]) < 1e-12


def test_agents_choose_and_say_so():
    run = begin("fedmrl", warmup=2, explore=0.0, mu_max=0.5).go(4)
    told = run.method.report(run.state)["mu_of_each_client_in_the_last_round"]
    assert set(told) == {"c0", "c1", "c2", "c3"} and all(v in (0, 0.125, 0.25, 0.375, 0.5) for v in told.values())
    assert list(run.state["past"]) == ["1", "2", "3"] and run.state["past"]["1"]["s"].shape == (4, 4)
    again = begin("fedmrl", warmup=2, explore=0.0, mu_max=0.5).go(4)
    assert again.method.report(again.state) == run.method.report(run.state)


def test_the_map_gives_equals_equal_weights_and_the_odd_one_less():
    rng = np.random.default_rng(0)
    w = np.ones((5, 20))
    same = typical(w, w.mean(0), organized(w, (2, 3), 2.0, rng), 2.0)
    assert same.sum() == pytest.approx(1) and np.allclose(same, 0.2)
    w = np.ones((5, 20)) + 0.05 * rng.normal(0, 1, (5, 20))
    w[3] = -w[3]
    odd = typical(w, w.mean(0), organized(w, (2, 3), 2.0, rng), 2.0)
    assert odd.sum() == pytest.approx(1) and odd[3] < 0.5 * np.delete(odd, 3).min()


def test_the_mixing_grows_with_every_agent_and_learns_what_pays():
    net, rng = made(0, 4, 3), torch.Generator().manual_seed(0)
    s = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    q = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)
    mixed(net, s, q).backward()
    assert (q.grad >= 0).all() and float(q.grad.max()) > 0
    steps = []
    for i in range(24):
        a = torch.randint(3, (3,), generator=rng)
        steps.append(Step(s, a, float((a == torch.tensor([0, 2, 1])).double().mean()), s))
        if i % 8 == 7:
            net = taught(net, steps, 0.0, 3e-2, passes=25)
    assert values(net, s).argmax(1).tolist() == [0, 2, 1]


def test_what_is_told_of_labels_is_their_entropy():
    rows = begin("fedmrl", task="classification").world.encoded("c3", "train")
    counts = np.unique([r.labels for r in rows], return_counts=True)[1] / len(rows)
    assert entropy(rows) == pytest.approx(-(counts * np.log(counts)).sum()) and entropy([]) == 0.0
