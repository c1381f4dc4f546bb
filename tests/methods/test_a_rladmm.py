"""A-RLADMM: the server hears a sum, duals add up to nothing, and what is kept and sent is no trace of an episode."""

import pytest
import torch

import fedllm
from evidence.rigs.tool_worlds import consensus
from fedllm.core.errors import FedLLMError
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves, tensor_bytes
from fedllm.core.program import drive
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.policy import make_policy
from fedllm.spaces import make_space

RECIPE = {"name": "air", "model": "policy", "space": "full", "method": {"name": "a_rladmm", "episodes": 2},
          "rounds": 2, "local": {"optimizer": "sgd", "lr": 5.0},
          "data": {"source": "env:gridworld", "environment": {"clients": 3, "side": 3, "walls": 1, "max_steps": 8}}}


class Seen(Layer):
    def __init__(self):
        self.sent = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.sent += [reply] if fn.__name__ == "local" else []
        return reply


def trained(engine="vectorized", rounds=4, layers=(), clients=3, **knobs):
    spec = EnvironmentSpec(**{"clients": clients, "max_steps": 9, "side": 3, "walls": 1})
    fed = environments("env:gridworld", spec, 1)
    world = World(make_policy(9, 4, (), make_space("full"), seed=1, dtype="float64"), fed,
                  LocalSpec(optimizer="sgd", lr=5.0), 1)
    m = make_method("a_rladmm", **{"episodes": 3, **knobs})
    driver, state, states = ENGINES[engine]((m, *layers), world), m.init(world.model), [x.init() for x in layers]
    for t in range(rounds):
        driver.begin(t)
        state = drive(m.round(state, world.infos()), driver, layers, states)
        driver.commit()
    return state, driver


def test_engines_agree(gap):
    one, other = trained("in_process", snr_db=10.0), trained("vectorized", snr_db=10.0)
    assert gap(one[0]["theta"], other[0]["theta"]) < 1e-10
    assert gap(one[1].memory["client-1"]["dual"], other[1].memory["client-1"]["dual"]) < 1e-10


def test_the_equations_end_at_the_consensus():
    for seed in range(3):
        got = consensus("a_rladmm", seed)
        assert got["distance"] < 1e-4 and got["duals"] < 1e-10


def test_duals_add_up_to_nothing_and_a_gain_of_1_is_digital(gap):
    state, driver = trained(fading=False)
    again = trained(fading=False, rounds=5)[1]  # duals are moved once Theta has arrived
    total = sum(m["dual"]["0.weight"] for m in again.memory.values())
    assert float(total.abs().max()) < 1e-9 < float(again.memory["client-0"]["dual"]["0.weight"].abs().max())
    mean = sum(m["theta"]["0.weight"] + m["dual"]["0.weight"] / 0.01 for m in driver.memory.values()) / 3
    assert float((state["theta"]["0.weight"] - mean).abs().max()) < 1e-9


def test_one_client_without_duals_is_plain_learning(gap):
    one, _ = trained(clients=1, fading=False, duals=False)
    faded, _ = trained(clients=1, fading=True, duals=False)
    assert gap(one["theta"], faded["theta"]) < 1e-9  # h (h theta) / h^2


def test_the_channel():
    few, many = trained(clients=2)[0], trained(clients=5)[0]
    assert few["channel_uses"] == many["channel_uses"] == 4 * 40
    noisy, clear = trained(snr_db=0.0)[0]["theta"], trained()[0]["theta"]
    assert float((noisy["0.weight"] - clear["0.weight"]).abs().max()) > 1e-3
    gains = {float(trained(rounds=r, coherence=2)[1].memory["client-0"]["fade"]) for r in (1, 2)}
    assert len(gains) == 1 and len(gains | {float(trained(rounds=3, coherence=2)[1].memory["client-0"]["fade"])}) == 2


def test_what_leaves(tmp_path):
    layer = Seen()
    _, driver = trained(layers=(layer,))
    assert {n.split("/")[0] for r in layer.sent for n, _ in leaves(r)} == {"y", "hh", "total"}
    assert tensor_bytes(layer.sent[0]) == 40 * 8 and set(driver.memory["client-0"]) == {
        "theta", "dual", "gain", "fade", "critic"}
    plain = fedllm.run(RECIPE, root=tmp_path / "a")
    masked = fedllm.run(RECIPE, root=tmp_path / "b", layers=["secagg"])
    assert plain.reports["ARLADMM"]["channel_uses"] == 80
    assert masked.evaluation["global"]["n"] == plain.evaluation["global"]["n"]
    assert torch.isfinite(torch.tensor(masked.evaluation["global"]["return"]))


@pytest.mark.parametrize("change, says", [
    ({"local": {"optimizer": "adamw"}}, "allowed is sgd"), ({"method": {"name": "a_rladmm", "rho": 0}}, "rho"),
    ({"method": {"name": "a_rladmm", "snr_db": 90}}, "snr_db")])
def test_what_it_cannot_follow_is_refused(change, says, tmp_path):
    with pytest.raises(FedLLMError, match=says):
        fedllm.run({**RECIPE, **change}, root=tmp_path)
