"""Moments that live on from fit to fit, and rates that hang on all local steps of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.payload import Kept, pack, sub
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import InRun, LocalSpec
from tests.local.test_objectives import model, plan, rows
from tests.methods.conftest import begin

KINDS = {"adamw": LocalSpec(lr=0.01, weight_decay=0.1, batch_size=3), "adam": LocalSpec(optimizer="adam", lr=0.01),
         "sgd": LocalSpec(optimizer="sgd", lr=0.05, momentum=0.9)}


def gap(a, b):
    return max(float(t.abs().max()) for t in sub(a, b).values())


@pytest.mark.parametrize("kind", KINDS)
def test_two_fits_that_hand_on_their_moments_are_one_long_fit(kind):
    m, own = model(rank=4), rows(0, 9)
    spec, whole = KINDS[kind], plan(9) * 2
    ask = Fit("c", m, m.initial(3), None, own, whole, spec, moments=None)
    once = run_fits([ask], Limits())[0]
    first = run_fits([replace(ask, plan=whole[:2])], Limits())[0]
    second = run_fits([replace(ask, plan=whole[2:], theta=first.theta, moments=first.moments)], Limits())[0]
    reset = run_fits([replace(ask, plan=whole[2:], theta=first.theta)], Limits())[0]
    assert gap(second.theta, once.theta) == 0 and gap(reset.theta, once.theta) > 1e-4
    assert gap(second.moments, once.moments) == 0 and int(second.moments["step"]) == 6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_lanes_with_other_counters_ranks_and_rows_equal_lanes_alone(kind, dtype, tolerance):
    """Steps behind them: 3, 3, 1 and none; the first two share a step, none is told another's bias correction."""
    m, asks = model(dtype=dtype, rank=4), []
    for k, (behind, count, rank) in enumerate(((3, 4, 4), (3, 9, 2), (1, 6, 3), (0, 7, 4))):
        own = rows(k, count)
        ask = Fit(f"c{k}", m, m.initial(rank), None, own, plan(count), KINDS[kind], moments=None)
        if behind:
            before = run_fits([replace(ask, plan=[plan(count)[0]] * behind)], Limits())[0]
            ask = replace(ask, theta=before.theta, moments=before.moments)
        asks.append(ask)
    assert len({a.group for a in asks}) == 3 and asks[0].group == asks[1].group
    groups = {g: [i for i, a in enumerate(asks) if a.group == g] for g in {a.group for a in asks}}
    for members in groups.values():
        for i, got in zip(members, run_fits([asks[i] for i in members], Limits()), strict=True):
            alone = run_fits([asks[i]], Limits())[0]
            loose = tolerance if kind == "sgd" or dtype is torch.float64 else 1e-3  # Adam divides by small numbers
            assert gap(got.theta, alone.theta) <= loose and gap(got.moments, alone.moments) <= loose
            assert int(got.moments["step"]) == int(alone.moments["step"])


def test_moments_are_told_only_where_they_are_asked_for():
    m, own = model(), rows(0, 3)
    ask = Fit("c", m, m.initial(), None, own, plan(3), KINDS["adamw"])
    assert run_fits([ask], Limits())[0].moments == {}
    assert run_fits([replace(ask, moments=None, plan=[])], Limits())[0].moments == {}
    kept = run_fits([replace(ask, moments=None)], Limits())[0].moments
    idle = run_fits([replace(ask, moments=kept, plan=[])], Limits())[0].moments  # a free rider takes no step
    assert gap(idle, kept) == 0 and int(idle["step"]) == 1
    assert {n.partition("/")[0] for n in kept} == {"exp_avg", "exp_avg_sq", "step"}


def test_moments_do_not_cross_the_wire_by_accident():
    m, own = model(), rows(0, 3)
    told = run_fits([Fit("c", m, m.initial(), None, own, plan(3), KINDS["adamw"], moments=None)], Limits())[0].moments
    assert isinstance(told, Kept)
    with pytest.raises(PayloadError, match="'adam' is an optimizer's state, which stays at its client"):
        pack(theta=m.initial(), adam=told)


def client_of(run, spec, rounds=None, round=0):
    run.world.local, run.world.rounds = spec, rounds
    return ClientCall(run.world.infos()[0], run.world, {}, round, "FedAvg.local", 1,
                      lambda r: carry_out([r], run.world.limits)[0])


def test_moments_of_something_else_are_refused():
    run = begin("fedavg", engine="in_process")
    theta = run.world.model.initial()
    adam = LocalSpec(steps=2, batch_size=3, max_length=32)
    kept = client_of(run, adam).fit(theta, moments=None).moments
    name = min(theta)
    cases = [(adam, {n: t for n, t in kept.items() if not n.endswith(name)}, "no entry"),
             (adam, {**kept, "exp_avg/other": torch.zeros(1)}, "nothing of that name"),
             (adam, {**kept, f"exp_avg/{name}": torch.zeros(1)}, r"has shape \(1,\)"),
             (adam, {n: t for n, t in kept.items() if n != "step"}, "no 'step'"),
             (replace(adam, optimizer="sgd", momentum=0.9), kept, "optimizer cannot change midway"),
             (replace(adam, optimizer="sgd"), kept, "keeps nothing")]
    for spec, moments, says in cases:
        with pytest.raises(CompositionError, match=says):
            client_of(run, spec).fit(theta, moments=moments)
    frozen = [n for n in theta if "lora_A" in n]  # what is frozen has no moments
    half = client_of(run, adam).fit(theta, moments=None, freeze=frozen).moments
    client_of(run, adam).fit(theta, moments=half, freeze=frozen)
    with pytest.raises(CompositionError, match="other trainables than theta"):
        client_of(run, adam).fit(theta, moments=half)


