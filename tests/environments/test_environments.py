"""Environments: what they answer, how they end, that engines agree on acting and learning, and what is refused."""

import json

import numpy as np
import pytest
import torch

import fedllm
from fedllm.cli import main as cli
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RecipeError, RunError
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines import ENGINES
from fedllm.engines.client import ClientCall
from fedllm.engines.world import World
from fedllm.environments.env import Bounded, Scene
from fedllm.environments.registry import bounded, dealt, make_scene, scenes
from fedllm.local.flops import steps_of, work_of
from fedllm.local.policy import Improve, Rollout, run_improves, run_rollouts
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.policy import make_policy
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space

RNG = np.random.default_rng
RECIPE = {"name": "grid", "model": "policy", "space": "full", "method": "fed_marl", "rounds": 2,
          "local": {"optimizer": "sgd", "lr": 5.0},
          "data": {"source": "env:gridworld", "environment": {"clients": 3, "side": 3, "walls": 1, "max_steps": 12,
                                                              "slip": [0.0, 0.2]}}}


def test_the_room_finds_its_environments():
    assert {"gridworld", "bandit"} <= set(scenes())
    for name, kind in scenes().items():
        scene = kind()
        env = Bounded(scene, 10, RNG(0))
        seen, over = env.reset(5), False
        assert seen.shape == (scene.size,) and seen.dtype == np.float32
        while not over:
            seen, reward, over = env.step(env.steps % scene.actions)
            assert np.isfinite(reward), name
        assert env.steps <= 10
        with pytest.raises(RunError, match="reset first"):
            env.step(0)


def test_a_grid_leaves_a_way_home_and_pays_there():
    for layout in range(20):
        scene = make_scene("gridworld", {"side": 4, "walls": 5, "layout": layout})
        assert len(scene.blocked()) == 5 and scene.blocked() == make_scene(
            "gridworld", {"side": 4, "walls": 5, "layout": layout}).blocked()
    env = Bounded(make_scene("gridworld", {"side": 2, "walls": 0, "cost": 0.1}), 9, RNG(0))
    env.reset(0)
    assert env.step(1)[1:] == (-0.1, False)  # against the edge
    assert env.step(0)[1:] == (-0.1, False) and env.step(2)[1:] == (0.9, True) and not env.cut


def test_the_seed_is_all_the_chance_there_is():
    def walk(seed):
        env = Bounded(make_scene("gridworld", {"slip": 0.5}), 30, RNG(1))
        env.reset(seed)
        return [env.step(0)[0].argmax() for _ in range(12)]

    assert walk(3) == walk(3) != walk(4)


def test_a_bandits_layouts_share_their_winners_but_for_the_share_that_is_own():
    win = lambda **k: make_scene("bandit", {"contexts": 400, **k}).winners()  # noqa: E731
    assert (win(layout=1) == win(layout=2)).all()
    assert 0.22 < (win(layout=1, own=0.7) == win(layout=2, own=0.7)).mean() < 0.42  # 0.3^2 + (1 - 0.3^2) / 4 = 0.32
    assert (win(layout=1, own=1.0) == win(layout=2, own=1.0)).mean() < 0.4


class Endless(Scene):
    size, actions = 1, 2
    reward, wide = 0.0, 1

    def env(self):
        return self

    def reset(self, seed):
        return np.zeros(self.wide)

    def step(self, action):
        return np.zeros(self.wide), self.reward, False


def test_what_never_ends_is_cut_off_and_says_so():
    env = Bounded(Endless(), 7, RNG(0))
    env.reset()
    assert [env.step(0)[2] for _ in range(7)] == [False] * 6 + [True] and env.cut and env.steps == 7


def test_an_environment_that_breaks_its_word_is_named():
    env = Bounded(Endless(), 7, RNG(0))
    env.reset()
    with pytest.raises(RunError, match="action 2 is none of 0 to 1"):
        env.step(2)
    broken = Endless()
    broken.__dict__.update(reward=float("nan"))
    env = Bounded(broken, 7, RNG(0))
    env.reset()
    with pytest.raises(RunError, match="reward of step 0 is nan"):
        env.step(0)
    broken.__dict__.update(wide=2)
    with pytest.raises(RunError, match="shape"):
        env.reset()


