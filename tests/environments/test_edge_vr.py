"""Edge servers for virtual reality: quality by hand, what differs between layouts, habits, and held-out places."""

import numpy as np
import pytest

import fedllm
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines.world import World
from fedllm.environments.edge_vr import BITS, CYCLES, LEVELS, MOST, EdgeVR, equal_share, proportional
from fedllm.environments.env import Bounded
from fedllm.environments.registry import make_scene
from fedllm.local.logs import gathered, habit
from fedllm.models.policy import make_policy
from fedllm.runs.acting import by_habit
from fedllm.spaces import make_space

RNG = np.random.default_rng


def test_quality_by_hand():
    server = EdgeVR(users=1, band=2.0, compute=5.0, penalty=3.0, spread=0.0, pull=0.4).env()
    server.reset(0)
    server.gain, server.look, server.wants = np.zeros(1), np.zeros(1), np.array([1])
    a, speed = 0.35, np.log2(1 + np.exp(4.0))
    for level in range(LEVELS):
        sharp = 2.0 ** (level - 4)
        load = sharp * (a + (1 - a) / 4)
        late = min(2.0, max(0.0, load * (CYCLES / 5 + BITS / (2 * speed)) / 0.02 - 1))
        good = (a * np.log(1 + 16 * sharp) + (1 - a) * np.log(1 + 4 * sharp)) / np.log(17)
        assert server.quality(0, level) == pytest.approx(good - 3 * late - 0.4 * abs(level - 1) / 4)
        assert server.quality(0, level) == pytest.approx(server.quality(1, level)) == server.quality(2, level)


def test_shares_do_what_they_say():
    """Two viewers, one with a bad channel: sent to as fast as the other he is less late, and the mean is better."""
    server = EdgeVR(users=2, band=3.0, compute=1e6, penalty=1.0, spread=0.0, pull=0.0).env()
    server.reset(0)
    server.look, server.gain = np.zeros(2), np.array([2.0, -2.0])
    even, attention, channel = (server.quality(share, 2) for share in range(3))
    assert even == pytest.approx(attention) and even < channel
    server.look = np.array([3.0, -3.0])
    assert server.quality(0, 2) != server.quality(1, 2)


def test_layouts_differ_and_the_same_one_does_not():
    own = [EdgeVR(layout=i).own() for i in range(30)]
    assert {users for users, *_ in own} == {2, 3, 4, 5, 6} and len(set(own)) == 30
    assert own[3] == EdgeVR(layout=3).own() and EdgeVR(layout=3, users=2).own() == (2, *own[3][1:])
    assert EdgeVR(spread=0.0, layout=1).own()[1:] == EdgeVR(spread=0.0, layout=2).own()[1:] == (12.0, 25.0, 1.0)
    assert (EdgeVR(layout=3).cues() != EdgeVR(layout=4).cues()).any() and EdgeVR().cues().dtype == np.float32


def test_what_is_seen_tells_nothing_of_what_a_server_has():
    rich, poor = (Bounded(EdgeVR(users=3, band=b, compute=b), 20, RNG(0)) for b in (1.0, 1000.0))
    assert (rich.reset(4) == poor.reset(4)).all()
    (a, paid, _), (b, other, _) = rich.step(4), poor.step(4)
    assert (a == b).all() and paid < other and (a.reshape(3, MOST)[:, 3:] == 0).all()


def test_habits():
    seen = np.zeros((3, MOST), np.float32)
    seen[:, :2] = [[0, 0], [0.3, 0.4], [0.25, 0.75]]
    assert equal_share(seen.reshape(-1)) == 2 and proportional(seen.reshape(-1)) == LEVELS + 2
    scene = make_scene("edge_vr", {})
    assert {habit(scene, "random")(seen, RNG(i)) for i in range(200)} == set(range(scene.actions))
    with pytest.raises(RecipeError, match="allowed are random, equal_share, proportional"):
        habit(scene, "greedy")
    logs = gathered(Bounded(scene, 50, RNG(0)), 40, RNG(1), 0.0)
    mixed = [e for e in logs if len(set(e.actions.tolist())) > 1]  # a habit's wish stays all through an episode
    assert len(logs) == 40 and 3 < len(mixed) < 20 and all(len(e.actions) == scene.slots and not e.cut for e in logs)


def test_environments_that_no_client_has():
    plain = environments("env:edge_vr", EnvironmentSpec(clients=3), 2)
    held = environments("env:edge_vr", EnvironmentSpec(clients=3, held_out=2), 2)
    mine = [s.train[0] for s in held.clients.values()]
    assert mine == plain.test == [s.train[0] for s in plain.clients.values()]  # what clients have stays as it is
    assert len(held.test) == 2 and not {r["layout"] for r in held.test} & {r["layout"] for r in mine}


RECIPE = {"name": "vr", "model": "policy", "space": "full", "method": {"name": "fed_marl", "test_episodes": 3},
          "rounds": 1, "local": {"optimizer": "sgd", "lr": 1.0},
          "data": {"source": "env:edge_vr", "environment": {"clients": 2, "slots": 4, "held_out": 1}}}


def test_habits_are_tested_on_the_episodes_of_policies():
    fed = environments("env:edge_vr", EnvironmentSpec(clients=2, slots=4, held_out=1), 0)
    beside = by_habit("equal_share", World(make_policy(18, 15, (), make_space("full")), fed), 3)
    total = 0.0
    for seed in np.random.default_rng(0).integers(2**31, size=3).tolist():
        env = Bounded(make_scene("edge_vr", {"slots": 4, "layout": fed.test[0]["layout"]}), 100, RNG(0))
        seen, over = env.reset(seed), False
        while not over:
            seen, reward, over = env.step(equal_share(seen))
            total += reward
    assert beside["global"] == {"n": 3, "return": pytest.approx(total / 3), "cut": 0.0}
    assert set(beside["clients"]) == {"client-0", "client-1"}


@pytest.mark.parametrize("change, kind, says", [
    ({"evaluate.baselines": ["persistence"]}, CompositionError, "allowed are random, equal_share, proportional"),
    ({"data.environment.held_out": -1}, RecipeError, "held_out"),
    ({"data.environment.users": 7}, RecipeError, "users = 7"),
    ({"data.environment.band": 0.0}, RecipeError, r"band = 0\.0"),
])
def test_what_does_not_go_is_refused(tmp_path, change, kind, says):
    with pytest.raises(kind, match=says):
        fedllm.run(RECIPE, root=tmp_path, **change)


def test_a_habit_is_its_environments_own(tmp_path):
    with pytest.raises(CompositionError, match=r"\['equal_share'\] learn .* allowed are random \("):
        fedllm.run({**RECIPE, "data": {"source": "env:bandit"}, "evaluate": {"baselines": ["equal_share"]}},
                   root=tmp_path)
