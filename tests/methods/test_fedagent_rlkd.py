"""FedAgent: without its parts it is FedAvg, what it weighs by are told facts, and its agent learns whose steps harm."""

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError
from fedllm.methods import _weighing as by
from fedllm.methods._qmix import made, taught, values
from fedllm.methods.registry import make_method
from tests.methods.conftest import begin

TASK = {"task": "classification"}


def test_without_its_parts_it_is_fedavg(gap):
    off = begin("fedagent_rlkd", agent="off", kd_lambda=0.0, **TASK).go(3)
    assert gap(off.state["theta"], begin("fedavg", **TASK).go(3).state["theta"]) < 1e-12
    assert make_method("fedagent_rlkd", agent="off").public_at() == ()
    early = begin("fedagent_rlkd", kd_lambda=0.0, warmup=3, tries=2, **TASK).go(3)  # the agent looks on
    assert gap(off.state["theta"], early.state["theta"]) < 1e-12 and len(early.state["past"]) == 3


def test_distillation_is_the_loss_that_the_card_says():
    run = begin("fedagent_rlkd", **TASK)
    model, rows = run.world.model, run.world.encoded("c0", "train")
    from fedllm.models.batch import collate

    batch, theta = collate([rows], model.pad, "cpu"), model.initial()
    t = torch.randn(len(rows), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.using([theta]):
        model.stack.rows = len(rows)
        got, count = by.Near(0.5, 2.0).losses(model, batch, {"teacher": t})
        z, y = model.class_logits(batch), batch.labels
    kl = (torch.softmax(t / 2, -1) * (torch.log_softmax(t / 2, -1) - torch.log_softmax(z / 2, -1))).sum(-1)
    assert torch.allclose(got, torch.nn.functional.cross_entropy(z, y, reduction="none") + 0.5 * 4 * kl, atol=1e-10)
    assert count.tolist() == [1] * len(rows)


def test_levels_are_weights():
    share = np.array([0.5, 0.25, 0.25])
    assert np.allclose(by.weights(share, [1, 1, 1], 3, 3.0, False), share)
    got = by.weights(share, [0, 1, 2], 3, 3.0, False)
    assert np.allclose(got, share * np.exp([-3, 0, 3]) / (share * np.exp([-3, 0, 3])).sum())
    assert np.allclose(by.weights(share, [1, 0, 1], 2, 3.0, True), [2 / 3, 0, 1 / 3])
    assert np.allclose(by.weights(share, [0, 0, 0], 2, 3.0, True), share)  # nobody would count
    assert by.bandit_weights(share, [0.2, 0.0, -0.2], 2.0).argmax() == 0


def test_a_state_is_bounded_whatever_comes():
    d = [{"w": torch.tensor([1e200, 1.0], dtype=torch.float64)}, {"w": torch.zeros(2, dtype=torch.float64)}]
    s = by.features([float("nan"), 1.0], [1e308, -1e308], np.array([0.5, 0.5]), d, [0, 10**6])
    assert s.shape == (2, by.FEATURES) and torch.isfinite(s).all() and float(s.abs().max()) <= 5


def test_the_agent_learns_whose_steps_harm():
    """A client's first feature says what its step is worth; weights that follow it are paid."""
    net, rng = made(0, by.FEATURES, 3), np.random.default_rng(0)
    past = {}
    for r in range(12):
        s = torch.zeros(5, by.FEATURES, dtype=torch.float64)
        s[:, 0] = torch.from_numpy(rng.choice([-1.0, 1.0], 5))
        a = by.tried(torch.ones(5, dtype=torch.int64), 3, 8, rng)
        past[str(r)] = {"s": s, "a": torch.stack(a), "after": s,
                        "r": [float((by.scores(x, 3, 1.0) * s[:, 0]).mean()) for x in a]}
    net = taught(net, by.remembered(past), 0.0, 3e-2, passes=60)
    s = torch.zeros(2, by.FEATURES, dtype=torch.float64)
    s[:, 0] = torch.tensor([-1.0, 1.0])
    assert values(net, s).argmax(1).tolist() == [0, 2]


def test_decisions_follow_from_state_and_seed():
    one, two = (begin("fedagent_rlkd", warmup=1, tries=3, **TASK).go(3) for _ in range(2))
    assert one.state["p"] == two.state["p"] and one.method.report(one.state)["probe"] == two.state["probe"]
    assert one.state["p"] != begin("fedagent_rlkd", warmup=1, tries=3, agent_seed=1, explore=0.9,
                                   **TASK).go(3).state["p"]
    assert sum(one.state["p"].values()) == pytest.approx(1)


@pytest.mark.parametrize("knobs", [{"action": "subset"}, {"agent": "bandit"}, {"reward": "target", "kd_lambda": 0.0}])
def test_its_other_ways_run(knobs):
    run = begin("fedagent_rlkd", warmup=0, tries=2, **TASK, **knobs).go(2)
    assert sum(run.state["p"].values()) == pytest.approx(1) and len(run.state["probe"]) == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(CompositionError, match=r"'fedagent_rlkd' and data\.task = 'generation' do not fit together"):
        begin("fedagent_rlkd")
    assert make_method("fedagent_rlkd").public_at() == ("server",)
