"""The model as seeds and scalars: replay, weights, bytes."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.trials import RIGS
from fedllm.core.errors import CompositionError
from fedllm.engines.client import ClientCall
from fedllm.local.perturb import Directions, flat
from fedllm.local.zeroth import rebuild, replay
from fedllm.methods.efficiency.fedkseed import Pools
from fedllm.wire import codec

KNOBS = {"space": "full", "K": 16, "steps": 5, "lr": 1e-2, "eps": 1e-3, "dtype": torch.float32}


def test_server_and_clients_hold_the_same_bits(begin):
    run = begin("fedkseed", **KNOBS).go(2)
    served = run.method.served(run.state)[0]
    built = rebuild(run.world.model, run.state["A"], 0, 1e-2, "gaussian")
    assert all(torch.equal(served[n], built[n]) for n in served)
    assert int((run.state["A"] != 0).sum()) > 5


def test_the_replay_is_the_average_of_the_clients_weights(begin, monkeypatch):
    """sum_k p_k w_k = w_0 - eta sum_j A_j z_j to 1e-5, after two rounds."""
    run, seen = begin("fedkseed", **KNOBS), {}
    watch(monkeypatch, seen)
    run.go(1)
    seen.clear()
    run.go(1)
    mean = sum(c.n / 33 * end_of(seen[c.id]) for c in run.world.infos())
    assert float((mean - flat(run.method.served(run.state)[0])).abs().max()) < 1e-5


def watch(monkeypatch, seen):
    """Note each client's points and losses."""
    original = ClientCall.probe

    def probe(self, thetas, rows=None, **more):
        got = original(self, thetas, rows, **more)
        seen.setdefault(self.id, []).extend((flat(theta), one.mean) for theta, one in zip(thetas, got, strict=True))
        return got

    monkeypatch.setattr(ClientCall, "probe", probe)


def end_of(points):
    """Where a client's last step led: w - eta g z, from w + eps z and w - eps z."""
    (up, high), (lo, low) = points[-2:]
    return (up + lo) / 2 - 1e-2 * (high - low) / (2 * 1e-3) * (up - lo) / (2 * 1e-3)


def test_pools_take_pairs_and_whole_lists():
    pairs = {"K": 4, "at": torch.tensor([1, 3]).int(), "g": torch.tensor([1.0, 2.0]), "n": 1.0, "loss": 0.0}
    whole = {"G": torch.tensor([1.0, 0.0, 0.0, 4.0]), "n": 3.0, "loss": 0.0}
    pools = Pools()
    out = pools.done(pools.add(pools.add({}, pairs), whole))
    assert out["G"].tolist() == [0.75, 0.25, 0.0, 3.5]


def test_messages_are_small_and_do_not_know_the_model(begin):
    method = begin("fedkseed", K=4096, steps=200, space="full").method
    import numpy as np

    down = method.down({"A": torch.zeros(4096)}, None)
    up = {**method.sparse([1.0] * 200, np.arange(200)), "n": 10, "loss": 1.0}
    assert codec.size(down) + codec.size(up) < 18_432


def test_what_breaks_the_replay_is_refused(begin):
    with pytest.raises(CompositionError, match="schedule or weight decay"):
        begin("fedkseed", **KNOBS, local={"weight_decay": 0.1}).go()


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_accumulators_at_zero_are_the_base(law):
    w0 = {"b": torch.ones(3), "a": torch.zeros(2)}
    assert all(torch.equal(x, w0[n]) for n, x in replay(w0, torch.zeros(8), 0, 1.0, "gaussian").items())
    once = replay(w0, torch.tensor([0.0, 2.0]), 0, 0.5, law)
    z = Directions(0, 5, law).direction(1)
    assert torch.allclose(once["a"], -z[:2]) and torch.allclose(once["b"], 1 - z[2:])


@pytest.mark.slow
def test_the_loss_falls_on_a_tiny_llama():
    got = RIGS["tiny_lm"]("fedkseed", 0, sizes=(32,), knobs={"K": 512, "steps": 60, "lr": 3e-3, "eps": 1e-3})
    assert got["fall"] >= 0.1
