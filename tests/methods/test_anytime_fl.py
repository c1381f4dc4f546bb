"""Anytime FL: exits see no block behind them, blocks behind an exit do not run, and what crosses is alike for all."""

import math

import pytest
import torch
import torch.nn.functional as F

from fedllm.core.client import SERVER
from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.payload import part
from fedllm.core.program import drive
from fedllm.methods._exits import logits
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.emulator import blocks_of
from fedllm.models.exits import depth_of, states, walk
from tests.methods.conftest import begin
from tests.methods.test_fed_rag import Tape

TASK = {"task": "classification", "dtype": torch.float64}


def world(**knobs):
    return begin("anytime_fl", engine="in_process", width=4, **TASK, **knobs)


def random_theta(d=8, w=3, classes=3):
    g = torch.Generator().manual_seed(0)
    made = {"q": (d, w), "k": (d, w), "v": (d, w), "o": (w, d), "head": (d, classes), "bias": (classes,)}
    return {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in made.items()}


def test_the_adapter_in_closed_form():
    theta, c = random_theta(), torch.randn(2, 3, 8, dtype=torch.float64)
    z, u = logits(theta, c), F.layer_norm(c, (8,))
    for i in range(3):
        mine = u[:, i] @ theta["q"]
        score = torch.stack([(mine * (u[:, j] @ theta["k"])).sum(-1) for j in range(i + 1)], 1) / 3**0.5
        a = sum(score.softmax(1)[:, j, None] * (u[:, j] @ theta["v"]) for j in range(i + 1)) @ theta["o"]
        want = F.layer_norm(u[:, i] + a, (8,)) @ theta["head"] + theta["bias"]
        assert torch.allclose(z[:, i], want, atol=1e-12)
        assert torch.allclose(logits(theta, c[:, : i + 1])[:, -1], want, atol=1e-12)  # no block behind it is seen


def test_blocks_behind_an_exit_do_not_run():
    run = world()
    model, ran = run.world.model, []
    for block in blocks_of(model.net):
        block.register_forward_hook(lambda *_: ran.append(1))
    rows = run.world.encoded("c0", "train", model)[:3]
    batch = collate([rows], model.pad, model.device)
    with torch.no_grad(), model.using([{}]):
        both = states(model, batch, 2).view(len(rows), 2, -1)
        full = len(ran)
        one = states(model, batch, 1)
        assert len(ran) - full < full and torch.equal(one, both[:, 0])
        assert torch.allclose(both[:, 1], model.net.pool(states_after(model, batch), batch.mask), atol=1e-12)
        ids = batch.ids[:1, : int(batch.mask[0].sum())]
        ran.clear()
        assert walk(model, ids, torch.ones_like(ids, dtype=torch.bool), lambda x: False) == 1 == len(ran)
    assert depth_of(model) == 2 and not any(p.requires_grad for p in model.net.parameters())


def states_after(model, batch):
    """What the last block gives, before the network's last norm."""
    seen = []
    hook = blocks_of(model.net)[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    model.hidden(batch)
    hook.remove()
    if len(seen) == 1:
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    pytest.skip("the network takes rows of one length at a time")


def test_the_rule_ends_an_answer():
    z = torch.tensor([[0.0, 0.1, 0.0], [0.0, 3.0, 0.0], [0.0, 9.0, 0.0]])
    ends = lambda **knobs: make_method("anytime_fl", **knobs).stop(z)  # noqa: E731
    assert (ends(threshold=0.3), ends(threshold=0.8), ends(threshold=0.99), ends(threshold=1.0)) == (1, 2, 3, 3)
    assert ends(exit_by="patience", patience=2) == 2 and ends(exit_by="budget", budget=1) == 1
    assert ends(exit_by="entropy", threshold=0.5) == 2
    p = z[1].softmax(-1)
    assert ends(exit_by="entropy", threshold=float(-(p * p.log()).sum()) + 1e-6) == 2 and math.isfinite(float(p[0]))


def test_what_crosses_is_alike_whatever_the_depth():
    tape = Tape()
    run = begin("anytime_fl", engine="in_process", width=4, layers=(tape,), depths=(1, 2), **TASK).go(2)
    sizes = {tuple((n, tuple(t.shape)) for n, t in sorted(part(r, "delta").items())) for _, fn, r in tape.sent}
    assert len(sizes) == 1 and dict(next(iter(sizes)))["q"] == (16, 4)
    memory = run.engine.memory
    assert memory["c0"]["states/1"].shape[1:] == (1, 16) and memory["c1"]["states/2"].shape[1:] == (2, 16)
    assert any(t.abs().sum() > 0 for n, t in run.state["theta"].items() if n in ("o", "head"))


@pytest.mark.parametrize("knobs", [{"threshold": 1.0}, {"exit_by": "budget", "budget": 1}, {"threshold": 0.35}])
def test_an_answer_is_what_the_test_says_of_it(knobs):
    """At threshold 1 that of full depth; the blocks that ran are those that it says."""
    run = world(**knobs).go(2)
    rows, method = run.world.federation.test, run.method
    out = [ask(run, row["text"]) for row in rows]
    depths = [int(d.depth) for d in out]
    right = [d.answer == str(run.world.model.labels[row["label"]]) for d, row in zip(out, rows, strict=True)]
    got = drive(method.examine(run.state, run.world.infos(), rows), run.engine)
    assert got["early_accuracy"] == pytest.approx(sum(right) / len(right))
    assert got["share_of_blocks"] == pytest.approx(sum(depths) / len(depths) / 2)
    if knobs.get("threshold") == 1.0:
        assert set(depths) == {2} and got["early_accuracy"] == got["accuracy"]
    if "budget" in knobs:
        assert set(depths) == {1}


def ask(run, text):
    run.engine.begin(9)
    return drive(run.method.answer(text, run.world.infos(), state=run.state), run.engine, run.engine.stack[1:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match=r"AnytimeFL\.depths = \(0,\) is not allowed"):
        make_method("anytime_fl", depths=(0,))
    run = world()
    with pytest.raises(RecipeError, match=r"method\.depths, method\.budget: 3 blocks, and the model has 2"):
        make_method("anytime_fl", depths=(3,)).check(run.world.model)
    with pytest.raises(ModelError, match=r"data\.task = 'generation': early exits read pooled states"):
        make_method("anytime_fl").check(begin("fedavg").world.model)
    assert SERVER not in run.world.federation.clients
