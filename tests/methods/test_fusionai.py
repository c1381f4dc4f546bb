"""A model in pieces: its step is one process's, whoever is lost; the schedule is the best there is."""

from __future__ import annotations

import functools
import itertools
import time

import numpy as np
import pytest
import torch

from evidence.rigs.pieces import Losing, apart, machines, site, whole
from evidence.rigs.trials import Trial
from fedllm.core.client import Profile
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.core.program import drive
from fedllm.engines.far.engine import Flare
from fedllm.engines.far.near import Near
from fedllm.engines.far.sites import Patience, Sites
from fedllm.methods._pieces import Machine, Op, cost, costed, crossing, even, ordered, partition, room
from fedllm.methods.registry import make_method

ADAM = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "batch_size": 2, "accumulate": 2}


def started(begin, who="", after=0, tied=False, **options):
    run = begin("fusionai", space="full", kind=Losing, **{"local": ADAM, "pieces": 3, "backups": 1, **options})
    if tied:
        net = run.world.model.net
        net.config.tie_word_embeddings = True
        net.tie_weights()
        run.state = run.method.init(run.world.model)
    run.engine.who, run.engine.after = who, after
    return run


@pytest.mark.parametrize("pieces, tied, local", [
    (2, False, ADAM), (3, True, ADAM), (4, False, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "batch_size": 1,
                                                   "accumulate": 3})])
def test_its_weights_are_those_of_one_process(begin, pieces, tied, local):
    run = started(begin, pieces=pieces, backups=0, tied=tied, local=local)
    run.go(3)
    assert len(run.state["plan"]["machines"]) == pieces and not run.state["lost"]
    assert apart(run.state["theta"], whole(run.world, 3)) < 1e-9
    assert apart(run.world.model.initial(), run.state["theta"]) > 1e-3


@pytest.mark.parametrize("who", ["c0", "c1", "c2"])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_whoever_is_lost_the_result_is_the_same_to_the_bit(begin, who, after):
    """Three machines hold a piece each; one is switched off before, within, or after its part of a step."""
    plain, hit = started(begin, tied=True), started(begin, who, after, tied=True)
    for run in (plain, hit):
        run.go(2)
    assert hit.state["lost"] == {who: 1} and "c3" in hit.state["plan"]["machines"]
    assert all(torch.equal(plain.state["theta"][n], t) for n, t in hit.state["theta"].items())
    piece = max(sum(t.numel() for t in hit.world.model.initial().values()), 1) * 8
    assert 0 < hit.state["resent"] <= 3 * piece + 4 * 4 * 32 * 16 * 8  # weights, two moments; states and gradients


def test_without_a_spare_machine_the_round_does_not_count(begin):
    run = started(begin, "c1", 2, backups=0, pieces=4)
    before = dict(run.state["theta"])
    with pytest.raises(QuorumError, match=r"machine 'c1' was lost and there is no spare one.*backups"):
        run.go(1)
    assert all(torch.equal(before[n], t) for n, t in run.state["theta"].items())


def test_who_was_lost_is_not_planned_with_while_others_are_there(begin):
    run = started(begin, "c0", 0).go(1)
    assert run.state["lost"] == {"c0": 1} and run.state["plan"]["machines"][0] != "c0"
    run.engine.who = ""
    run.go(1)
    assert "c0" not in run.state["plan"]["machines"]


