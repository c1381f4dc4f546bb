"""Several processes train one client: what comes out is what one process gives, and nothing hangs when one dies."""

import copy
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, RecipeError, RunError, Withheld
from fedllm.local.fit import run_fits
from fedllm.local.group import Group, Staff
from fedllm.local.objectives.registry import make_objective
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Linear, Proximal
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe
from fedllm.runs.spread import together

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "good"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("rows")
    for k, n in enumerate((11, 7)):
        rows = [{"prompt": " ".join(WORDS[(i + j * (k + 2)) % 14] for j in range(3 + i % 4)),
                 "response": " ".join(WORDS[(i + k + j) % 14] for j in range(1 + i % 3))} for i in range(n)]
        (folder / f"c{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"name": "shards", "model": {"name": tiny_llama_folder, "dtype": "float64"}, "method": "fedavg",
            "space": "full", "local": {"lr": 1e-2, "steps": 2, "batch_size": 4}, "rounds": 2,
            "data": {"source": str(folder), "partition": {"kind": "per_file"}},
            "evaluate": {"exact_match": False, "samples": 0}, "engine": {"kind": "in_process", "processes": 2}}


def parts_of(recipe, **overrides):
    dotted = {key: value for key, value in overrides.items() if "." in key}
    plain = {**recipe, **{k: v for k, v in overrides.items() if k not in dotted}}
    return build(load_recipe(copy.deepcopy(plain), dotted))


def request(parts, sizes=(6, 5, 1, 6), **more):
    """A fit over the first client's rows, whose steps have so many rows: one of them too few for two processes."""
    rows, draw = parts.world.encoded("c0", "train"), np.random.default_rng(0)
    rng = torch.Generator().manual_seed(1)
    theta = {n: t.double() + 0.01 * torch.randn(t.shape, generator=rng, dtype=torch.float64)
             for n, t in parts.world.model.initial().items()}
    spec = LocalSpec(**{"lr": 1e-2, "batch_size": 6, **more.pop("spec", {})})
    return Fit("c0", parts.world.model, theta, None, rows, [draw.permutation(len(rows))[:k] for k in sizes], spec,
               **more)


def same(parts, r):
    """The fit in one process and in several, equal; how far it went."""
    limits = parts.world.limits
    seen = []
    (one,), (two,) = run_fits([r], Limits()), run_fits([r], replace(limits, did=lambda k, n: seen.append(n)))
    near = {"rtol": 0, "atol": 1e-10}
    for n, t in one.theta.items():
        torch.testing.assert_close(two.theta[n], t, **near)
    assert one.moments.keys() == two.moments.keys()
    for n, t in one.moments.items():
        torch.testing.assert_close(two.moments[n], t, **near)
    assert (two.steps, two.examples, two.tokens, two.lr_sum) == (one.steps, one.examples, one.tokens, one.lr_sum)
    assert two.loss == pytest.approx(one.loss, abs=1e-10)
    assert sum(seen) == one.tokens and len(seen) == one.steps
    assert max(float((one.theta[n] - t).abs().max()) for n, t in r.theta.items()) > 1e-3
    return two


@pytest.mark.slow
def test_two_processes_train_all_weights_as_one_does_and_a_dead_one_is_named(recipe):
    parts = parts_of(recipe)
    with together(parts):
        group = parts.world.limits.group
        r = request(parts, moments=None, freeze=("*norm*",),
                    spec={"batch_size": 3, "accumulate": 2, "clip_norm": 0.5})
        before = same(parts, r).moments
        assert sum(n.startswith("exp_avg/") for n in before) == sum("norm" not in n for n in r.theta)
        same(parts, replace(r, moments=before))  # the optimizer goes on where it was
        pull = [Proximal(0.3, {n: torch.zeros_like(t) for n, t in r.theta.items()}),
                Linear({n: torch.full_like(t, 0.01) for n, t in r.theta.items()})]
        same(parts, request(parts, terms=tuple(pull), moments=None,
                            spec={"optimizer": "sgd", "momentum": 0.9, "checkpointing": True, "lr": 0.1}))
        pids = group.pids
        assert len(pids) == 2 and os.getpid() not in pids

        looks = iter(range(100))

        def given_up():
            if next(looks) > 1:
                raise Withheld("nobody waits for it")

        with pytest.raises(Withheld, match="nobody waits"):
            run_fits([request(parts, [4] * 400)], replace(parts.world.limits, go_on=given_up))
        assert group.pids == pids  # they stopped after a step, and are there for the next fit
        same(parts, r)

        with pytest.raises(CompositionError, match=r"engine\.processes = 2: .* objective 'dpo"):
            run_fits([replace(r, objective=make_objective("dpo"))], parts.world.limits)
        with pytest.raises(CompositionError, match="single examples' gradients are clipped"):
            run_fits([replace(r, private=Private(1.0, 1.0, 4.0, torch.Generator()))], parts.world.limits)

        killed = []

        def kill(clients, tokens):
            if not killed:
                killed.append(os.kill(pids[1], signal.SIGKILL))

        with pytest.raises(RunError, match="process 2 of 2 of this client was killed by signal 9"):
            run_fits([request(parts, [4] * 400)], replace(parts.world.limits, did=kill))
        assert group.pids == []
    assert parts.world.limits.group is None


