"""FedGFPT: bytes, monotone search, no autograd, copies that stay the same, and a LASSO that is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.core.ask import Ask
from fedllm.core.errors import BudgetSpent, CompositionError, PayloadError, RecipeError, Withheld
from fedllm.core.payload import tensor_bytes
from fedllm.core.program import drive
from fedllm.local.forward import run_probes
from fedllm.local.requests import Probe
from fedllm.methods._blackbox import Meter
from fedllm.methods._token_prompt import NAME, held, moved, nearest, short, sparse, stamp, whole
from fedllm.methods.registry import make_method

GF = {"space": "soft_prompt", "space_knobs": {"length": 5}, "search_steps": 6, "n_candidates": 4, "batch": 4, "phi": 3}


def asked(run, fn=None, clients=None):
    """What each client is sent, and what it answers, in a round that does not count."""
    infos = [c for c in run.world.infos() if clients is None or c.id in clients]
    msgs = {c.id: run.method.down(run.state, c) for c in infos}
    run.engine.begin(run.t + 1)
    out = drive((lambda: (yield Ask(fn or run.method.local, msgs)))(), run.engine)
    return msgs, out


def test_two_bytes_a_place_go_up_and_four_a_token_come_down(begin):
    run = begin("fed_gfpt", **GF)
    run.t = -1
    msgs, out = asked(run)
    assert {tensor_bytes(m) for m in msgs.values()} == {0}  # all know the first prompt
    assert {tensor_bytes(out[c]) for c in out} == {2 * 5}
    msgs, out = asked(run.go(2))
    assert {tensor_bytes(m) for m in msgs.values()} == {4 * 5 * 3}
    assert {tensor_bytes(out[c]) for c in out} == {2 * 5}


def test_ids_take_32_bits_where_16_do_not_do():
    ids = torch.tensor([0, 1, 32_767, 32_768, 65_535])
    assert short(ids, 65_536).dtype == torch.int16 and torch.equal(whole(short(ids, 65_536), 5, 65_536), ids)
    more = torch.tensor([65_536, 99_999])
    assert short(more, 100_000).dtype == torch.int32 and torch.equal(whole(short(more, 100_000), 2, 100_000), more)


@pytest.mark.parametrize("ids", [torch.tensor([1, 2, 64]), torch.tensor([1, 2]), torch.tensor([1, 2, -3])])
def test_ids_that_cannot_be_are_refused(ids):
    with pytest.raises(PayloadError, match=r"allowed are 3, each below 64"):
        whole(ids, 3, 64)


@pytest.fixture
def losses(monkeypatch):
    """The losses that each client is told, call by call."""
    told, original = {}, Meter.losses

    def watched(self, thetas, rows):
        out = original(self, thetas, rows)
        told.setdefault(self.client.id, []).append(out)
        return out

    monkeypatch.setattr(Meter, "losses", watched)
    return told


def test_the_search_never_takes_a_worse_token(begin, losses):
    run = begin("fed_gfpt", **GF)
    run.t = -1
    _, out = asked(run)
    for client, calls in losses.items():
        assert len(calls) == 1 + 6 and all(len(c) == 4 for c in calls[1:])
        assert out[client]["loss"] == min(map(min, calls)) < calls[0][0]
    losses.clear()
    free = begin("fed_gfpt", **GF, accept="best_candidate")
    free.t = -1
    _, out = asked(free)
    assert all(out[c]["loss"] == min(calls[-1]) for c, calls in losses.items())


def test_what_is_taken_is_the_best_of_the_nearest_tokens(begin, monkeypatch):
    """One step, recomputed through the open model."""
    run = begin("fed_gfpt", **{**GF, "search_steps": 1, "batch": None})
    run.t = -1
    _, out = asked(run, clients=["c1"])
    p, table, model = run.state["prompt"], run.state["table"], run.world.model
    start = nearest(p, table, torch.arange(4, 64))
    ids = whole(out["c1"]["ids"], 5, 64)
    rows = run.world.encoded("c1", "train")
    def loss(prompt):
        [[got]] = run_probes([Probe("c1", model, {NAME: prompt}, None, rows, ({NAME: prompt},))], run.world.limits)
        return got.mean

    assert out["c1"]["loss"] <= loss(p)
    moved_at = (ids != start).nonzero()[:, 0].tolist()
    assert len(moved_at) <= 1
    for t in moved_at:
        cosine = torch.nn.functional.cosine_similarity(table[4:], p[t][None])
        near = cosine.topk(4).indices + 4
        losses = [loss(p.index_put((torch.tensor([t]),), table[j][None])) for j in near]
        assert int(near[int(np.argmin(losses))]) == int(ids[t])
        assert min(losses) == pytest.approx(out["c1"]["loss"], abs=1e-9)


def test_no_autograd_on_a_client_and_nothing_kept_for_it(begin, monkeypatch):
    run, rows, kept = begin("fed_gfpt", **GF), [], []
    original = run.world.model.row_losses

    def counted(batch):
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        got = original(batch)
        rows.append(int((got[1] > 0).sum()))
        return got

    monkeypatch.setattr(run.world.model, "row_losses", counted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run.go(2)
    assert not kept
    assert run.state["queries"]["calls"] == sum(rows) == 2 * 4 * 4 * (4 * 6 + 1) and run.method.calls(9) == 4 * 25


def test_copies_are_the_servers_after_twenty_rounds(begin, gap):
    run = begin("fed_gfpt", **{**GF, "search_steps": 2}).go(20)
    msgs, _ = asked(run)
    assert all("prompt" not in m for m in msgs.values())
    run.engine.commit()
    for client in ("c0", "c1", "c2", "c3"):
        kept = run.engine.memory[client]
        assert kept["version"] == 20 and torch.equal(kept["prompt"], run.state["prompt"])
    assert gap({"p": run.state["prompt"]}, {"p": run.world.model.initial()[NAME].float()}) > 0


def test_who_missed_a_round_gets_the_whole_prompt(begin):
    run = begin("fed_gfpt", **GF).go(1).go(2, ["c0", "c1", "c2"])
    msgs, out = asked(run)
    assert tensor_bytes(msgs["c3"]) == run.state["prompt"].numel() * 4 and tensor_bytes(msgs["c0"]) == 4 * 5 * 3
    assert len(out.answered) == 4


def test_a_copy_that_is_another_answers_nothing_and_is_mended(begin):
    run = begin("fed_gfpt", **GF).go(2)
    run.engine.memory["c2"]["prompt"] = run.engine.memory["c2"]["prompt"] + 1e-3
    run.go(1)
    assert "c2" not in run.state["at"] and run.state["at"]["c1"] == 2
    msgs, out = asked(run)
    assert "prompt" in msgs["c2"] and "prompt" not in msgs["c1"] and len(out.answered) == 4
    call = type("Call", (), {"memory": {}, "model": run.world.model})()
    with pytest.raises(Withheld, match="is not version 7 of the server's"):
        held({"version": 7, "hash": "0" * 16}, call)


def test_the_change_is_what_least_squares_with_a_penalty_gives():
    """Where all coefficients may stay, E^T w solves the LASSO: its optimality conditions, and least squares at 0."""
    rng = torch.Generator().manual_seed(0)
    table, r = torch.randn(6, 9, generator=rng).double(), torch.randn(9, generator=rng).double()
    unit = float(table.pow(2).sum(1).mean())
    ids, w = sparse(r, table, 6, 0.0)
    exact = torch.linalg.lstsq(table.T, r).solution
    assert torch.allclose(w.double(), exact[ids], atol=2e-3)
    ids, w = sparse(r, table, 6, 0.2)
    full = torch.zeros(6).double().scatter(0, ids, w.double())
    slope = 2 * table @ (table.T @ full - r)  # of the squared error
    for g, x in zip(slope, full, strict=True):
        assert abs(g + 0.2 * unit * torch.sign(x)) < 0.05 if x != 0 else abs(g) <= 0.2 * unit + 0.05
    two, kept = sparse(r, table, 2, 0.2)
    assert set(two.tolist()) == set(full.abs().topk(2).indices.tolist()) and kept.dtype == torch.float16
    assert float(sparse(r, table, 6, 1e6)[1].abs().max()) == 0


def test_the_server_moves_by_the_mean_of_the_tokens(begin):
    """With no penalty and enough tokens p' becomes mean_k E[ids_k]."""
    run = begin("fed_gfpt", **{**GF, "phi": 60, "lasso_alpha": 0.0})
    run.t = -1
    _, out = asked(run)
    wanted = run.state["table"][torch.stack([whole(out[c]["ids"], 5, 64) for c in out])].mean(0)
    got = run.method.merge(run.state, out)["prompt"]
    assert torch.allclose(got, wanted, atol=2e-3)
    same = moved(torch.zeros(1, 16), torch.tensor([[3, 5]]), torch.tensor([[1.0, -2.0]]).half(), run.state["table"])
    assert torch.allclose(same[0], run.state["table"][3] - 2 * run.state["table"][5])
    assert stamp(got) != stamp(wanted + 1)


