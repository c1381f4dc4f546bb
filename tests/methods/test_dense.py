"""DENSE: mixtures that are words are read as these words, the losses are what they say, and one round is all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedllm.core.client import Profile
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.engines.vectorized import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.local.synthesize import Making, Teacher, ensemble, read, synthesized
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space
from tests.methods.conftest import KINDS, Run, federation, net_for, tokenizer

KNOBS = {"epochs": 1, "g_steps": 2, "distill_steps": 2, "batch": 4, "length": 4, "words": 16}
HOW = Making(3, 4, 8, 8, 5, 64, 1.0, 1.0, 1.0, False)


def model(space="full", seed=0):
    return Model(net_for("classification", torch.float64), tokenizer(), "classification", make_space(space),
                 labels=KINDS, seed=seed, fast_kernels=False)


def moved(tree, by, seed):
    draw = torch.Generator().manual_seed(seed)
    return {n: t + by * torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in tree.items()}


@pytest.mark.parametrize("space", ["full", "lora"])
def test_mixtures_of_one_word_each_are_these_words(begin, space):
    net = model(space)
    rows = begin("fedavg", task="classification").world.encoded("c0", "train")
    row = max(rows, key=lambda r: len(r.ids))
    trees = [moved(net.initial(), 0.1, s) for s in (1, 2)]
    at = torch.arange(64)
    soft = F.one_hot(torch.from_numpy(row.ids).long(), 64).double()[None]
    pooled, z = read(net, trees, at, soft)
    for i, tree in enumerate(trees):
        with torch.no_grad(), net.using([tree]):
            batch = collate([[row]], net.pad, net.device)
            assert z[i].tolist()[0] == pytest.approx(net.class_logits(batch)[0].tolist(), abs=1e-10)
            assert torch.allclose(pooled[i], net.net.pool(net.hidden(batch), batch.mask))
    some = torch.tensor([5, 9, 40])  # of a few words alone
    few = F.one_hot(torch.tensor([[0, 2, 1]]), 3).double()
    whole = F.one_hot(torch.tensor([[5, 40, 9]]), 64).double()
    assert torch.allclose(read(net, trees, some, few)[1], read(net, trees, at, whole)[1])


def test_the_ensemble_is_the_mean_over_teachers_of_any_design():
    one, other = model(), model(seed=1)
    other.net.body.layers = other.net.body.layers[:1]
    soft = torch.rand(6, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    at, d = torch.arange(64), 16
    teachers = [Teacher(m, moved(m.initial(), 0.1, s), torch.full((d,), float(s)).double(), torch.ones(d).double())
                for m, s in ((one, 1), (other, 2), (one, 3))]
    says, far = ensemble(teachers, at, soft)
    each = [read(t.model, [t.theta], at, soft) for t in teachers]
    assert torch.allclose(says, torch.stack([z[0] for _, z in each]).mean(0))
    want = sum((r[0].mean(0) - t.mean).norm() + (r[0].var(0) - t.var).norm()
               for (r, _), t in zip(each, teachers, strict=True)) / 3
    assert float(far) == pytest.approx(float(want))


def test_the_student_comes_nearer_to_the_ensemble():
    net = model()
    start = net.initial()
    teacher = Teacher(net, moved(start, 0.3, 5), torch.zeros(16).double(), torch.ones(16).double())
    rng = np.random.default_rng(0)
    spec = LocalSpec(optimizer="adamw", lr=5e-3, steps=1, batch_size=4)
    how = replace(HOW, noise=True, epochs=8, distill_steps=25, batch=32)
    theta, loss = synthesized([teacher], net, start, how, spec, rng)
    soft = F.one_hot(torch.randint(64, (32, 5), generator=torch.Generator().manual_seed(1)), 64).double()
    at = torch.arange(64)
    want = ensemble([teacher], at, soft)[0].log_softmax(-1)
    apart = [float(F.kl_div(read(net, [t], at, soft)[1][0].log_softmax(-1), want, reduction="batchmean",
                            log_target=True)) for t in (start, theta)]
    assert apart[1] < 0.7 * apart[0] and loss >= 0


def mixed(named):
    """A run of which c0 and c2 hold a model of one block, that the recipe names or not."""
    whole, half = model(), model()
    half.net.body.layers = half.net.body.layers[:1]
    fed = federation(task="classification")
    world = World(whole, fed, LocalSpec(optimizer="sgd", lr=0.1, steps=1, batch_size=4), exact_match=False,
                  profiles={c: Profile(model="half") for c in ("c0", "c2")}, held=Shelf({"half": lambda: half}),
                  models=Shelf({"half": lambda: half} if named else {}))
    method = make_method("dense", **KNOBS)
    run = Run(method, Vectorized((method,), world), world)
    run.state = method.init(whole)
    return run


def test_clients_of_two_designs_teach_one_student(gap):
    run = mixed(named=True)
    before = dict(run.state["theta"])
    run.go(1)
    assert gap(run.state["theta"], before) > 1e-4 and run.state["done"]
    up = run.up()
    assert run.go(1).up() == up  # one shot


def test_a_design_that_the_server_does_not_know_teaches_nothing():
    run = mixed(named=False)
    run.go(1)  # c1 and c3 do
    run = mixed(named=False)
    run.world.profiles = {c: Profile(model="half") for c in run.world.federation.clients}
    run.engine = Vectorized((run.method,), run.world)
    with pytest.raises(QuorumError, match=r"no client sent a model of a design that the server knows"):
        run.go(1)


def test_more_than_a_round_and_a_writer_without_an_aim_are_refused():
    with pytest.raises(RecipeError, match=r"rounds = 3 is not allowed with method 'dense'"):
        make_method("dense").check_work(None, 3)
    with pytest.raises(RecipeError, match=r"lambda_oh = lambda_stat = lambda_adv = 0 is not allowed"):
        make_method("dense", lambda_oh=0.0, lambda_stat=0.0, lambda_adv=0.0)
