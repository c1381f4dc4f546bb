"""OLIVIA: sums are exact, only sums of several steps leave, and nothing forbidden is called."""

import numpy as np
import pytest

import fedllm
from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods._bandit import Arms, chosen
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space
from tests.methods.conftest import llama, tokenizer

RECIPE = {"name": "olivia", "model": "embedded", "method": {"name": "olivia", "episodes": 2, "test_episodes": 3},
          "rounds": 2, "data": {"source": "env:desk", "environment": {"clients": 3, "max_steps": 4}}}


class Seen(Layer):
    def __init__(self):
        self.sent = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.sent += [reply] if fn.__name__ == "act" else []
        return reply


def trained(engine="vectorized", rounds=3, layers=(), scene="desk", **knobs):
    fed = environments(f"env:{scene}", EnvironmentSpec(clients=3, max_steps=5), 1)
    model = Model(llama(), tokenizer(), "generation", make_space("lora", rank=2), fast_kernels=False)
    world = World(model, fed, LocalSpec(), 1)
    m = make_method("olivia", **{"episodes": 3, "dim": 6, "least": 1, **knobs})
    driver, state, states = ENGINES[engine]((m, *layers), world), m.init(model), [x.init() for x in layers]
    for t in range(rounds):
        driver.begin(t)
        state = drive(m.round(state, world.infos()), driver, layers, states)
        driver.commit()
    return state, driver, drive(m.evaluate(state, world.infos(), "local"), driver)


def test_engines_agree():
    one, other = trained("in_process"), trained("vectorized")
    assert all(float((one[0][k] - other[0][k]).abs().max()) < 1e-10 for k in ("a", "b", "mean", "deviation"))
    assert {c: dict(s) for c, s in one[2].items()} == {c: dict(s) for c, s in other[2].items()}
    assert float(one[0]["b"].abs().max()) > 0


def test_only_sums_leave_and_rare_actions_wait():
    layer = Seen()
    state, driver, _ = trained(layers=(layer,), least=3)
    assert {n for r in layer.sent for n, _ in leaves(r)} == {"da", "db", "count", "total"}
    for reply in layer.sent:
        for a in reply["da"]:  # the constant's own entry counts the steps
            assert float(a[-1, -1]) == 0 or float(a[-1, -1]) >= 3
    waits = sum(float(m["waits/n"].sum()) for m in driver.memory.values() if "waits/n" in m)
    steps = sum(float(a[-1, -1]) for a in state["a"])
    assert 0 < waits < steps and steps == round(steps)


def test_alone_nothing_is_shared():
    state, driver, scores = trained(share="nothing")
    assert "a" not in state and {"a", "b"} <= set(driver.memory["client-0"]) and scores["client-0"]["n"] == 20


def test_sums_survive_masks(tmp_path):
    plain = fedllm.run(RECIPE, root=tmp_path / "plain", layers=[])
    masked = fedllm.run(RECIPE, root=tmp_path / "masked", layers=["secagg"])
    assert plain.evaluation["global"] == pytest.approx(masked.evaluation["global"], abs=0.2)
    assert plain.evaluation["global"]["n"] >= 9 and "return" in plain.metrics
    assert fedllm.run(RECIPE, root=tmp_path / "again", engine="in_process").evaluation == plain.evaluation


def test_what_is_off_is_never_chosen():
    assert chosen(np.array([9.0, 1.0, 2.0]), [False, True, True]) == 2
    state, _, _ = trained(rounds=6, alpha=5.0)
    note = 6  # `note FILE TEXT` writes
    assert float(state["a"][note].abs().max()) == 0 and all(
        float(state["a"][i].abs().max()) > 0 for i in (0, 2, 4))


def test_rank_one_updates_and_hope():
    rng, arms = np.random.default_rng(0), Arms(np.stack([2 * np.eye(4)] * 2), np.zeros((2, 4)))
    for _ in range(30):
        arms.learn(0, rng.normal(0, 1, 4), 1.0)
    assert np.allclose(arms.inverse[0], np.linalg.inv(2 * np.eye(4) + arms.da[0]))
    x = rng.normal(0, 1, 4)
    assert arms.scores(x, 1.0)[1] == pytest.approx(np.sqrt(x @ x / 2)) and arms.scores(x, 0.0)[1] == 0.0


def test_where_it_does_not_fit(tmp_path):
    for change, says in (({"model": "policy", "space": "full"}, "allowed are .*fed_marl"),
                         ({"method": "fedavg"}, "allowed are .*olivia"), ({"data": {}}, "env:desk")):
        with pytest.raises(CompositionError, match=says):
            fedllm.run({**RECIPE, **change}, root=tmp_path)
    with pytest.raises(CompositionError, match="env:desk"):
        fedllm.run({**{k: v for k, v in RECIPE.items() if k != "data"}}, root=tmp_path)


def test_a_plan_foresees_its_bytes(tmp_path):
    plan, run = fedllm.plan(RECIPE), fedllm.run(RECIPE, root=tmp_path)
    assert plan.up == pytest.approx(run.bytes["up"], rel=0.1)
