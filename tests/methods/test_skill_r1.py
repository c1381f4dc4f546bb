"""Skill-R1: advantages by hand, the identity of one skill a generation, and writers that learn from tries alone."""

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError
from fedllm.environments.playbook import CHOICES, Playbook
from fedllm.methods.agents import skill_r1 as module
from fedllm.methods.registry import make_method

RECIPE = {"name": "skills", "model": "policy", "space": "full", "method": {"name": "skill_r1", "skills": 4},
          "rounds": 2, "local": {"optimizer": "sgd", "lr": 5.0},
          "data": {"source": "env:playbook", "environment": {"clients": 2, "max_steps": 12}}}


def test_advantages():
    r = np.zeros((2, 6))
    r[:, 2], r[:, 5] = (1.0, 0.0), (0.5, 1.0)
    a = make_method("skill_r1", inter=0.5, gamma=0.5).advantages(r)
    assert a[0].tolist() == [0.5] * 3 + [0.5 * (-0.25 + 0.5 * 0.25)] * 3
    assert a[1].tolist() == [-0.5] * 3 + [0.5 * (0.25 + 0.5 * 0.25)] * 3
    assert module.CHOICES == CHOICES


def test_one_skill_a_generation_teaches_nothing_within_groups(tmp_path):
    still = fedllm.run(RECIPE, root=tmp_path, method={"name": "skill_r1", "skills": 1, "inter": 0.0})
    moved = fedllm.run(RECIPE, root=tmp_path / "b", method={"name": "skill_r1", "skills": 1, "inter": 0.5})
    norm = lambda run: max(float(t.abs().max()) for t in weights(run).values())  # noqa: E731
    assert abs(norm(still) - start()) < 1e-7 < abs(norm(moved) - start())


def start():
    from fedllm.models.policy import make_policy
    from fedllm.spaces import make_space

    scene = Playbook()
    theta = make_policy(scene.size, scene.actions, (), make_space("full"), seed=0).initial()
    return max(float(t.abs().max()) for t in theta.values())


def weights(run):
    from safetensors.torch import load_file

    return load_file(run.folder / "model" / "policy.safetensors")


def test_the_executor_pays_right_steps_and_the_next_skill_sees_it():
    env = Playbook(tries=200, base=0.1, kind=2).env()
    env.reset(0)
    for step in Playbook.best(2)[:2]:
        env.step(step)
    seen, paid, over = env.step(Playbook.best(2)[2])
    assert paid == 1.0 and not over and seen[-1] == 1.0 and seen[2] == 1
    wrong = [(b + 1) % 5 for b in Playbook.best(2)]
    assert [env.step(a)[1] for a in wrong][2] == pytest.approx(0.1, abs=0.08)
    assert Playbook(layout=5, kinds=2).own() == [1, 2] and Playbook(kind=3).own() == [3]


def test_engines_agree_and_alone_nothing_leaves(tmp_path):
    one = fedllm.run(RECIPE, root=tmp_path / "a")
    other = fedllm.run(RECIPE, root=tmp_path / "b", engine="in_process")
    assert one.evaluation == other.evaluation
    assert all(torch.equal(a, b) or float((a - b).abs().max()) < 1e-5
               for a, b in zip(weights(one).values(), weights(other).values(), strict=True))
    alone = fedllm.run(RECIPE, root=tmp_path / "c", method={"name": "skill_r1", "share": "nothing"})
    assert alone.bytes["up"] < one.bytes["up"]


def test_other_environments_are_refused(tmp_path):
    with pytest.raises(CompositionError, match="'env:playbook' works"):
        fedllm.run({**RECIPE, "data": {"source": "env:gridworld"}}, root=tmp_path)
    with pytest.raises(CompositionError, match="cuts skills off"):
        fedllm.run(RECIPE, root=tmp_path, **{"data.environment.max_steps": 8})
