"""Correlated noise: the tree's covering, the banded matrix, who may take part, and what it costs."""

import math
from dataclasses import dataclass

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import digest, pack
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.privacy.accountant import BudgetSpent
from fedllm.privacy.dp_ftrl import DPFTRL


@dataclass(frozen=True)
class Ship:
    """Every client sends its own vector."""

    def round(self, clients):
        return (yield Ask(self.local, {c: {} for c in clients})).value

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"x": client.x}, n=client.n)


def facts(clients, rounds, cohort=None):
    return Facts(dict.fromkeys(clients, 1), cohort or len(clients), rounds)


def go(layer, clients, loop, rounds, states=None, asked=None):
    """So many rounds; the values, who was used in each, and the layer's state."""
    states, values, used = states or [layer.init()], [], []
    for r in range(rounds):
        engine = loop((Ship(), layer), clients)
        values.append(drive(Ship().round(asked(r) if asked else clients), engine, [layer], states)["delta/x"])
        used.append([c for _, c, _ in engine.seen])
    return values, used, states[0]


@pytest.mark.parametrize("span", range(1, 17))
def test_the_tree_covers_each_prefix_with_the_nodes_of_its_binary_digits(people, loop, span):
    """xi_1 + ... + xi_t is the sum of as many independent nodes as t has ones, each of deviation z * clip."""
    clients = people(2, size=20_000)
    layer = DPFTRL(noise_multiplier=2.0, clip_norm=0.5, restart_every=span, cohort=2)
    for c in clients.values():
        c.x = torch.zeros(20_000)
    state, total = layer.init(), torch.zeros(20_000)
    at = {"t": 0, "last": {}, "live": []}
    for t in range(1, span + 1):
        at["t"] = t
        total += layer._noise_of({"x": torch.zeros(20_000)}, "p", at, t, state)["x"]
        live = sum((node["x"] for _, node in at["live"]), torch.zeros(20_000))
        torch.testing.assert_close(total, live, atol=1e-4, rtol=1e-4)
        assert len(at["live"]) == t.bit_count() <= math.ceil(math.log2(t + 1))
        assert float(total.std()) == pytest.approx(1.0 * t.bit_count() ** 0.5, rel=0.03)


@pytest.mark.parametrize("bands", [1, 3, 8])
def test_banded_noise_is_the_inverse_of_the_banded_matrix(bands):
    """C xi is white with deviation z * clip, for C the banded square root of the prefix sums."""
    d, rounds = 20_000, 12
    layer = DPFTRL(noise_multiplier=1.5, clip_norm=2.0, mechanism="banded", min_separation=bands, restart_every=rounds)
    state, at = layer.init(), {"t": 0, "last": {}, "live": []}
    xi = []
    for t in range(1, rounds + 1):
        at["t"] = t
        xi.append(layer._noise_of({"x": torch.zeros(d, dtype=torch.float64)}, "p", at, t, state)["x"].numpy())
        assert len(at["live"]) <= max(1, bands - 1)
    c = np.array(layer.bands)
    assert c[0] == 1.0 and np.allclose(c[1:3], [0.5, 0.375][: bands - 1])
    matrix = sum(c[j] * np.eye(rounds, k=-j) for j in range(bands))
    white = matrix @ np.array(xi)
    assert np.allclose(np.cov(white), 9.0 * np.eye(rounds), atol=0.4)
    # sensitivity: the worst pattern of parts that are `bands` apart, tried one by one
    worst = max(sum(matrix[:, s::bands][:, i] @ matrix[:, s::bands][:, j] for i in range(n) for j in range(n))
                for s in range(bands) if (n := len(range(s, rounds, bands))))
    assert layer.sensitivity**2 >= worst - 1e-9
    assert layer.sensitivity**2 <= worst * (1.0 if bands == 1 else 1.5)


def test_without_noise_it_is_the_mean_of_the_clipped(people, loop):
    clients = people(6)
    layer = DPFTRL(noise_multiplier=0, clip_norm=0.5).bind(facts(clients, 3))
    values, used, state = go(layer, clients, loop, 3)
    clipped = {c: p.x * min(1, 0.5 / float(p.x.norm())) for c, p in clients.items()}
    for value, who in zip(values, used, strict=True):
        torch.testing.assert_close(value, torch.stack([clipped[c] for c in who]).mean(0), atol=1e-5, rtol=1e-5)
    assert "without noise" in state["unbooked"][0]


@pytest.mark.parametrize("mechanism, knobs, apart", [("tree", {}, 5), ("tree", {"restart_every": 3}, 3),
                                                     ("banded", {"min_separation": 4}, 4)])