def test_parameters_are_dealt_to_clients():
    rows = dealt("gridworld", {"slip": [0.0, 0.3], "side": 4}, 3, 50, seed=2)
    assert [r["slip"] for r in rows] == [0.0, 0.3, 0.0] and len({r["layout"] for r in rows}) == 3
    assert all(r["side"] == 4 and r["max_steps"] == 50 for r in rows)
    for knobs, says in (({"side": [3, 4]}, "share one policy"), ({"slip": []}, "a list of them"),
                        ({"sides": 3}, "did you mean 'side'"), ({"slip": 2}, "slip")):
        with pytest.raises(RecipeError, match=says):
            dealt("gridworld", knobs, 2, 10, 0)
    with pytest.raises(RecipeError, match="did you mean 'gridworld'"):
        make_scene("gridwold", {})


def world(dtype="float64", hidden=(8,), lr=1.0, clients=3, **environment):
    told = {"clients": clients, "max_steps": 9, "side": 3, "walls": 1, "slip": [0.0, 0.2], **environment}
    fed = environments("env:gridworld", EnvironmentSpec(**told), 1)
    model = make_policy(9, 4, hidden, make_space("full"), seed=1, dtype=dtype)
    return World(model, fed, LocalSpec(optimizer="sgd", lr=lr), 1)


def trained(engine, dtype="float64", layers=(), rounds=3, loopback=False, **knobs):
    w = world(dtype)
    m = make_method("fed_marl", **{"episodes": 3, "updates": 2, **knobs})
    driver, state, states = ENGINES[engine]((m, *layers), w, loopback=loopback), m.init(w.model), [
        x.init() for x in layers]
    for t in range(rounds):
        driver.begin(t)
        state = drive(m.round(state, w.infos()), driver, layers, states)
        driver.commit()
    scores = drive(m.evaluate(state, w.infos(), "local"), driver)
    return state, {c: dict(s) for c, s in scores.items()}, driver


def apart(a, b):
    return max(float((a["theta"][n].double() - b["theta"][n].double()).abs().max()) for n in a["theta"])


@pytest.mark.parametrize("dtype, most", [("float64", 1e-10), ("float32", 1e-5)])
def test_engines_agree(dtype, most):
    (one, s1, _), (other, s2, d) = trained("in_process", dtype), trained("vectorized", dtype, loopback=True)
    assert apart(one, other) <= most and s1 == s2 and float(other["theta"]["2.weight"].abs().max()) > 1e-3
    assert d.record.totals()["by_phase"]["FedMARL.local"]["up"] > 0


def test_lanes_of_unequal_length_do_not_touch_each_other():
    w = world()
    rng, theta = RNG(0), w.model.initial()
    asks = [Improve(str(n), w.model, theta, None, rng.random((n, 9)).astype(np.float32), rng.integers(4, size=n),
                    rng.standard_normal(n), w.local, 2) for n in (3, 11, 1)]
    together, alone = run_improves(asks, Limits()), [run_improves([a], Limits())[0] for a in asks]
    for a, b in zip(together, alone, strict=True):
        assert max(float((a.theta[n] - b.theta[n]).abs().max()) for n in theta) < 1e-12
        assert (a.steps, a.examples) == (b.steps, b.examples)
    envs = [[bounded(r, RNG(0)) for r in w.federation.test[:k]] for k in (1, 3)]
    rolls = [Rollout(str(k), w.model, theta, None, e, list(range(len(e)))) for k, e in enumerate(envs)]
    got = run_rollouts(rolls, Limits())
    again = [run_rollouts([r], Limits())[0] for r in rolls]
    for a, b in zip([e for r in got for e in r], [e for r in again for e in r], strict=True):
        assert (a.actions == b.actions).all() and (a.rewards == b.rewards).all() and a.cut == b.cut


def test_one_step_is_the_policy_gradient():
    w = world(hidden=(), lr=0.5)
    theta = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for n, t in w.model.initial().items()}
    seen, acts, weights = np.eye(9, dtype=np.float32)[[0, 4]], np.array([1, 3]), np.array([2.0, -1.0])
    got = run_improves([Improve("c", w.model, theta, None, seen, acts, weights, w.local)], Limits())[0].theta
    p = (torch.from_numpy(seen) @ theta["0.weight"].T + theta["0.bias"]).softmax(-1)
    step = torch.from_numpy(weights)[:, None] * (torch.eye(4)[acts] - p)  # w (1[a] - pi), of each row
    assert torch.allclose(got["0.bias"], theta["0.bias"] + 0.5 * step.mean(0).float(), atol=1e-6)


