"""Every method on both engines, and under a layer that changes nothing."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.client import SERVER
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.wire import codec

METHODS = {
    "fedavg": {}, "fedit": {}, "fedprox": {"mu": 0.1}, "scaffold": {}, "fedavgm": {}, "fedadagrad": {}, "fedyogi": {},
    "fedadam": {}, "fedadamw": {"weight_decay": 0.1},
    "local_only": {}, "centralized": {}, "flora_stacking": {"ranks": (1, 2, 4, 8)}, "fedex_lora": {},
    "rolora": {}, "ffa_lora": {}, "hetlora": {"ranks": (1, 2, 4, 4), "space_knobs": {"scaling": "shared"}},
    "flexlora": {"ranks": (1, 2, 4, 8)}, "fedkseed": {"space": "full", "K": 8, "steps": 3, "lr": 1e-3, "eps": 1e-3},
    "fedbuff": {"buffer_size": 3, "concurrency": 4}, "fedasync": {"concurrency": 3}, "stragglers": {"over": 1.0},
    "fedkseed_pro": {"space": "full", "K": 8, "steps": 3, "lr": 1e-3, "eps": 1e-3, "law": "rademacher"},
    "fedmezo": {"steps": 3, "lr": 1e-2, "delta": 5e-3},
    "fedbpt": {"space": "soft_prompt", "intrinsic_dim": 6, "popsize": 4, "local_iter": 2, "common_noise": False},
    "fedyolo": {},
    "fed_bbpt": {"space": "soft_prompt", "candidates": 6, "samples": 3, "steps": 2, "batch": 4},
    "fed_gfpt": {"space": "soft_prompt", "search_steps": 4, "n_candidates": 3, "batch": 4, "phi": 2},
    "zoopfl": {"task": "classification", "pretrain_rounds": 1, "pretrain_steps": 5, "code_dim": 4, "embed_dim": 2,
               "h": 0.05},
    "fedlora_wu": {"space": "streams", "local": {"steps": 3}, "space_knobs": {
        "of": {"sigma": "full", "tau": {"name": "lora", "rank": 2}}, "personal": ("tau",)}},
    "fedbrb": {"space": "full", "n_blocks": 2},
    "fwdllm": {"perturbations": 2, "most": 1, "lr": 1e-2, "candidates": 3},
}
SPACE_FREE = ("fedavg", "fedprox", "scaffold", "fedadam", "local_only", "centralized")


class Lossless(Layer):
    """Turns every message into bytes and back, in both directions."""

    def client(self, fn, msg, client, call):
        return codec.decode(codec.encode(call(codec.decode(codec.encode(msg)))))


def end(begin, name, rounds=2, **options):
    """The deployed model, and what every client scores, after some rounds."""
    run = begin(name, **{**METHODS[name], **options}).go(rounds)
    theta, base = run.method.served(run.state)
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


# a difference over 2 eps and an SVD's signs magnify fp32 rounding: fedkseed and flexlora are held to fp64 alone
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("fedkseed", "flexlora")])
def test_engines_agree_in_fp32(begin, gap, name):
    agree(gap, end(begin, name, engine="in_process", dtype=torch.float32), end(begin, name, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_lossless_layer_changes_nothing(begin, gap, name):
    agree(gap, end(begin, name, dtype=torch.float32),
          end(begin, name, dtype=torch.float32, layers=(Lossless(),), loopback=True), 0.0)


@pytest.mark.parametrize("space", ["full", "soft_prompt", "ia3"])
@pytest.mark.parametrize("name", SPACE_FREE)
def test_other_spaces(begin, gap, name, space):
    agree(gap, end(begin, name, 1, engine="in_process", space=space), end(begin, name, 1, space=space), 1e-10)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "centralized"])
def test_a_silent_client_is_left_out_of_the_mean(begin, gap, name):
    """Two rounds in which the last client never answers are two rounds without it; then it joins late."""
    without = begin(name, **METHODS[name]).go(2, ["c0", "c1", "c2"])
    joined = begin(name, **METHODS[name])
    joined.engine.infos["c3"] = type(joined.engine.infos["c3"])("c3", 12, _never(joined))
    joined.go(2)
    got, wanted = joined.method.served(joined.state)[0], without.method.served(without.state)[0]
    assert gap(got, wanted) == 0 or (name == "hetlora" and gap(got, wanted) < 1e-10)
    joined.engine.infos["c3"] = without.engine.infos["c3"]
    assert set(joined.go(1).engine.memory) - {SERVER} in ({"c0", "c1", "c2", "c3"}, set())


def _never(run):
    from dataclasses import replace

    return replace(run.engine.infos["c3"].profile, availability=0.0)