def test_nobody_takes_part_too_often_in_1000_random_schedules(people, loop, mechanism, knobs, apart):
    """Cohorts as a recipe draws them, at random; the layer lets each client in once in `apart` rounds."""
    ask = Ask(Ship().local, {})
    for trial in range(1000):
        rng, last = numpy_stream(trial, "schedule"), {}
        clients = [f"c{i}" for i in range(int(rng.integers(10, 30)))]
        layer = DPFTRL(noise_multiplier=1.0, mechanism=mechanism, **knobs).bind(facts(clients, 5, len(clients) // 2))
        at = {"t": 0, "last": {}, "live": []}
        for t in range(1, 6):
            asked = rng.choice(clients, len(clients) // 2, replace=False).tolist()
            inside = (t - 1) % layer.restart_every + 1
            if inside == 1:
                layer._pay("p", at, {"secret": 1})
                if mechanism == "tree":
                    last = {}
            chosen = layer._draw(Ask(ask.fn, {c: {} for c in asked}), at, inside)
            at["t"] += 1
            at["last"] |= dict.fromkeys(chosen, at["t"])
            assert len(chosen) <= layer.cohort
            for c in chosen:
                assert c not in last or (mechanism == "banded" and t - last[c] >= apart)
                last[c] = t


def test_all_asked_means_equal_cohorts_and_a_full_rotation(people, loop):
    clients = people(10)
    layer = DPFTRL(noise_multiplier=1.0, mechanism="banded", min_separation=5).bind(facts(clients, 20))
    _, used, _ = go(layer, clients, loop, 20)
    assert all(len(who) == 2 for who in used) and used[:5] == used[5:10] == used[15:]
    assert sorted(c for who in used[:5] for c in who) == sorted(clients)


@pytest.mark.parametrize("z, rounds, published", [(2.0, 128, 7.77), (2.0, 1024, 9.36), (5.0, 128, 2.77)])
def test_epsilon_of_the_tree_is_that_of_an_independent_computation(people, z, rounds, published):
    """`dp-accounting` has an event for the tree, which its RDP accountant alone can read; the PLD is tighter."""
    layer = DPFTRL(noise_multiplier=z, delta=1e-6).bind(facts([f"c{i}" for i in range(rounds)], rounds))
    state = layer.init()
    layer._pay("p", {"t": 0, "last": {}, "live": []}, state)
    event = dp.SingleEpochTreeAggregationDpEvent(z, [rounds])
    independent = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL).compose(event)
    says = layer.statement(state)
    assert says["epsilon_rdp"] == pytest.approx(independent.get_epsilon(1e-6), rel=0.01)
    assert says["epsilon_rdp"] == pytest.approx(published, rel=0.01)
    assert says["epsilon"] < says["epsilon_rdp"] and says["unit"] == "client" and not says["void"]


def test_epsilon_of_restarts_and_of_bands(people, loop):
    clients = people(12, size=4)
    layer = DPFTRL(noise_multiplier=3.0, restart_every=4, delta=1e-5).bind(facts(clients, 12))
    _, _, state = go(layer, clients, loop, 12)
    gauss = lambda z: PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(dp.GaussianDpEvent(z), 1)  # noqa: E731
    independent = gauss(3.0 / 3**0.5 / 3**0.5).get_epsilon(1e-5)  # three trees of depth 3 are one Gaussian
    assert layer.statement(state)["epsilon"] == pytest.approx(independent, rel=0.01)
    banded = DPFTRL(noise_multiplier=6.0, mechanism="banded", min_separation=3, delta=1e-5).bind(facts(clients, 12))
    _, _, state = go(banded, clients, loop, 12)
    column = 1 + 0.25 + 0.375**2
    assert banded.statement(state)["epsilon"] == pytest.approx(
        gauss(6.0 / (4 * column) ** 0.5).get_epsilon(1e-5), rel=0.01)
    flat = DPFTRL(noise_multiplier=6.0, mechanism="banded", delta=1e-5).bind(facts(clients, 12))  # plain DP-FedAvg
    _, _, state = go(flat, clients, loop, 12)
    assert flat.statement(state)["epsilon"] == pytest.approx(gauss(6.0 / 12**0.5).get_epsilon(1e-5), rel=0.01)


def test_the_running_sum_carries_less_noise_than_under_independent_noise():
    """At one epsilon over 64 rounds: the dossier's figures are 5.8 against 7.2."""
    rounds, d = 64, 4000
    names = [f"c{i}" for i in range(rounds)]
    layer = DPFTRL(epsilon=4.0, delta=1e-6, clip_norm=1.0).bind(facts(names, rounds))
    state, at, total, errors = layer.init(), {"t": 0, "last": {}, "live": []}, torch.zeros(d), []
    for t in range(1, rounds + 1):
        at["t"] = t
        total = total + layer._noise_of({"x": torch.zeros(d)}, "p", at, t, state)["x"]
        errors.append(float(total.pow(2).mean()))
    from fedllm.privacy.accountant import noise_for

    # a client takes part once here, and an independent release of it in each round would cost the same once
    independent = noise_for(4.0, 1e-6, 1) * np.sqrt(np.mean(np.arange(1, rounds + 1)))
    assert np.sqrt(np.mean(errors)) < 0.9 * independent


def test_the_budget_sets_the_noise_is_foreseen_and_stops_the_run(people, loop):
    clients = people(8, size=6)
    told = facts(clients, 8)
    layer = DPFTRL(epsilon=3.0, delta=1e-4, restart_every=4).bind(told)
    seen = layer.foresee(told)
    assert 2.9 < seen["epsilon"] <= 3.0 and seen["rounds_that_fit"] == 8
    states = [layer.init()]
    go(layer, clients, loop, 8, states)
    assert layer.statement(states[0])["epsilon"] == pytest.approx(seen["epsilon"])
    with pytest.raises(BudgetSpent, match="the budget is 3"):
        go(layer, clients, loop, 1, states)


def test_a_round_that_is_done_again_releases_the_same_numbers(people, loop):
    """As after a crash: the state of the checkpoint, the same answers, the same noise. Other answers, other noise."""
    import copy

    clients = people(6)
    layer = DPFTRL(noise_multiplier=1.0).bind(facts(clients, 6))
    states = [layer.init()]
    go(layer, clients, loop, 3, states)
    kept = copy.deepcopy(states)
    (first,), _, one = go(layer, clients, loop, 1, states)
    kept_again = copy.deepcopy(kept)
    (again,), _, two = go(layer, clients, loop, 1, kept)
    assert first.equal(again) and digest(one) == digest(two)
    for c in clients.values():
        c.x = c.x + 1e-3
    (other,), _, _ = go(layer, clients, loop, 1, kept_again)
    assert float((other - first).norm()) > 0.05


def test_a_failed_round_leaves_sound_noise(people, loop):
    """Nothing of a failed round gets out; who was asked in it has taken part all the same."""
    clients = people(8)
    layer, states = DPFTRL(noise_multiplier=1.0).bind(facts(clients, 4)), None
    states = [layer.init()]
    go(layer, clients, loop, 1, states)
    with pytest.raises(QuorumError):
        drive(Ship().round(clients), loop((Ship(), layer), clients, {"": tuple(clients)}), [layer], states)
    assert len(states[0]["phases"]["Ship.local"]["last"]) == 4
    _, used, _ = go(layer, clients, loop, 2, states)
    assert len({c for who in used for c in who}) == 4
    with pytest.raises(QuorumError, match="took part less than"):
        go(layer, dict(list(clients.items())[:2]), loop, 1, [
            {**states[0], "phases": {"Ship.local": {"t": 2, "last": dict.fromkeys(clients, 1), "live": []}}}])


@pytest.mark.parametrize("knobs, says", [
    ({"noise_multiplier": 1.0, "clip_norm": 0.0}, "clip_norm = 0.0"), ({"epsilon": 0.0}, "epsilon = 0.0"),
    ({}, "both missing"), ({"noise_multiplier": 1.0, "min_separation": 2}, "min_separation = 2"),
    ({"noise_multiplier": 1.0, "mechanism": "blt"}, "mechanism = 'blt'")])
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(RecipeError, match=says):
        DPFTRL(**knobs)


def test_too_few_clients_for_the_rounds_and_bad_methods_are_refused():
    with pytest.raises(RecipeError, match=r"each of 10 clients takes part once in 50 rounds.*lower restart_every or"):
        DPFTRL(noise_multiplier=1.0).bind(facts([f"c{i}" for i in range(10)], 50))
    with pytest.raises(RecipeError, match=r"cohort = 4 is not allowed.*leaves 3 for a round; lower min_separation"):
        DPFTRL(noise_multiplier=1.0, mechanism="banded", min_separation=3, cohort=4).bind(
            facts([f"c{i}" for i in range(10)], 50))
    with pytest.raises(RecipeError, match=r"delta = 0.1 is not allowed with 10 units"):
        DPFTRL(noise_multiplier=1.0, delta=0.1).bind(facts([f"c{i}" for i in range(10)], 3))
    with pytest.raises(CompositionError, match=r"dp_ftrl.*every single reply"):
        DPFTRL(noise_multiplier=1.0).check(Ship(), {"local": None})


def test_a_real_method_trains_under_it(tiny):
    """Quiet noise, all five clients in turn: the model moves as the clipped changes say, at any engine."""
    states = {}
    for engine in ("vectorized", "in_process"):
        layer = DPFTRL(noise_multiplier=1e-3, clip_norm=1.0, seed=1)
        runner, m, state, world = tiny("fedavg", [layer], k=5, engine=engine, loopback=True)
        layer = layer.bind(Facts({c.id: c.n for c in world.infos()}, 5, 5))
        kept = [layer.init()]
        for r in range(3):
            runner.begin(r)
            state = drive(m.round(state, world.infos()), runner, [layer], kept)
            runner.commit()
        states[engine] = state["theta"]
    for name, x in states["vectorized"].items():
        torch.testing.assert_close(x, states["in_process"][name], atol=5e-3, rtol=1e-3)
