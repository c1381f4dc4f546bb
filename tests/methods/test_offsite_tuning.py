"""Offsite tuning: which blocks clients get, where what they learned goes back to, and what never travels."""

import itertools

import pytest
import torch

from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer
from fedllm.core.payload import part
from fedllm.methods.registry import make_method
from fedllm.models.emulator import emulator
from fedllm.spaces.layers import block_of
from tests.methods.test_offsite import go, start

SHAPES = [shape for shape in itertools.product((6, 8, 12), (0, 1, 2), (1, 2), (0.25, 0.5))
          if round((shape[0] - shape[1] - shape[2]) * (1 - shape[3])) >= 2][:24]


@pytest.mark.parametrize("depth, low, top, drop", SHAPES)
def test_the_blocks_are_the_formulas(depth, low, top, drop):
    """Both ends, and round(i (m - 1) / (n - 1)) of the m between."""
    m = depth - low - top
    n = round(m * (1 - drop))
    want = [*range(low), *(low + round(i * (m - 1) / (n - 1)) for i in range(n)), *range(depth - top, depth)]
    got = make_method("offsite_tuning", bottom_layers=low, adapter_layers=top, drop_ratio=drop).kept(depth)
    assert got == want and len(set(got)) == len(got)


def test_what_was_learned_goes_back_by_block_number():
    knobs = {"bottom_layers": 1, "adapter_layers": 2, "drop_ratio": 0.67, "prealign_steps": 0, "align_steps": 0}
    _, method, state, world = start("offsite_tuning", **knobs)
    assert method.kept(6) == [0, 2, 4, 5]
    assert {block_of(n) for n in state["A"]} == {0, 2, 3} and {block_of(n) for n in state["E"]} == {1}
    marked = {**state, "A": {n: torch.full_like(t, float(block_of(n))) for n, t in state["A"].items()}}
    theta = method.served(marked)[0]
    seen = {block_of(n): float(t.flatten()[0]) for n, t in theta.items() if block_of(n) in (0, 4, 5)}
    assert seen == {0: 0.0, 4: 2.0, 5: 3.0} and set(theta) == set(world.model.initial())


def test_with_nothing_left_out_the_emulator_is_the_model():
    engine, method, state, world = start("offsite_tuning", bottom_layers=1, adapter_layers=1, drop_ratio=0.0,
                                         prealign_steps=0, align_steps=0)
    state = go(engine, method, state, world)
    from fedllm.core.program import drive

    engine.begin(5)
    mine = drive(method.evaluate(state, world.infos(), "global"), engine)
    from fedllm.core.client import SERVER
    from fedllm.local.forward import run_losses
    from fedllm.local.requests import Losses

    [whole] = run_losses([Losses("x", world.model, method.served(state)[0], None, world.encoded(SERVER, "test"))],
                         world.limits)
    assert mine["c0"]["loss"] == pytest.approx(whole.mean, abs=1e-10)
    assert any(float(t.abs().max()) > 0 for n, t in state["A"].items() if "lora_B" in n and block_of(n) == 0)


def test_nothing_of_a_block_that_was_left_out_travels():
    said = []

    class Tape(Layer):
        def client(self, fn, msg, client, call):
            said.append(dict(msg))
            reply = call(msg)
            said.append(dict(reply))
            return reply

    tape = Tape()
    knobs = {"bottom_layers": 1, "adapter_layers": 1, "drop_ratio": 0.5, "prealign_steps": 2}
    engine, method, state, world = start("offsite_tuning", layers=(tape,), **knobs)
    state = go(engine, method, state, world, rounds=2, layers=[tape], states=[{}])
    kept = method.kept(6)
    names = set(method.at_client(world.model).initial())
    sent = {n for msg in said for key in ("A", "E", "delta") for n in part(msg, key)}
    assert sent <= names and {block_of(n) for n in sent} == set(range(len(kept))) and len(kept) < 6
    thin = emulator(world.model, kept)
    assert method.at_client(world.model) is thin
    held = {p.data_ptr() for p in thin.net.parameters()}
    left_out = [p for n, p in world.model.net.named_parameters() if block_of(n) is not None and block_of(n) not in kept]
    assert left_out and not any(p.data_ptr() in held for p in left_out)


def test_the_emulator_is_aligned_once():
    engine, method, state, world = start("offsite_tuning", bottom_layers=1, adapter_layers=1, prealign_steps=3,
                                         align_steps=0)
    first = go(engine, method, state, world, rounds=1)
    after = go(engine, method, first, world, rounds=2)
    assert any(not first["E"][n].equal(t) for n, t in state["E"].items())
    assert all(after["E"][n].equal(t) for n, t in first["E"].items())


def test_a_model_of_ends_alone_is_refused():
    with pytest.raises(CompositionError, match=r"bottom_layers = 3 and adapter_layers = 3 leaves nothing"):
        start("offsite_tuning", bottom_layers=3, adapter_layers=3)
    with pytest.raises(CompositionError, match="leaves no block"):
        start("offsite_tuning", bottom_layers=2, adapter_layers=3, drop_ratio=0.9)
