"""An update told by inputs: the replay's own arithmetic, that both sides end alike, what is sent and refused."""

import pytest
import torch

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.payload import pack, part
from fedllm.local.unrolled import cosine, replayed, told_by_inputs
from fedllm.methods.registry import make_method
from tests.methods.conftest import begin

KNOBS = {"n_syn": 2, "length": 3, "inner_steps": 2, "outer_steps": 3, "task": "classification"}


def inputs(model, m=2, t=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    d = model.net.get_input_embeddings().weight.shape[1]
    return (torch.randn((m, t, d), generator=draw, dtype=torch.float64),
            torch.randn((m, 3), generator=draw, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))


def test_a_replay_is_gradient_descent_on_the_inputs_with_their_soft_labels():
    run = begin("fed_synth_upload", **KNOBS)
    model, theta = run.world.model, run.state["theta"]
    x, y, a = inputs(model)
    want = {n: t.clone() for n, t in theta.items()}
    for _ in range(2):
        w = {n: t.clone().requires_grad_() for n, t in want.items()}
        with model.using([w]):
            z = model.outputs(x, torch.ones(2, 3, dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(z, y.softmax(-1))
        grads = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
        want = {n: (t if g is None else t - a.exp() * g).detach() for (n, t), g in zip(w.items(), grads, strict=True)}
    got = replayed(model, theta, x, y, a, 2)
    assert max(float((got[n] - t).abs().max()) for n, t in want.items()) < 1e-12
    assert any(not got[n].equal(t) for n, t in theta.items())


def test_inputs_are_found_that_lead_where_others_did():
    run = begin("fed_synth_upload", space="full", **KNOBS)
    model, theta = run.world.model, run.state["theta"]
    x, y, a = inputs(model, seed=1)
    end = replayed(model, theta, x, y, a, 2)
    update = {n: end[n] - t for n, t in theta.items()}
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    none, some = (told_by_inputs(model, theta, update, (2, 3, 16), 3, 2, tries, 0.1, g)
                  for tries, g in zip((1, 40), draws, strict=True))
    assert some[3] > none[3] + 0.1 and some[3] > 0.6
    assert some[3] == pytest.approx(cosine(replayed(model, theta, *some[:3], 2), theta, update))


def test_the_server_ends_where_the_clients_replays_do():
    run = begin("fed_synth_upload", engine="in_process", **KNOBS)
    sent, work = {}, run.engine.work

    def seen(job, submit):
        reply = work(job, submit)
        if job.client != SERVER:
            sent[job.client] = reply
        return reply

    run.engine.work = seen
    w = run.state["theta"]
    run.go(1)
    n = {c.id: c.n for c in run.world.infos()}
    ends = {c: replayed(run.world.model, w, r["x"], r["y"], r["a"], 2) for c, r in sent.items()}
    for name, t in run.state["theta"].items():
        mean = sum(n[c] / sum(n.values()) * (e[name] - w[name]) for c, e in ends.items())
        assert torch.allclose(t, w[name] + mean, atol=1e-12)
    for reply in sent.values():
        assert {k for k, v in reply.items() if isinstance(v, torch.Tensor)} == {"x", "y", "a"}
        assert reply["x"].shape == (2, 3, 16) and reply["y"].shape == (2, 3)


def test_other_shapes_and_tasks_are_refused():
    method = make_method("fed_synth_upload", n_syn=2, length=3)
    good = {"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 5), "a": torch.tensor(-1.0)}
    method.fits({}, good)
    for bad in ({"x": torch.zeros(3, 3, 4)}, {"y": torch.zeros(3, 5)}, {"a": torch.tensor(9.0)}):
        with pytest.raises(PayloadError):
            method.fits({}, {**good, **bad})
    with pytest.raises(CompositionError, match="soft labels"):
        method.check(begin("fedavg").world.model)
    assert part(pack(theta={"w": torch.zeros(1)}), "theta")
