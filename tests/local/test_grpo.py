"""GRPO: the loss by hand, what the clip holds back, the distance to a reference, and groups without a difference."""

import numpy as np
import pytest
import torch

from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall
from fedllm.local.objectives.grpo import GRPO, TokenLogs
from fedllm.methods._groups import advantages
from tests.methods.conftest import begin


def asked(run, fn):
    """`fn(client)` of the first client of a run."""
    w = run.world
    return fn(ClientCall(w.infos()[0], w, {}, 0, "M.f", 1, lambda r: carry_out([r], w.limits)[0]))


def sides(client, theta, rows, a):
    old = client.measure(theta, rows, TokenLogs(9))
    return {"advantage": a, "old": list(old), "ref": list(old)}


def test_a_step_is_the_policy_gradient_of_token_means():
    run = begin("fed_grpo", space="full", local={"optimizer": "sgd", "lr": 0.3, "batch_size": 8})

    def step(client):
        theta, rows, a = client.model.initial(), client.tokens[:3], [1.5, -0.5, 0.0]
        logs = client.measure(theta, rows, TokenLogs(9))
        assert logs.shape == (3, 9) and [int((r < 0).sum()) for r in logs] == [r.n_target for r in rows]
        got = client.fit(theta, on=rows, objective=GRPO(0.2), side=sides(client, theta, rows, a))
        # at rho = 1 the slope is mean_i A_i mean_t grad log pi: that of row losses weighed by A / |y|
        eps = 1e-6
        down = {n: (t - u) / 0.3 for (n, t), u in zip(theta.items(), got.theta.values(), strict=True)}
        moved = {n: t - eps * down[n] for n, t in theta.items()}
        before = client.probe([theta, moved], on=rows)
        slope = sum(ai * (after - b) / r.n_target for ai, b, after, r in zip(
            a, before[0].total, before[1].total, rows, strict=True)) / 3 / -eps
        want = sum(float(d.pow(2).sum()) for d in down.values())
        assert slope == pytest.approx(want, rel=1e-3)

    asked(run, step)


def test_the_clip_and_the_reference():
    run = begin("fed_grpo", space="full", local={"optimizer": "sgd", "lr": 0.3, "batch_size": 8})

    def step(client):
        theta, rows = client.model.initial(), client.tokens[:2]
        side = sides(client, theta, rows, [1.0, 1.0])
        far = {**side, "old": [o - 1.0 for o in side["old"]]}  # rho = e: beyond the clip, where A > 0 asks for no more
        still = client.fit(theta, on=rows, objective=GRPO(0.2), side=far).theta
        assert all(torch.equal(still[n], t) for n, t in theta.items())
        low = {**far, "advantage": [-1.0, -1.0]}  # and where A < 0 it is taken back all the same
        back = client.fit(theta, on=rows, objective=GRPO(0.2), side=low).theta
        assert max(float((back[n] - t).abs().max()) for n, t in theta.items()) > 1e-4
        held = {**side, "advantage": [0.0, 0.0]}
        drawn = client.fit(theta, on=rows, objective=GRPO(0.2, beta=1.0), side=held).theta
        assert max(float((drawn[n] - t).abs().max()) for n, t in theta.items()) < 1e-12  # it is the reference itself

    asked(run, step)


def test_groups():
    r = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7]])
    a = advantages(r)
    assert np.allclose(a[0], [1, -1, -1, 1], atol=1e-3) and (a[1:] == 0).all()
    assert np.allclose(advantages(r, scale=False)[0], [0.5, -0.5, -0.5, 0.5])
