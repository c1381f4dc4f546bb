"""CEFHRI is FedAvg of adapters along time: the same on both engines, and refused where it would be something else."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.edge import frozen_encoder, order_federation
from evidence.rigs.trials import Trial
from fedllm.core.errors import CompositionError
from fedllm.core.payload import add, scale, sub
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space


def trial(method="cefhri", kind=Vectorized, space="st_adapter", **knobs):
    fed = order_federation(3, clients=3, rows=12)
    model = Model(frozen_encoder(3, blind=True).double(), None, "classification", make_space(space, size=4, **knobs),
                  labels=fed.labels, seed=3, fast_kernels=False)
    spec = LocalSpec(optimizer="sgd", lr=0.1, momentum=0.9, steps=3, batch_size=4)
    return Trial(method, World(model, fed, spec, 3), {}, kind)


def test_engines_agree_and_it_is_the_weighted_mean_of_its_clients(gap):
    one, other = (trial(kind=k).rounds(2) for k in (InProcess, Vectorized))
    assert gap(one.state["theta"], other.state["theta"]) < 1e-10
    made = trial()
    alone = [trial() for _ in range(3)]
    for k, run in enumerate(alone):  # each client by itself moves the model to where it ends
        run.world.federation = type(run.world.federation)(
            {c: s for i, (c, s) in enumerate(made.world.federation.clients.items()) if i == k}, [], "classification",
            made.world.federation.labels)
        run.rounds(1)
    start, want = made.state["theta"], made.state["theta"]
    for run in alone:
        want = add(want, scale(sub(run.state["theta"], start), 1 / 3))
    assert gap(made.rounds(1).state["theta"], want) < 1e-6


def test_without_position_embeddings_only_the_adapter_along_time_sees_order():
    """A permutation of the frames changes nothing for a plain adapter, whatever its weights, and much for ours."""
    g = torch.Generator().manual_seed(0)
    for space, blind in (("adapter", True), ("st_adapter", False)):
        run = trial(space=space, method="fedavg")
        model, row = run.world.model, run.world.federation.test[0]
        theta = {n: (t + 0.3 * torch.randn(t.shape, generator=g)).double() for n, t in model.initial().items()}
        from fedllm.data.encode import Encoded
        from fedllm.models.batch import collate

        batch = collate([[row, Encoded(row.ids[::-1].copy(), row.labels, 1)]], 0, model.device)
        with torch.no_grad(), model.using([theta]):
            a, b = model.class_logits(batch)
        assert torch.allclose(a, b, atol=1e-9) == blind


def test_other_spaces_and_tasks_are_refused(begin):
    with pytest.raises(CompositionError, match="not the space 'lora'; use the space 'st_adapter'"):
        make_method("cefhri").check(begin("fedavg").world.model)
    with pytest.raises(CompositionError, match="recognizes classes, and the task is 'generation'"):
        make_method("cefhri").check(begin("fedavg", space="st_adapter").world.model)
