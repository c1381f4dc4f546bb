"""Every method on both engines, and under a layer that changes nothing."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.client import SERVER
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.methods import registry
from fedllm.wire import codec
from tests.methods.conftest import tried

METHODS = {name: tried(name) for name in registry.METHODS if not registry.method_class(name).trial.apart}
"""Every method that is found, ours or not, and what it is tried with."""
EXACT = [name for name in METHODS if not registry.method_class(name).trial.rounding]
SPACE_FREE = ("fedavg", "fedprox", "scaffold", "fedadam", "local_only", "centralized")


class Lossless(Layer):
    """Turns every message into bytes and back, in both directions."""

    def client(self, fn, msg, client, call):
        return codec.decode(codec.encode(call(codec.decode(codec.encode(msg)))))


def end(begin, name, rounds=2, **options):
    """The deployed model, and what every client scores, after some rounds."""
    run = begin(name, **{**METHODS[name], **options}).go(rounds)
    theta, base = run.method.served(run.state) if run.method.serves else ({}, None)
    scores = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine, run.engine.stack[1:])
    return ({**theta, **(base or {})}, {c: s["loss"] for c, s in scores.items()},
            {c: {p: v for p, v in leaves(m) if isinstance(v, torch.Tensor)} for c, m in run.engine.memory.items()})


def agree(gap, one, other, tolerance):
    assert gap(one[0], other[0]) <= tolerance
    assert one[1] == pytest.approx(other[1], abs=tolerance)
    for client in one[2]:
        assert gap(one[2][client], other[2][client]) <= tolerance


@pytest.mark.parametrize("name", METHODS)
def test_engines_agree_in_fp64(begin, gap, name):
    agree(gap, end(begin, name, engine="in_process"), end(begin, name), 1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_engines_agree_in_fp32(begin, gap, name):
    agree(gap, end(begin, name, engine="in_process", dtype=torch.float32), end(begin, name, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_lossless_layer_changes_nothing(begin, gap, name):
    wired = end(begin, name, dtype=torch.float32, loopback=True)
    agree(gap, wired, end(begin, name, dtype=torch.float32, layers=(Lossless(),), loopback=True), 0.0)
    plain = end(begin, name, dtype=torch.float32)  # equal tensors share a lane in tests: states alone
    agree(gap, (plain[0], wired[1], plain[2]), wired, 0.0)


@pytest.mark.parametrize("space", ["full", "soft_prompt", "ia3"])
@pytest.mark.parametrize("name", SPACE_FREE)
def test_other_spaces(begin, gap, name, space):
    own = {"space": space, "space_knobs": {}}
    agree(gap, end(begin, name, 1, engine="in_process", **own), end(begin, name, 1, **own), 1e-10)


@pytest.mark.parametrize("name", [n for n in METHODS if not registry.method_class(n).trial.silent])
def test_a_silent_client_is_left_out_of_the_mean(begin, gap, name):
    """Two rounds in which the last client never answers are two rounds without it; then it joins late."""
    without = begin(name, **METHODS[name]).go(2, ["c0", "c1", "c2"])
    joined = begin(name, **METHODS[name])
    joined.engine.infos["c3"] = type(joined.engine.infos["c3"])("c3", 12, _never(joined))
    joined.go(2)
    got, wanted = kept(joined), kept(without)
    assert gap(got, wanted) == 0 or (name == "hetlora" and gap(got, wanted) < 1e-10)
    joined.engine.infos["c3"] = without.engine.infos["c3"]
    assert set(joined.go(1).engine.memory) - {SERVER} in ({"c0", "c1", "c2", "c3"}, set())


def kept(run):
    """The model that is deployed, or what clients keep where none is."""
    if run.method.serves:
        return run.method.served(run.state)[0]
    return {f"{c}/{p}": v for c, m in run.engine.memory.items() for p, v in leaves(m) if isinstance(v, torch.Tensor)}


def _never(run):
    from dataclasses import replace

    return replace(run.engine.infos["c3"].profile, availability=0.0)
