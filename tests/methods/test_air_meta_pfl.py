"""Over the air: first-order meta-gradients exactly, memory that loses nothing, fades, noise and refusals."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import QuorumError
from fedllm.core.layer import Layer
from fedllm.core.payload import add, norm, part, scale, sub

LOCAL = {"local": {"steps": 2}}


class Heard(Layer):
    def __init__(self):
        self.said = {}

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said.setdefault(client.id, []).append(part(reply, "signal"))
        return reply


def test_all_sent_without_noise_is_the_mean_meta_gradient(begin, gap):
    ear = Heard()
    run = begin("air_meta_pfl", keep=1.0, outer_lr=0.5, layers=(ear,), **LOCAL)
    start = run.state["theta"]
    run.go(1)
    mean = scale(start, 0.0)
    for said in ear.said.values():
        mean = add(mean, said[0], 1 / 4)
    assert gap(run.state["theta"], add(start, mean, -0.5)) < 1e-12 and norm(mean) > 0
    assert all(norm(m["rest"]) == 0 for m in run.engine.memory.values())


def test_what_was_sent_and_what_waits_is_all_there_was(begin, gap, monkeypatch):
    from fedllm.engines.client import ClientCall

    made, plain = {}, ClientCall.gradient

    def gradient(self, theta, rows=None, **more):
        g = plain(self, theta, rows, **more)
        made.setdefault(self.id, []).append(g)
        return g

    monkeypatch.setattr(ClientCall, "gradient", gradient)
    ear = Heard()
    run = begin("air_meta_pfl", keep=0.1, layers=(ear,), **LOCAL).go(3)
    for c, sent in ear.said.items():
        left = run.engine.memory[c]["rest"]
        for s, g in zip(sent, made[c], strict=True):
            left = add(sub(left, g), s)
        assert norm(left) < 1e-10
        size = sum(t.numel() for t in sent[0].values())
        assert sum(int((t != 0).sum()) for t in sent[0].values()) <= round(0.1 * size)


def test_a_round_in_a_fade_changes_nothing_and_keeps_all(begin, gap):
    run = begin("air_meta_pfl", fading="rayleigh", gain_threshold=100.0, **LOCAL)
    start = run.state["theta"]
    run.go(1)
    assert gap(run.state["theta"], start) == 0 and all(norm(m["rest"]) > 0 for m in run.engine.memory.values())


def test_noise_is_set_against_the_sum(begin):
    quiet, loud = (begin("air_meta_pfl", keep=1.0, snr_db=x, **LOCAL).go(1).state["theta"] for x in (None, 0.0))
    start = begin("air_meta_pfl", **LOCAL).state["theta"]
    assert norm(sub(loud, quiet)) == pytest.approx(norm(sub(quiet, start)), rel=0.15)


def test_power_bounds_what_is_transmitted(begin):
    ear = Heard()
    begin("air_meta_pfl", keep=1.0, power=1e-3, layers=(ear,), **LOCAL).go(1)
    assert all(norm(s[0]) <= 1e-3 * (1 + 1e-9) for s in ear.said.values()) and torch.is_tensor(next(
        iter(ear.said["c0"][0].values())))


def test_other_optimizers_are_refused(begin):
    from fedllm.core.errors import CompositionError

    with pytest.raises((CompositionError, QuorumError), match=r"local\.optimizer = 'adamw'.*plain SGD"):
        begin("air_meta_pfl", local={"optimizer": "adamw", "steps": 2}).go(1)
