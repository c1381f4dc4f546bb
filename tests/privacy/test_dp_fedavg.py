"""Clipping, noise, sampling and the clip that follows a quantile, on numbers and on a real model."""

import math
from dataclasses import dataclass, replace

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import pack
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.privacy.accountant import BudgetSpent
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.spaces.lora import factors


class Ship:
    """Every client sends its own vector."""

    def round(self, state, clients):
        return (yield Ask(self.local, {c: {} for c in clients})).value

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"x": client.x}, n=client.n, loss=float(client.n))

    @on_client()
    def each(self, msg, client):
        return {"x": client.x}


@dataclass(frozen=True)
class Told:
    """Clients answer with weights: what they were told plus their vector."""

    def round(self, state, clients):
        return (yield Ask(self.local, {c: pack(theta={"x": state}) for c in clients})).value

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(theta={"x": msg["theta/x"] + client.x}, n=client.n)


def run(layer, clients, loop, method=None, states=None, start=None):
    method = method or Ship()
    states = states if states is not None else [layer.init()]
    return drive(method.round(start, clients), loop((method, layer), clients), [layer], states), states[0]


def test_without_noise_and_with_a_wide_clip_it_is_the_uniform_mean(loop, people):
    clients = people(6)
    value, state = run(DPFedAvg(noise_multiplier=0, clip_norm=1e6, clip_lr=0), clients, loop)
    torch.testing.assert_close(value["delta/x"], torch.stack([c.x for c in clients.values()]).mean(0))
    assert "loss" not in value and value["n"] == 6  # a training loss is a release too, and has no noise
    assert "without noise" in state["unbooked"][0]


def test_weights_are_clipped_as_changes_of_what_was_told(loop, people):
    clients, start = people(4), torch.full((40,), 100.0)
    value, _ = run(DPFedAvg(noise_multiplier=0, clip_norm=0.5, clip_lr=0), clients, loop, Told(), start=start)
    change = torch.stack([c.x * min(1, 0.5 / c.x.norm()) for c in clients.values()]).mean(0)
    torch.testing.assert_close(value["theta/x"], start + change, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("x, n", [(torch.randn(40) * 1e6, 10**6), (torch.zeros(40), 1), (torch.ones(40) * 1e-9, 10**6)])
def test_no_client_moves_the_sum_before_noise_by_more_than_the_clip(loop, people, x, n):
    """With and without the client; the divisor is taken out."""
    clients, layer = people(5), DPFedAvg(noise_multiplier=0, clip_norm=0.7, clip_lr=0)
    clients["c04"].x, clients["c04"].n = x, n
    sums = []
    for silent in ((), ("c04",)):
        value = drive(Ship().round(None, clients), loop((Ship(), layer), clients, {"local": silent}), [layer])
        sums.append(value["delta/x"].double() * 5)
    assert float((sums[0] - sums[1]).norm()) <= 0.7 * (1 + 1e-5)


def test_the_noise_has_the_deviation_that_the_ledger_is_told(loop, people):
    z, clip, clients = 2.0, 0.3, people(4, size=100_000)
    quiet = DPFedAvg(noise_multiplier=0, clip_norm=clip, clip_lr=0)
    plain, _ = run(quiet, clients, loop)
    fixed, state = run(replace(quiet, noise_multiplier=z), clients, loop)
    assert float((fixed["delta/x"] - plain["delta/x"]).std()) == pytest.approx(z * clip / 4, rel=0.03)
    assert state["releases"] == [[z, "none", 1.0, 4, 1]] and state["unbooked"] == []
    adaptive, _ = run(replace(quiet, noise_multiplier=z, clip_lr=0.2, count_noise=2.0), clients, loop)
    z_u = (z**-2 - 4.0**-2) ** -0.5
    assert float((adaptive["delta/x"] - plain["delta/x"]).std()) == pytest.approx(z_u * clip / 4, rel=0.03)
    again, _ = run(replace(quiet, noise_multiplier=z), clients, loop)
    assert not again["delta/x"].equal(fixed["delta/x"])  # the operating system's randomness


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
def test_the_clip_goes_to_the_median_of_the_norms(loop, people, start):
    """Andrew et al.'s sign: norms uniform on [0.5, 1.5] have the median 1. With the other sign the clip runs away."""
    clients = people(20, size=2)
    for i, c in enumerate(clients.values()):
        c.x = torch.tensor([0.5 + (i + 0.5) / 20, 0.0])
    layer, state = DPFedAvg(noise_multiplier=0.5, clip_norm=start, clip_lr=0.2, count_noise=1.0, seed=3), None
    states = [layer.init()]
    for _ in range(200):
        _, state = run(layer, clients, loop, states=states)
    assert state["clip"] == pytest.approx(1.0, abs=0.15)


def test_a_noisy_share_of_unclipped_clients_is_a_share(loop, people):
    """However loud the count's noise, a round moves the clip by no more than exp(lr max(quantile, 1 - quantile))."""
    clients, layer = people(5), DPFedAvg(noise_multiplier=1.0, clip_norm=1.0, clip_lr=0.2, count_noise=1e4, seed=3)
    states, clips = [layer.init()], [1.0]
    for _ in range(20):
        _, state = run(layer, clients, loop, states=states)
        clips.append(state["clip"])
    steps = np.diff(np.log(clips))
    assert np.allclose(np.abs(steps), 0.2 * 0.5) and {*np.sign(steps)} == {-1.0, 1.0}


@pytest.mark.parametrize("sampling, rate", [("none", 1.0), ("poisson", 0.4)])
def test_epsilon_is_that_of_an_independent_computation(loop, people, sampling, rate):
    clients = people(10)
    layer = DPFedAvg(noise_multiplier=1.2, sampling=sampling, rate=rate, delta=1e-5).bind(
        Facts(dict.fromkeys(clients, 1), 10, 12))
    states = [layer.init() | {"shapes": [["delta/x", [40]], ["_dp/below", []]]}]
    for _ in range(12):
        run(layer, clients, loop, states=states)
    gaussian = dp.GaussianDpEvent(1.2)
    event = gaussian if sampling == "none" else dp.PoissonSampledDpEvent(rate, gaussian)
    independent = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event, 12).get_epsilon(1e-5)
    says = layer.statement(states[0])
    assert says["epsilon"] == pytest.approx(independent, rel=0.01)
    assert (says["unit"], says["sampling"], says["delta"], says["releases"]) == ("client", sampling, 1e-5, 12)
    assert says["epsilon_rdp"] > says["epsilon"] and not says["void"]