def test_clients_end_with_prompts_of_their_own(begin, gap):
    runs = [begin("fed_gfpt", engine=e, **GF, tune_after=2, generations=2, popsize=4, intrinsic_dim=6).go(4)
            for e in ("in_process", "vectorized")]
    one, other = runs
    wire = [e for e in other.engine.record.events if e["kind"] == "wire" and "personal" in e["phase"]]
    down = {e["bytes"] for e in wire if e["direction"] == "down" and e["round"] == 3}
    assert max(down) < 256 and max(e["bytes"] for e in wire if e["direction"] == "up") < 256  # the ledger alone
    assert torch.equal(other.state["prompt"], begin("fed_gfpt", **GF).go(2).state["prompt"])
    means = [m["search"]["mean"] for m in other.engine.memory.values()]
    assert not torch.equal(means[0], means[1])
    for mine, its in zip(one.engine.memory.values(), other.engine.memory.values(), strict=True):
        assert gap({"m": mine["search"]["mean"]}, {"m": its["search"]["mean"]}) < 1e-10
    scores = drive(other.method.evaluate(other.state, other.world.infos(), "local"), other.engine)
    shared = drive(runs[1].method.evaluate(other.state, other.world.infos(), "local"),
                   begin("fed_gfpt", **GF).engine)
    assert all(scores[c]["loss"] != shared[c]["loss"] for c in scores)


def test_a_budget_ends_it(begin):
    run = begin("fed_gfpt", **GF, budget=700).go()
    with pytest.raises(BudgetSpent, match="400 of the budget of 700 are spent"):
        run.go()


@pytest.mark.parametrize("knobs", [{"n_candidates": 0}, {"search_steps": 0}, {"lasso_alpha": -0.1}, {"phi": 0},
                                   {"accept": "never"}, {"popsize": 3}, {"tune_after": -1}, {"batch": 0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match="is not allowed; it must be"):
        make_method("fed_gfpt", **knobs)


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(CompositionError, match="soft_prompt"):
        begin("fed_gfpt")
    for knob, most in (("n_candidates", 60), ("phi", 64)):
        with pytest.raises(CompositionError, match=rf"{knob} = {most + 1} is not allowed; it must be <= {most}"):
            begin("fed_gfpt", **{**GF, knob: most + 1})
    with pytest.raises(CompositionError, match=r"intrinsic_dim = 81 is not allowed; it must be <= 80"):
        begin("fed_gfpt", **GF, tune_after=0, intrinsic_dim=81)
