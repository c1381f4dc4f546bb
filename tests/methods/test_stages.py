"""What is trained changes by the round: SLoRA's two stages, LP-FL's growing labels, ChainFed's window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evidence.rigs.chain import chain_memory
from evidence.rigs.trials import best_of_rank
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.payload import part
from fedllm.local.objectives.chain import Chain
from fedllm.methods.efficiency.chainfed import cka
from fedllm.methods.efficiency.slora import dense
from fedllm.methods.registry import make_method, method_class
from fedllm.models.batch import collate
from fedllm.models.emulator import blocks_of
from fedllm.spaces.lora import factors

SPACES = {"sparse": {"name": "mask", "choose": "random", "density": 0.2}, "lora": {"name": "lora", "rank": 4}}
TWO = {"space": "streams", "space_knobs": {"of": SPACES}}


def test_slora_starts_with_the_best_of_what_the_sparse_stage_came_to(begin):
    run = begin("slora", stage1_rounds=2, **TWO).go(1)
    assert set(run.state["theta"]) == {n for n in run.state["theta"] if n.startswith("sparse/")}  # no head here
    sparse = {n: x for n, x in part(run.go(0).state["theta"], "sparse").items()}
    before = run.engine.record.totals()["up"]
    run.go(1)
    assert all(n.startswith("lora/") for n in run.state["theta"]) and run.engine.record.totals()["up"] > before
    assert any(bool(x.any()) for x in sparse.values())
    again = begin("slora", stage1_rounds=3, **TWO).go(2).state["theta"]  # the same two rounds, not yet primed
    s = run.state["scale"]
    for path, (b, a) in factors(part(run.state["theta"], "lora")).items():
        site = run.state["sites"][f"{path}.weight"]
        d = dense(again[f"sparse/{path}.weight.sparse_delta"], site)
        assert int((d != 0).sum()) <= len(site["at"])  # entries that are not in the mask did not move
        assert torch.allclose(s * b @ a, best_of_rank(d, 4), atol=1e-10)
    first = run.state["theta"]
    assert any(not torch.equal(x, first[n]) for n, x in run.go(1).state["theta"].items())


@pytest.mark.parametrize(("space", "says"), [
    ({"space": "lora", "space_knobs": {"rank": 4}}, r"'slora' and space 'lora' do not fit together"),
    ({**TWO, "space_knobs": {"of": {**SPACES, "lora": {"name": "lora", "rank": 4, "targets": ["q_proj"]}}}},
     "change other modules")])
def test_slora_needs_both_streams_over_the_same_modules(begin, space, says):
    with pytest.raises(CompositionError, match=says):
        begin("slora", **space)


def test_lp_fl_accepts_more_each_round_and_the_surest_first():
    method = make_method("lp_fl", u0=0.25, growth=2.0)
    z = np.random.default_rng(0).normal(size=(40, 2))
    kept = [set(method.accepted(z, t)) for t in range(4)]
    assert kept[0] < kept[1] < kept[2] == kept[3] == set(range(40))
    said, sure = z.argmax(1), np.abs(z[:, 0] - z[:, 1])
    for c in (0, 1):  # of each label its share, and nobody less sure than who was left out
        mine = np.flatnonzero(said == c)
        taken = sorted(kept[1] & set(mine))
        assert len(taken) == int(np.ceil(0.5 * len(mine)))
        assert min(sure[taken]) >= max(sure[[i for i in mine if i not in kept[1]]])


def test_lp_fl_without_soft_labels_is_training_on_the_labelled_rows(begin, gap):
    """beta = 0 counts labelled rows alone, and a client without any changes nothing."""
    words = method_class("lp_fl").trial.knobs["verbalizer"]
    few = begin("lp_fl", verbalizer=words, labelled=3, beta=0.0).go(1)
    soft = begin("lp_fl", verbalizer=words, labelled=3, u0=1.0).go(1)
    assert few.state["share"] == 0.0 and soft.state["share"] == pytest.approx(1.0)
    assert gap(few.state["theta"], soft.state["theta"]) > 0
    start = begin("lp_fl", verbalizer=words, labelled=3, u0=0.0)
    assert gap(start.go(1).state["theta"], few.state["theta"]) < 1e-12


def test_lp_fl_refuses_words_that_are_no_labels(begin):
    with pytest.raises(CompositionError, match=r"needs two words"):
        begin("lp_fl", verbalizer=("w1", "w1"))
    with pytest.raises(CompositionError, match=r"data.task = 'generation'"):
        begin("lp_fl", task="classification")
    with pytest.raises(DataError, match=r"'w1 w2' is 2 tokens"):
        begin("lp_fl", verbalizer=("w1 w2", "w3")).go(1)
    with pytest.raises(DataError, match=r"none of method.verbalizer"):
        begin("lp_fl", verbalizer=("w1", "w2")).go(1)


ADAPTER = {"space": "adapter", "space_knobs": {"size": 4}}


def test_chainfed_with_all_blocks_at_once_is_fedavg_of_adapters(begin, gap):
    whole = begin("chainfed", window=2, gpo_lambda=0.0, cka_threshold=1.0, **ADAPTER).go(2)
    assert gap(whole.state["theta"], begin("fedavg", **ADAPTER).go(2).state["theta"]) < 1e-10


def test_chainfed_moves_on_by_a_block_and_wraps(begin):
    run = begin("chainfed", window=1, cka_threshold=1.0, **ADAPTER)
    info = run.world.infos()[0]
    for t, block in enumerate((0, 1, 0)):
        before, msg = run.state["theta"], run.method.down({**run.state, "first": 0}, info)
        assert msg["j"] == block
        told = {n for n in part(msg, "theta")}
        assert all(f".{block}." in n for n in told) or t > 0  # later ones also bring what the last window left behind
        after = run.go(1).state["theta"]
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert moved and all(f".{block}." in n for n in moved)


def test_chainfed_runs_no_block_beyond_its_window(begin):
    run = begin("chainfed", **ADAPTER)
    model, calls = run.world.model, []
    hooks = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(blocks_of(model.net))]
    batch = collate([run.world.encoded("c0", "train")[:2]], model.pad, torch.device("cpu"))
    theta = {n: t.requires_grad_() for n, t in model.initial().items()}
    with model.using([theta], stacked={n: t[None] for n, t in theta.items()}):
        loss = Chain(0, 1, 0.2).losses(model, batch, {})[0].sum()
    assert calls == [0]
    loss.backward()
    assert all(t.grad is not None for n, t in theta.items() if ".1." in n)  # its adapter is in the way all the same
    for hook in hooks:
        hook.remove()


def test_chainfed_keeps_a_share_of_the_memory():
    got = chain_memory("chainfed", 0)
    assert got["share"] <= 3 / 8


def test_cka_is_one_up_to_a_rotation_and_falls():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert cka(x, 3 * x @ q + 1) == pytest.approx(1.0) and cka(x, rng.normal(size=(50, 6))) < 0.5


def test_chainfed_refuses_what_it_cannot_cut(begin):
    with pytest.raises(CompositionError, match=r"the space 'adapter'"):
        begin("chainfed")
    with pytest.raises(RecipeError, match=r"window = 3 is not allowed; it must be <= 2"):
        begin("chainfed", window=3, **ADAPTER)