def test_a_coin_is_thrown_for_each_client_and_an_empty_draw_is_noise(loop, people):
    clients, sizes = people(8), []
    layer = DPFedAvg(noise_multiplier=1.0, clip_lr=0, sampling="poisson", rate=0.25, seed=0)
    states = [layer.init() | {"shapes": [["delta/x", [40]], ["_dp/below", []]]}]
    for _ in range(60):
        engine = loop((Ship(), layer), clients)
        value = drive(Ship().round(None, clients), engine, [layer], states)
        sizes.append(len(engine.told))
        assert value["delta/x"].shape == (40,) and float(value["delta/x"].norm()) > 0 and value["n"] == 2.0
    assert 0 in sizes and len(set(sizes)) > 3 and abs(sum(sizes) / 60 - 2.0) < 0.6
    fixed = DPFedAvg(noise_multiplier=1.0, sampling="fixed", rate=0.5)
    engine = loop((Ship(), fixed), clients)
    drive(Ship().round(None, clients), engine, [fixed])
    assert len(engine.told) == 4


def test_the_first_draw_of_nobody_is_told_and_voids_the_claim(loop, people):
    layer = DPFedAvg(noise_multiplier=1.0, sampling="poisson", rate=1e-9)
    states = [layer.init()]
    with pytest.raises(QuorumError, match="chose nobody"):
        run(layer, people(3), loop, states=states)
    assert states[0]["unbooked"]


def test_the_budget_sets_the_noise_and_stops_the_run(loop, people):
    clients = people(10)
    layer = DPFedAvg(epsilon=5.0, delta=1e-3).bind(Facts(dict.fromkeys(clients, 1), 10, 3))
    assert DPFedAvg(noise_multiplier=1.0).bind(Facts(dict.fromkeys(clients, 1))).delta == 1e-5
    states = [layer.init()]
    for _ in range(3):
        run(layer, clients, loop, states=states)
    assert 4.9 < layer.statement(states[0])["epsilon"] <= 5.0
    with pytest.raises(BudgetSpent, match="the budget is 5"):
        for _ in range(4):
            run(layer, clients, loop, states=states)
    assert layer.statement(states[0])["epsilon"] <= 5.0


@pytest.mark.parametrize("knobs, says", [
    ({"noise_multiplier": 1.0, "clip_norm": 0.0}, "clip_norm = 0.0"), ({"epsilon": 0.0}, "epsilon = 0.0"),
    ({"epsilon": math.inf}, "epsilon = inf"), ({}, "both missing"),
    ({"noise_multiplier": 1.0, "delta": 1.0}, "delta = 1.0"), ({"noise_multiplier": 1.0, "rate": 0.5}, "rate = 0.5"),
    ({"noise_multiplier": 2.0, "count_noise": 1.0}, "count_noise")])
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(RecipeError, match=says):
        DPFedAvg(**knobs)


def test_a_delta_that_may_expose_a_client_and_replies_one_by_one_are_refused():
    with pytest.raises(RecipeError, match=r"delta = 0.1 is not allowed with 10 units"):
        DPFedAvg(noise_multiplier=1.0, delta=0.1).bind(Facts(dict.fromkeys("abcdefghij", 1), 10, 3))
    with pytest.raises(CompositionError, match=r"dp_fedavg.*'Ship.each' needs every single reply.*fedavg, flexlora"):
        DPFedAvg(noise_multiplier=1.0).check(Ship(), {"local": Mean(), "each": None, "score": None})


@pytest.mark.parametrize("method", ["fedavg", "fedit", "ffa_lora", "scaffold", "flexlora"])
def test_real_methods_train_under_it(tiny, method):
    """Any Sum: a mean of changes, of weights, of two trees, of products through `lift`."""
    layer = DPFedAvg(noise_multiplier=1e-6, clip_norm=1e3, clip_lr=0)
    engine, m, start, world = tiny(method, [layer], k=3, loopback=True)
    engine.begin(0)
    state = drive(m.round(start, world.infos()), engine, [layer])
    bare, m, start, world = tiny(method, (), k=3)
    for info in list(bare.infos.values()):
        bare.infos[info.id] = replace(info, n=1)  # one client, one vote
    bare.begin(0)
    plain = drive(m.round(start, list(bare.infos.values())[:3]), bare)
    if method == "flexlora":  # factors are unique up to signs
        for path, (b, a) in factors(plain["theta"]).items():
            other = factors(state["theta"])[path]
            torch.testing.assert_close(other[0] @ other[1], b @ a, atol=2e-3, rtol=1e-3)
        return
    for name, x in plain["theta"].items():
        torch.testing.assert_close(state["theta"][name], x, atol=2e-3, rtol=1e-3)
