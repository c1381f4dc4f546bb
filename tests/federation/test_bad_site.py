"""One malicious site among two honest ones: whatever it answers, the round goes on and the state stays finite.

`FEDLLM_FUZZ` is the number of replies a method (`make fuzz` sets 1000). Methods: the server's half runs anew for each
made-up reply, over honest replies that were computed once. Layers: the whole protocol runs anew.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from fedllm.core.client import SERVER
from fedllm.core.errors import FedLLMError, QuorumError
from fedllm.core.layer import Facts
from fedllm.core.program import Fold, drive
from fedllm.engines.in_process import InProcess
from fedllm.local.spec import LocalSpec
from fedllm.methods import registry
from fedllm.runs.fits import compose
from fedllm.runs.layers import LAYERS, make_layer
from fedllm.wire._blame import BROKE
from tests.bad import finite, made
from tests.methods.conftest import begin, tried

TRIES = int(os.environ.get("FEDLLM_FUZZ", "40"))
METHODS = {name: tried(name) for name in registry.METHODS if not registry.method_class(name).trial.apart}
BAD, HONEST = "c1", ("c0", "c2")


class Heard(InProcess):
    """Keeps what clients answer, by phase and client, in their order."""

    heard: dict

    def cross(self, way, job, msg):
        if way == "up":
            self.heard.setdefault((job.fold.ask.phase, job.client), []).append(msg)
        return super().cross(way, job, msg)


class Again:
    """Answers from what was heard; the server's own work is done. One client's answers are made up."""

    def __init__(self, real, rnd):
        self.real, self.rnd, self.at, self.folds, self.sent = real, rnd, {}, [], []

    def send(self, asks):
        return [self._one(ask) for ask in asks]

    def _one(self, ask):
        if ask.at_home or list(ask.msgs) == [SERVER]:
            return self.real.send([ask])[0]
        fold = Fold(ask, rows={c: i.n for c, i in self.real.infos.items()})
        self.folds.append(fold)
        for client in ask.msgs:
            key = (ask.phase, client)
            known = self.real.heard.get(key) or self.real.heard[ask.phase, HONEST[0]]
            i = self.at[key] = self.at.get(key, -1) + 1
            reply = known[min(i, len(known) - 1)]
            if client == BAD:
                reply = made(self.rnd, reply)
                self.sent.append((ask.phase, reply))
            fold.take(client, reply)
        if not set(HONEST) & set(ask.msgs) <= set(fold.answered):
            raise AssertionError(f"an honest reply was refused: {fold.missing}")
        return fold.done()


class Spoiled(InProcess):
    """All clients work, and one's answers are made up on their way."""

    rnd = random.Random(0)

    def cross(self, way, job, msg):
        if way == "up" and job.client == BAD:
            self.sent += 1
            reply = made(self.rnd, msg)
            return reply if isinstance(reply, dict) else {}  # what the codec reads is a mapping
        return super().cross(way, job, msg)

    def work(self, job, run):
        try:
            return super().work(job, run)
        except FedLLMError as error:  # of what it said itself its own half may know nothing: a site that breaks off
            if job.client != BAD:
                raise
            return f"{error}"


def live(name):
    """Whether its questions depend on who came when, or on secrets that live for a round: all clients then work."""
    return registry.method_class(name).by_arrival or name in ("fedask", "fusionai", "gossip", "swarm_search")


@pytest.mark.parametrize("name", [n for n in METHODS if live(n)])
def test_no_reply_ends_or_spoils_a_run_in_which_all_work(name):
    run = begin(name, kind=Spoiled, sizes=(5, 7, 6), **METHODS[name])
    run.engine.sent, Spoiled.rnd = 0, random.Random(name)
    while (before := run.engine.sent) < TRIES / 2:
        run.go(1)
        assert finite(run.state)
        if run.engine.sent == before and BAD in run.state.get("lost", {}):
            break  # it is asked no more
    assert finite(run.engine.memory[HONEST[0]]) if HONEST[0] in run.engine.memory else True


