"""ZooPFL: the code's gradient against autograd, what is frozen, what never leaves, and every call counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evidence.claims import known_rigs
from fedllm.core.ask import Ask
from fedllm.core.errors import BudgetSpent, CompositionError, ModelError, RecipeError
from fedllm.core.program import drive
from fedllm.local.forward import run_outputs
from fedllm.local.requests import Limits, Outputs
from fedllm.methods._surgery import directions, embedded, exact, fresh, read, row_losses, slopes, surgery
from fedllm.methods.registry import make_method
from fedllm.models.sealed import sealed

ZOO = {"task": "classification", "pretrain_rounds": 1, "pretrain_steps": 5, "code_dim": 4, "embed_dim": 2, "batch": 3}


def box(said):
    """A quadratic stand-in for a box: logits of the mean and the first embedding."""
    return torch.stack([x.mean(0)[:3] ** 2 + x[0][:3] for x in said])


@pytest.fixture
def small():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=rng).double()  # noqa: E731
    theta = {"q.weight": draw(4, 5), "q.bias": draw(4), "s.weight": draw(5, 6), "s.bias": draw(5)}
    x = [draw(t, 5) for t in (3, 6, 2)]
    return theta, x, torch.tensor([0, 2, 1]), {**exact(fresh(2, 3)), "e": draw(2)}


@pytest.mark.parametrize("how", ["cge", "rge"])
def test_differences_give_each_row_its_own_gradient(small, how):
    theta, x, y, own = small
    u = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    text = [surgery([r], theta, own["e"], move)[0] for r, move in zip(x, u, strict=True)]
    (true,) = torch.autograd.grad(row_losses(box(text), y, own).sum(), u)
    v = directions(how, 6, np.random.default_rng(0))
    losses = torch.stack([row_losses(box(surgery(x, theta, own["e"], m)), y, own)
                          for m in torch.cat([1e-3 * v, -1e-3 * v])])
    got = slopes(how, losses, v, 1e-3)
    wanted = true if how == "cge" else true @ v.T @ v / 6  # mean_d <g, v_d> v_d
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_the_encoders_step_is_backprop_through_it(small):
    """dz^T mean_t x_t is J_q^T g of the mean codes; autograd through q alone gives the same."""
    theta, x, _, _ = small
    w, b = (theta[n].clone().requires_grad_() for n in ("q.weight", "q.bias"))
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    codes = torch.stack([F.linear(r, w, b).mean(0) for r in x])
    wanted = torch.autograd.grad((codes * g).sum() / 3, (w, b))
    assert torch.allclose(g.T @ torch.stack([r.mean(0) for r in x]) / 3, wanted[0], atol=1e-6)
    assert torch.allclose(g.mean(0), wanted[1], atol=1e-6)


def test_the_reading_is_trained_by_its_true_gradient():
    rng = torch.Generator().manual_seed(2)
    said, y = torch.randn(7, 3, generator=rng), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    got, first = read(said, y, exact(fresh(2, 3)), 0.3, 4)
    w, b = torch.eye(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    sgd = torch.optim.SGD([w, b], 0.3)
    for step in range(4):
        sgd.zero_grad()
        loss = F.cross_entropy(said @ w.T + b, y)
        assert step or first == pytest.approx(float(loss.detach()), abs=1e-6)
        loss.backward()
        sgd.step()
    assert torch.allclose(got["H.weight"].float(), w, atol=1e-6) and torch.allclose(got["H.bias"].float(), b, atol=1e-6)


def test_outputs_of_embeddings_are_the_models_own(begin):
    """Padding, order and lots change nothing, and a text's own embeddings give its own logits."""
    run = begin("zoopfl", **ZOO)
    model, rows = run.world.model, [*run.world.encoded("c3", "train"), *run.world.encoded("c0", "train")]
    texts = embedded(rows, model.words)
    [got] = run_outputs([Outputs("c", model, {}, None, texts)], Limits())
    with torch.no_grad(), model.using([{}]):
        for row, z in zip(rows, got, strict=True):
            ids = torch.from_numpy(row.ids).long()[None].to(model.device)
            h = model.net.body(input_ids=ids).last_hidden_state
            assert torch.allclose(model.net.classifier(h.mean(1))[0].cpu(), z, atol=1e-6)
    one, other = run_outputs([Outputs("a", model, {}, None, texts[:4]), Outputs("b", model, {}, None, texts[4:])],
                             Limits(batch_tokens=9))
    assert torch.allclose(torch.cat([one, other]), got, atol=1e-9)