def test_steps_are_metered():
    w = world()
    envs = [bounded(r, RNG(0)) for r in w.federation.test]
    roll = Rollout("c", w.model, w.model.initial(), None, envs, [0, 1, 2])
    assert roll.most == 27 and steps_of(roll, 8) == pytest.approx(27 / 8 / 3)
    learn = Improve("c", w.model, roll.theta, None, np.zeros((16, 9), np.float32), np.zeros(16, int), np.ones(16),
                    w.local, 2)
    assert steps_of(learn, 8) == 4 and work_of(roll).tokens == 27 and work_of(learn).flops > work_of(roll).flops


def test_what_stays_at_the_client():
    shared, alone = trained("vectorized")[2], trained("vectorized", share="nothing")[2]
    assert set(shared.memory["client-0"]) == {"critic"}
    assert set(alone.memory["client-0"]) == {"critic", "theta"} and alone.record.totals()["up"] < shared.record.totals(
        )["up"]


def test_no_payload_tells_what_was_seen_or_done():
    class Seen(fedllm.Layer):
        sent: list = []  # noqa: RUF012

        def client(self, fn, msg, client, call):
            reply = call(msg)
            self.sent += [reply] if fn.__name__ == "local" else []
            return reply

    layer = Seen()
    trained("vectorized", layers=(layer,), rounds=1)
    names = {n.split("/")[0] for r in layer.sent for n, _ in leaves(r)}
    assert names == {"delta", "n", "mean_return"}


def test_dp_sgd_refuses_what_it_cannot_see():
    with pytest.raises(CompositionError, match="dp_sgd"):
        trained("vectorized", layers=(make_layer("dp_sgd", {"noise_multiplier": 1.0}, "layers.0"),), rounds=1)


def test_client_env_is_the_clients_own():
    w = world()
    info = w.infos()[1]
    env = ClientCall(info, w, {}, 0, "M.f", 1, lambda r: None).env(RNG(0))
    assert env.scene.slip == 0.2 and env.max_steps == 9 and env.reset().argmax() == 0


def test_a_run(tmp_path, capsys, monkeypatch):
    plan, run = fedllm.plan(RECIPE), fedllm.run(RECIPE, root=tmp_path)
    assert (plan.down, plan.evaluation["down"]) == (run.bytes["down"], run.bytes["evaluation"]["down"])
    assert plan.up == pytest.approx(run.bytes["up"], rel=0.1)  # a mean return is written with few digits or many
    e = run.evaluation
    assert {"return", "cut", "n"} == set(e["global"]) and len(e["clients"]) == 3 and run.metrics["cut"] == "min"
    assert (run.folder / "model" / "policy.safetensors").is_file()
    assert "return (higher is better)" in (run.folder / "model_card.md").read_text()
    assert fedllm.run(RECIPE, root=tmp_path, engine="in_process").evaluation == e
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps({**RECIPE, "method": {"name": "fed_marl", "share": "nothing"}}))
    monkeypatch.chdir(tmp_path)
    cli.app(["run", str(file)], standalone_mode=False)
    assert "return" in capsys.readouterr().out
    assert SERVER not in e["clients"]


@pytest.mark.parametrize("change, kind, says", [
    ({"method": "fedavg"}, CompositionError, "allowed are .*fed_marl"),
    ({"model": "embedded"}, RecipeError, "do not fit together"),
    ({"data.source": "env:gird"}, RecipeError, "unknown"),
    ({"data.environment.max_steps": 0}, RecipeError, "max_steps"),
    ({"data.environment.slip": 1.5}, RecipeError, r"slip = 1\.5"),
    ({"data.limit": 3}, RecipeError, "data.limit.*data.environment"),
    ({"data.environment.side": [3, 4]}, RecipeError, "share one policy"),
    ({"evaluate.baselines": ["local_only"]}, CompositionError, "learn from rows"),
    ({"space": "lora"}, RecipeError, "space.rank = 8"),
    ({"model": {"name": "policy", "hidden": [0]}}, RecipeError, "hidden"),
])
def test_bad_recipes_are_refused_before_any_work(tmp_path, change, kind, says):
    with pytest.raises(kind, match=says):
        fedllm.run(RECIPE, root=tmp_path, **change)
    assert not list(tmp_path.glob("*/events.jsonl"))


def test_rows_are_not_acted_in(recipe, tmp_path):
    with pytest.raises(CompositionError, match="acts in environments"):
        fedllm.run(recipe, root=tmp_path, method="fed_marl")