def test_a_process_that_was_done_before_the_fit_was_given_up_is_not_waited_for_again():
    """Its word was heard and forgotten, and the client stood still until the others' patience ended."""
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    group, halted, said, looks = object.__new__(Group), threading.Event(), {}, iter(range(100))
    group.size, group.patience = 2, 600.0
    staff = group._staff = Staff([], list(ours), halted, "")

    def other():
        halted.wait(60)
        theirs[1].send(("done", None))

    def go_on():
        if said:
            raise Withheld("nobody waits for it")
        assert next(looks) < 99

    threading.Thread(target=other, daemon=True).start()
    theirs[0].send(("done", (1.0, 0.1)))
    with pytest.raises(Withheld):
        group._watch(staff, "done", Limits(go_on=go_on), said, 600.0)
    began = time.monotonic()
    group._halt(staff, False, said)
    assert time.monotonic() - began < 30 and set(said) == {0, 1} and group._staff is staff


@pytest.mark.parametrize(("overrides", "kind", "why"), [
    ({"engine.kind": "vectorized"}, RecipeError, "several processes train one client at a time"),
    ({"engine.processes": 65}, RecipeError, "processes"),
    ({"space": {"name": "ia3"}}, CompositionError, r"engine\.processes = 2: space 'ia3' reads the base's weights"),
    ({"space": {"name": "lora", "dropout": 0.1}}, CompositionError, "drawn for a whole batch"),
    ({"local.neftune": 5.0}, CompositionError, "drawn for a whole batch"),
    ({"model.dtype": "bfloat16"}, CompositionError, "never in less than fp32"),
    ({"space": "lora", "layers": [{"name": "dp_sgd", "noise_multiplier": 1.0}]}, CompositionError,
     r"engine\.processes = 2 and layer 'dp_sgd' do not fit together"),
])
def test_what_cannot_be_spread_is_refused_before_anything_runs(recipe, overrides, kind, why):
    with pytest.raises(kind, match=why):
        parts_of(recipe, **overrides)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("space", [{"name": "lora", "rank": 2}, {"name": "soft_prompt", "length": 3},
                                   {"name": "prefix", "length": 2}, {"name": "adapter"}])
def test_small_trainables_lie_whole_over_a_base_in_shards(recipe, space):
    parts = parts_of(recipe, space=space)
    with together(parts):
        r = request(parts, moments=None, spec={"batch_size": 3, "accumulate": 2, "clip_norm": 0.5})
        same(parts, r)
        same(parts, replace(r, terms=(Proximal(0.3, dict(r.theta)),), spec=LocalSpec(optimizer="sgd", lr=0.1)))
        if space["name"] == "lora":
            same(parts, replace(r, spec=LocalSpec(lr=1e-2, lora_plus=4.0, packing=True, batch_size=6)))
            side = {"rejected": list(reversed(r.rows)), "ref": [0.1 * i for i in range(len(r.rows))]}
            same(parts, replace(r, objective=make_objective("dpo"), side=side))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "photon", "reset_optimizer": False}])
def test_a_run_ends_in_the_same_model(recipe, method, tmp_path):
    ends = {}
    for n in (1, 2):
        engine = {"kind": "in_process", "processes": n}
        ends[n] = fedllm.run({**recipe, "method": method, "engine": engine}, root=tmp_path / str(n))
    one, two = (RunFolder.open(ends[n].folder).load()[1]["state"]["theta"] for n in (1, 2))
    assert max(float((one[n].double() - two[n].double()).abs().max()) for n in one) < 1e-6
    assert one.keys() == two.keys() and ends[1].bytes == ends[2].bytes