def test_the_rate_of_each_step_of_a_run():
    """Warm-up over 3 of 12 steps, then a cosine over the other 9; torch's own schedulers, one step later."""
    spec = LocalSpec(lr=0.5, steps=4, warmup=3, over_rounds="cosine_steps")
    got = [spec.at(t, 3, 10).rate(s, 4) for t in range(3) for s in range(4)]
    w = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([w], 0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 9)
    wanted = [0.5 / 3, 1.0 / 3, 0.5]
    for _ in range(9):
        wanted.append(sgd.param_groups[0]["lr"])
        sgd.step()
        cosine.step()
    assert got == pytest.approx(wanted)
    linear = replace(spec, warmup=0, over_rounds="linear_steps")
    assert [linear.at(t, 3, 10).rate(s, 4) for t in range(3) for s in range(4)] == pytest.approx(
        [0.5 * (1 - i / 12) for i in range(12)])
    within = replace(spec, warmup=3, over_rounds="linear", schedule="linear")  # what was there before, and a warm-up
    assert within.at(1, 3, 10).rate(2, 4) == pytest.approx(0.5 * (1 - 1 / 3) * (1 - 2 / 4))
    assert within.at(0, 3, 10).rate(1, 4) == pytest.approx(0.5 * (1 - 1 / 4) * 2 / 3)
    assert spec.at(9, 3, 10).rate(0, 4) == spec.at(2, 3, 10).rate(3, 4) > 0  # a test after the last round


def test_schedules_that_were_there_are_as_they_were():
    spec = LocalSpec(lr=0.5, over_rounds="cosine")
    assert spec.at(0, None) is spec and LocalSpec(lr=0.5).at(3, 9, 5) == LocalSpec(lr=0.5)
    assert type(spec.at(2, 4)) is LocalSpec and spec.at(2, 4).lr == pytest.approx(0.25)


def test_several_fits_of_a_round_go_on_along_the_schedule():
    run = begin("fedavg", engine="in_process")
    call = client_of(run, LocalSpec(lr=0.5, steps=4, batch_size=3, over_rounds="linear_steps", max_length=32), 3, 1)
    theta = run.world.model.initial()
    assert [call.fit(theta, steps=1).lr_sum for _ in range(3)] == pytest.approx([0.5 * (1 - i / 12) for i in (4, 5, 6)])
    assert isinstance(call.training, InRun) and call.training.begun == 7


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_clients_with_unequal_rows_stand_at_other_points_of_the_schedule(engine):
    one, other = (begin("diloco", engine=e, local={"optimizer": "adamw", "lr": 0.01, "warmup": 2, "over_rounds":
                                                   "cosine_steps"}) for e in (engine, "in_process"))
    one.world.rounds = other.world.rounds = 3
    assert gap(one.go(3).state["theta"], other.go(3).state["theta"]) < 1e-10


def test_a_plan_and_a_server_that_trains_know_the_schedule_too(recipe, tmp_path):
    given = {**recipe, "local": {"lr": 0.02, "steps": 3, "warmup": 7, "over_rounds": "linear_steps"}}
    assert fedllm.plan(given).rounds == 4
    result = fedllm.run({**given, "method": "centralized", "local": {**given["local"], "steps": None}}, root=tmp_path)
    assert result.rounds == 4


def test_a_schedule_without_an_end_and_a_warmup_that_never_ends_are_refused(recipe, tmp_path):
    spec = LocalSpec(steps=4, warmup=12)
    with pytest.raises(RecipeError, match=r"local.warmup = 12 is not allowed; it must be below the 12 steps of a "):
        spec.at(0, 3, 10)
    spec.at(0, 4, 10)
    for bad in (LocalSpec(warmup=2), LocalSpec(over_rounds="linear_steps")):
        with pytest.raises(RecipeError, match="this one has no set end; give rounds"):
            bad.at(0, None, 10)
    with pytest.raises(RecipeError, match="warmup"):
        LocalSpec(warmup=-1)
    with pytest.raises(RecipeError, match="over_rounds = 'cosine_step'"):
        LocalSpec(over_rounds="cosine_step")
    with pytest.raises(RecipeError, match=r"local\.warmup = 500 is not allowed"):  # before anything is done
        fedllm.run({**recipe, "local": {"warmup": 500}}, root=tmp_path)
    assert not list(tmp_path.iterdir())
    assert np.isfinite(LocalSpec(warmup=1, steps=2).at(0, 1, 1).rate(0, 2))