@pytest.mark.parametrize("name", [n for n in METHODS if not live(n)])
def test_no_reply_ends_or_spoils_a_round(name):
    options = {**METHODS[name], "ranks": METHODS[name]["ranks"][:3]}
    run = begin(name, kind=Heard, sizes=(5, 7, 6), **options)
    run.engine.heard = {}
    before = run.state
    run.go(1)
    infos, seen, named, after = run.world.infos(), 0, 0, 0
    rnd = random.Random(name)
    run.engine.begin(0)
    while seen < TRIES:
        engine = Again(run.engine, rnd)
        try:
            state = drive(run.method.round(before, infos), engine)
        except Exception as error:
            raise AssertionError(f"{engine.sent[-3:]!r:.600}") from error
        if not engine.sent:
            return
        assert finite(state), engine.sent
        seen += len(engine.sent)
        whys = [fold.missing[BAD] for fold in engine.folds if BAD in fold.missing]
        assert all(isinstance(why, str) and len(why) <= 400 for why in whys)
        named += len(whys)
        if not whys and after < max(1, TRIES // 40):
            after += 1
            assert finite(next_round(run, state)), engine.sent
    assert named, "not one made-up reply was refused"


def next_round(run, state):
    """The state after a round in which all work on what a made-up reply, taken for an honest one, has left."""
    heard, run.engine.heard = run.engine.heard, {}
    run.engine.begin(1)
    state = drive(run.method.round(state, run.world.infos()), run.engine)
    run.engine.begin(0)
    run.engine.heard = heard
    return state


LAYERED = {name: {} for name in LAYERS} | {
    "dp_fedavg": {"noise_multiplier": 0.1}, "dp_ftrl": {"noise_multiplier": 0.1, "restart_every": 1},
    "dp_sgd": {"noise_multiplier": 1.0}, "codec_quant": {"skip_below": 0}, "codec_powersgd": {"rank": 1},
    "he_ckks": {"poly_modulus_degree": 8192}, "secagg_plus": {"degree": 4}}


@pytest.mark.parametrize("name", LAYERED)
def test_no_reply_ends_or_spoils_a_round_under_a_layer(name):
    """So many clients that rules that stand one malicious one, and thresholds of masks, are met without it."""
    layer = make_layer(name, LAYERED[name], "layers.0")
    sizes = (5, 7, 6, 5, 8, 6, 5, 6) if layer.algebra.kind == "robust" else (5, 7, 6, 5, 8)
    rows = {f"c{i}": n for i, n in enumerate(sizes)}
    spec = LocalSpec(optimizer="sgd", lr=0.1, steps=1, batch_size=4, max_length=32)
    layer = layer.bind(Facts(rows, len(rows), 1000, spec))
    run = begin("fedavg", kind=Spoiled, sizes=sizes, layers=(layer,), dtype=torch.float32)
    worked(run, [layer], name)


MAY_BREAK = {"RingAllReduce", "SecAgg", "SecAggPlus", "THGSSecAgg"}
"""Layers that need everybody's word to open a sum: who breaks it costs that round, and stays out of the next ones."""


def worked(run, layers, name):
    """Rounds in which all work, until so many replies were made up; the states of layers live on as in a run."""
    run.engine.sent, Spoiled.rnd = 0, random.Random(name)
    start, states, lost, round = run.state, [layer.init() for layer in layers], 0, 0
    while run.engine.sent < max(8, TRIES / 4):
        if round % 20 == 0:  # a model that is trained to its end is no test of rules that look at updates
            run.state = start
        run.engine.begin(round)
        round += 1
        try:
            run.state = drive(run.method.round(run.state, run.world.infos()), run.engine, layers, states)
            run.engine.commit()
        except QuorumError as error:
            run.engine.abandon()
            lost += 1
            if not MAY_BREAK & {type(layer).__name__ for layer in layers}:
                skipped_without_it_too(run, layers, round - 1)
            else:
                assert any(BAD in state.get(BROKE, {}) for state in states if isinstance(state, dict)), error
        assert finite(run.state)
    assert lost <= max(1, round / 4), f"{lost} of {round} rounds were lost"


def skipped_without_it_too(run, layers, round):
    """FLTrust skips a round in which nobody points the way that its own rows do: that is so among the honest alone."""
    run.engine.begin(round)
    with pytest.raises(QuorumError):
        honest = [c for c in run.world.infos() if c.id != BAD]
        drive(run.method.round(run.state, honest), run.engine, layers, [layer.init() for layer in layers])
    run.engine.abandon()


STACKS = (("dp_sgd", "secagg"), ("dp_fedavg", "secagg_plus"), ("norm_clip", "codec_topk_ef"), ("krum", "codec_quant"),
          ("trimmed_mean", "dp_sgd", "codec_topk_ef"), ("codec_powersgd", "secagg"), ("dp_fedavg", "he_ckks"))


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_no_reply_ends_or_spoils_a_round_under_layers_in_a_row(names):
    """Layers hand each other what the malicious one sent: what one lets pass, the next must stand."""
    rows = {f"c{i}": n for i, n in enumerate((5, 7, 6, 5, 8, 6, 5, 6))}
    spec = LocalSpec(optimizer="sgd", lr=0.1, steps=1, batch_size=4, max_length=32)
    layers = [make_layer(name, LAYERED[name], "layers.0").bind(Facts(rows, len(rows), 1000, spec)) for name in names]
    run = begin("fedavg", kind=Spoiled, sizes=tuple(rows.values()), layers=tuple(layers), dtype=torch.float32)
    compose(run.method, layers)
    worked(run, layers, "+".join(names))


class Breaks(Spoiled):
    """Joins every ring as it should, and then hands on what is made up."""

    def cross(self, way, job, msg):
        lies = job.fold.ask.phase.endswith(".turn")
        return super().cross(way, job, msg) if lies else InProcess.cross(self, way, job, msg)


def test_a_ring_goes_on_without_who_breaks_it():
    """The round that it breaks is given up; the next ring stands without it, and it stays out twice as long each time
    that it comes back: of 24 rounds few are lost, and never three in a row, which would end the run."""
    rows = {f"c{i}": 5 for i in range(6)}
    spec = LocalSpec(optimizer="sgd", lr=0.1, steps=1, batch_size=4, max_length=32)
    ring = make_layer("ring_all_reduce", {}, "layers.0").bind(Facts(rows, len(rows), 1000, spec))
    run = begin("fedavg", kind=Breaks, sizes=tuple(rows.values()), layers=(ring,), dtype=torch.float32)
    run.engine.sent, Spoiled.rnd, states, kept = 0, random.Random(7), [ring.init()], []
    for round in range(24):
        run.engine.begin(round)
        try:
            run.state = drive(run.method.round(run.state, run.world.infos()), run.engine, [ring], states)
            run.engine.commit()
            kept.append(True)
        except QuorumError:
            run.engine.abandon()
            kept.append(False)
    assert finite(run.state) and kept.count(False) <= 8 and run.engine.sent >= 3
    assert not any(not (a or b or c) for a, b, c in zip(kept, kept[1:], kept[2:], strict=False))
    assert max(states[0]["broke"].items(), key=lambda one: one[1][0])[0] == BAD