def test_a_holder_is_told_its_piece_once(begin):
    run = started(begin).go(2)
    down = [e for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"]
    by = [sum(e["bytes"] for e in down if e["round"] == t) for t in (0, 1)]
    whole = sum(t.numel() * t.element_size() for t in run.world.model.initial().values())
    assert by[0] - by[1] > 0.8 * whole  # in the first round each got its part of the weights


def test_a_reply_of_another_shape_costs_its_sender_the_piece(begin):
    plain, run = started(begin).go(1), started(begin)
    work = run.engine.work

    def lying(job, submit):
        reply = work(job, submit)
        if job.client == "c1" and isinstance(reply, dict) and "theta/" in "".join(reply):
            return {k: t[:1] if k.startswith("theta") else t for k, t in reply.items()}
        return reply

    run.engine.work = lying
    run.go(1)
    assert run.state["lost"] == {"c1": 1}
    assert all(torch.equal(plain.state["theta"][n], t) for n, t in run.state["theta"].items())


def chain(rng, n):
    ops = [Op(f"o{i}", (f"o{i - 1}",) if i else (), float(rng.uniform(0.05, 1)), float(rng.uniform(1, 9)),
              float(rng.uniform(1, 9)), float(rng.uniform(1, 9))) for i in range(n)]
    if n > 3:
        ops[-1] = Op(ops[-1].name, (ops[-2].name, "o0"), ops[-1].steps, ops[-1].held, ops[-1].sends, 5.0)  # a skip
    return ops


def fleet(rng, n, memory=None):
    return [Machine(f"m{k}", float(rng.uniform(0.5, 4)), memory and float(rng.uniform(*memory)),
                    float(rng.uniform(0, 0.05)), float(rng.uniform(20, 200))) for k in range(n)]


def brute(ops, some, micro):
    best = np.inf
    for count in range(2, min(len(some), len(ops)) + 1):
        for cuts in itertools.combinations(range(1, len(ops)), count - 1):
            marks = list(zip((0, *cuts), (*cuts, len(ops)), strict=True))
            for who in itertools.permutations(some, count):
                if all(m.memory is None or room(ops, a, b, micro) <= m.memory
                       for m, (a, b) in zip(who, marks, strict=True)):
                    best = min(best, max(cost(ops, m, a, b, micro) for m, (a, b) in zip(who, marks, strict=True)))
    return best


def test_the_partition_is_the_best_there_is():
    rng, refused = np.random.default_rng(0), 0
    for _ in range(50):
        ops, memory = chain(rng, int(rng.integers(3, 9))), (6, 18) if rng.random() < 0.5 else None
        some = fleet(rng, 3, memory)
        want = brute(ops, some, 2)
        if not np.isfinite(want):
            refused += 1
            with pytest.raises(RecipeError, match="cannot hold the model"):
                partition(ops, some, 2)
            continue
        plan = partition(ops, some, 2)
        assert max(plan.seconds) == pytest.approx(want)
        assert costed(ops, {m.id: m for m in some}, 2, plan.machines, plan.cuts) == plan
    assert 0 < refused < 40


def test_speeds_that_differ_are_worth_a_schedule():
    rng, ratios = np.random.default_rng(1), []
    for _ in range(20):
        ops = [Op(f"o{i}", (f"o{i - 1}",) if i else (), 0.1, 1.0, 1.0) for i in range(10)]
        some = [Machine(f"m{k}", speed) for k, speed in enumerate(rng.permutation([1.0, 1.0, 4.0, 4.0]))]
        ratios.append(partition(ops, some, 4).total(4) / even(ops, some, 4, 4).total(4))
    assert max(ratios) <= 0.8


def test_a_graph_is_ordered_and_cut_edges_are_counted_once():
    ops = [Op("c", ("a", "b"), 1, 1, 4), Op("a", (), 1, 1, 1), Op("b", ("a",), 1, 1, 2)]
    line = ordered(ops)
    assert [op.name for op in line] == ["a", "b", "c"]
    assert [crossing(line, b) for b in (1, 2)] == [1, 3]  # c reads a and b
    with pytest.raises(RecipeError, match="in a circle"):
        ordered([Op("a", ("b",), 1, 1, 1), Op("b", ("a",), 1, 1, 1)])
    with pytest.raises(RecipeError, match="'a' reads 'x', which no operation gives"):
        ordered([Op("a", ("x",), 1, 1, 1)])


def test_what_does_not_fit_is_refused(begin):
    run = started(begin)
    for c in ("c0", "c1", "c2", "c3"):
        info = run.engine.infos[c]
        run.world.profiles = {**run.world.profiles, c: Profile(memory_bytes=1000)}
        assert info
    with pytest.raises(RecipeError, match=r"machines with \d+ bytes of memory in all cannot hold the model"):
        run.go(1)
    method = make_method("fusionai", backups=2)
    method.check_clients(list("abcd"), 4)
    with pytest.raises(RecipeError, match=r"backups = 2 is not allowed with 3 clients"):
        method.check_clients(list("abc"), 3)
    spec = run.world.local
    for key, value in (("clip_norm", 1.0), ("packing", True), ("warmup", 3), ("over_rounds", "cosine_steps")):
        with pytest.raises(RecipeError, match=rf"local\.{key} = .* is not allowed"):
            method.check_work(type(spec)(**{key: value}), 10)
    drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)


class Killing(Near):
    """Kills a process for good as it is asked for the `after`-th time."""

    who, after = "", 0

    def call(self, site, head, body, seconds, over=None):
        if head["op"] == "ask" and site == self.who:
            self.after -= 1
            if self.after == 0:
                self.processes[site].kill()
        return super().call(site, head, body, seconds, over)


@pytest.mark.slow  # four processes load a model each
@pytest.mark.timeout(300)
def test_processes_train_as_one_and_a_killed_one_is_replaced(tmp_path):
    """Real processes over sockets, SIGKILL in the midst of the second step: the weights are those of one process."""
    knobs, began = {"pieces": 3, "backups": 1, "deadline": 60.0}, time.monotonic()
    world = machines(3, layers=3)
    with Killing(functools.partial(site, 3, tmp_path, 3, knobs), [c.id for c in world.infos()]) as near:
        sites = Sites(near, list(near.processes), Patience(answer=200.0, probe=10.0, every=0.2, grace=2.0))
        near.meet(sites)
        run = Trial("fusionai", world, knobs, functools.partial(Flare, sites=sites)).rounds(1)
        near.who, near.after = run.state["plan"]["machines"][1], 6
        run.rounds(2)
        assert not near.processes[near.who].is_alive() and run.state["lost"] == {near.who: 1}
        assert near.who not in run.state["plan"]["machines"] and run.state["resent"] > 0
        assert apart(run.state["theta"], whole(world, 3)) < 1e-6
        here = Trial("fusionai", machines(3, layers=3), knobs).rounds(3)
        assert all(torch.equal(here.state["theta"][n], t) for n, t in run.state["theta"].items())
        live = [p for p in near.processes.values() if p.is_alive()]
        assert len(live) == 3
    assert not any(p.is_alive() for p in near.processes.values()) and time.monotonic() - began < 240