def test_the_box_is_never_differentiated_and_every_call_is_counted(begin, monkeypatch):
    run, rows = begin("zoopfl", **ZOO), []
    original = run.world.model.outputs

    def counted(embeds, mask):
        assert torch.is_inference_mode_enabled() and not embeds.requires_grad
        rows.append(len(embeds))
        return original(embeds, mask)

    monkeypatch.setattr(run.world.model, "outputs", counted)
    run.go(1)
    assert not rows and run.state["queries"]["calls"] == 0  # the first rounds ask nothing
    run.go(2)
    assert run.state["queries"]["calls"] == sum(rows) == 2 * 4 * 2 * 3 * (2 * 6 + 1)
    assert run.method.calls(9) == 2 * 3 * 13
    assert run.method.report(run.state)["queries_per_row_and_step"] == 13
    with pytest.raises(ModelError, match="'classifier' cannot be reached"):
        sealed(run.world.model).classifier  # noqa: B018


def test_own_code_and_reading_never_leave_and_the_decoder_stays(begin):
    run = begin("zoopfl", **ZOO).go(1)
    frozen = {n: t.clone() for n, t in run.state["theta"].items()}
    run.engine.begin(1)
    msgs = {c.id: run.method.down(run.state, c) for c in run.world.infos()}
    out = drive((lambda: (yield Ask(run.method.local, msgs, reduce=Every())))(), run.engine)
    run.go(3)
    assert {n for m in msgs.values() for n in m} == {f"theta/{p}.{n}" for p in "qs" for n in ("weight", "bias")}
    assert set(out.value) == {"theta/q.weight", "theta/q.bias", "n", "loss"}
    now = run.state["theta"]
    assert all(torch.equal(now[n], frozen[n]) for n in ("s.weight", "s.bias"))
    assert not torch.equal(now["q.weight"], frozen["q.weight"])
    own = run.engine.memory
    assert all(set(m) == {"e", "H.weight", "H.bias"} for m in own.values())
    assert not torch.equal(own["c0"]["e"], own["c1"]["e"]) and float(own["c0"]["e"].abs().max()) > 0
    shared = begin("zoopfl", **ZOO, personal=False).go(3)
    assert "e" in shared.state["theta"] and not any(shared.engine.memory.values())


class Every:
    """Keeps the last reply as it came."""

    def zero(self):
        return {}

    def add(self, acc, reply):
        return dict(reply)

    def done(self, acc):
        return acc


def test_it_scores_with_what_is_its_own(begin):
    run = begin("zoopfl", **ZOO).go(3)
    scores = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)
    rows, model, own = run.world.encoded("c2", "test"), run.world.model, run.engine.memory["c2"]
    own, zero = exact(own), torch.zeros(6).double()
    texts = surgery(embedded(rows, model.words), exact(run.state["theta"]), own["e"], zero)
    [said] = run_outputs([Outputs("c2", model, {}, None, texts)], Limits())
    z = said @ own["H.weight"].T + own["H.bias"]
    y = torch.tensor([r.labels for r in rows])
    assert scores["c2"]["loss"] == pytest.approx(float(F.cross_entropy(z, y)), abs=1e-6)
    assert scores["c2"]["accuracy"] == pytest.approx(float((z.argmax(1) == y).double().mean()))


def test_coordinates_point_as_the_gradient_and_random_directions_less():
    got = known_rigs()["code_gradient"]("zoopfl", 0)
    assert got["coordinates"] >= 0.99 and got["nearer"] > 0.1


def test_a_budget_ends_it(begin):
    run = begin("zoopfl", **ZOO, budget=700).go(3)
    assert run.state["queries"]["calls"] == 624
    with pytest.raises(BudgetSpent, match="624 of the budget of 700 are spent"):
        run.go()


@pytest.mark.parametrize("knobs", [{"code_dim": 0}, {"embed_dim": 0}, {"h": 0.0}, {"h": -1e-3}, {"estimator": "luck"},
                                   {"steps": 0}, {"pretrain_rounds": 0}, {"lr_head": 0.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match="is not allowed; it must be"):
        make_method("zoopfl", **knobs)


def test_a_generation_task_is_refused(begin):
    with pytest.raises(CompositionError, match=r"use data\.task = 'classification'"):
        begin("zoopfl")
