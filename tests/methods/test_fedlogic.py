"""FedLogic: EM that never loses ground, limits of its two weights, and rules that are tried through an endpoint."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fedllm.cli.serve_model import serving
from fedllm.core.errors import BudgetSpent, CompositionError, PayloadError
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.text import LocalText
from fedllm.methods.inference.fedlogic import floored, posterior, ruled
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Endpoint
from fedllm.models.load import load_model
from fedllm.spaces import make_space

RULES = ("w1", "w2 w3", "w4", "w5 w6 w7")
HERE = {"rules": RULES, "space": "soft_prompt", "space_knobs": {"length": 2}}


def objective(run, tau, l1):
    """J with l2 = 0: sum_i w_i (E_q l / tau - l1 KL(q_i || p))."""
    n = {c.id: c.n for c in run.world.infos()}
    prior, total = run.state["prior"], sum(n.values())
    kept = {c: m for c, m in run.engine.memory.items() if "q" in m}
    return sum(n[c] / total * float((m["q"] * (m["own"] / tau - l1 * (m["q"] / prior).log())).sum())
               for c, m in kept.items())


def test_coordinate_ascent_never_loses_ground(begin):
    run, seen = begin("fedlogic", tau=0.05, kl_prior=0.7, kl_peer=0.0, **HERE), []
    for _ in range(6):
        seen.append(objective(run.go(), 0.05, 0.7))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(seen)) and seen[-1] > seen[0] + 1e-6
    kept = [m["q"] for m in run.engine.memory.values() if "q" in m]
    assert len(kept) == 4 and all(float(q.sum()) == pytest.approx(1) for q in kept)


def test_scores_are_mean_log_likelihoods_of_a_token_under_each_rule(begin):
    run = begin("fedlogic", rows=3, **HERE).go()
    model = run.world.model
    for z, rule in enumerate(RULES):
        coded = run.world.tokenized(ruled(run.world.rows("c1", "train")[:3], rule), True, model)
        [got] = run_losses([Losses("x", model, {}, None, coded)], Limits())
        assert float(run.engine.memory["c1"]["own"][z]) == pytest.approx(-got.mean, abs=1e-9)
    assert run.method.report(run.state)["queries"]["calls"] == 4 * 3 * 4  # rules, rows, clients
    assert sum(run.method.report(run.state)["prior"].values()) == pytest.approx(1)


def test_the_weights_limits_are_the_prior_and_the_best_score_alone():
    own, all_of = torch.tensor([-1.0, -0.5, -2.0]).double(), torch.ones(3, dtype=torch.bool)
    prior = torch.tensor([0.7, 0.1, 0.2]).double()
    assert posterior(own, all_of, prior, prior, 1e9, 0.0).tolist() == pytest.approx(prior.tolist(), abs=1e-6)
    assert float(posterior(own, all_of, prior, prior, 1e-6, 0.0)[1]) == pytest.approx(1, abs=1e-6)
    same = posterior(own, all_of, prior, prior, 0.3, 0.7)  # two equal beliefs are one of their weights' sum
    assert same.tolist() == pytest.approx(posterior(own, all_of, prior, prior, 1.0, 0.0).tolist())
    some = posterior(own, torch.tensor([True, True, False]), prior, prior, 1.0, 0.0)
    assert float(some[2]) == pytest.approx(0.2) and float(some[:2].sum()) == pytest.approx(0.8)
    assert float(floored(torch.tensor([1.0, 0.0]).double()).log().min()) >= math.log(1e-8) - 1e-6


def test_only_the_likeliest_and_some_others_are_scored(begin):
    run = begin("fedlogic", top_k=1, explore=0.0, rows=2, **HERE).go(3)
    assert run.method.report(run.state)["queries"]["calls"] == 3 * 4 * 2  # rounds, clients, rows
    assert all(float(m["seen"].sum()) >= 1 for m in run.engine.memory.values() if "seen" in m)
    spent = begin("fedlogic", budget=10, rows=2, **HERE)
    with pytest.raises(BudgetSpent, match="one more round may take 32 calls"):
        spent.go()


def test_through_an_endpoint_a_rule_counts_by_its_answers(begin):
    with serving(LocalText(begin("fedavg").world.model)) as server:
        run = begin("fedlogic", endpoint=server.base_url, rows=2, max_new_tokens=2, engine="in_process", **HERE).go()
        told = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)
    assert all(-1 <= float(x) <= 0 for m in run.engine.memory.values() for x in m.get("own", []))
    assert set(told["c0"]) == {"n", "loss", "exact_match"} and 0 <= told["c0"]["loss"] <= 1
    spent = run.method.report(run.state)["queries"]
    assert spent["calls"] == 4 * 4 * 2 and spent["read"] > 0
    assert not make_method("fedlogic", endpoint="http://127.0.0.1:9/v1").serves


def test_what_cannot_be_is_refused(begin):
    with pytest.raises(CompositionError, match=r"method.rules: 1 of 2 texts differ"):
        begin("fedlogic", **{**HERE, "rules": ("a", "a")})
    with pytest.raises(CompositionError, match=r"'fedlogic' and data.task = 'classification'"):
        begin("fedlogic", task="classification")
    run = begin("fedlogic", **HERE)
    for q in ([0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0]):
        with pytest.raises(PayloadError, match="is no distribution over 4 rules"):
            run.method.likely({"prior": run.state["prior"]}, {"q": torch.tensor(q)})


@pytest.mark.slow
def test_smollm2_behind_an_endpoint_chooses_a_rule_and_votes_on_wordings():
    """Both inference protocols on a real language model that they reach by text alone."""
    model = load_model("smollm2", "generation", make_space("soft_prompt", length=2))
    rows = [{"prompt": f"Q: What is {a} plus {b}?\nA:", "response": str(a + b)} for a, b in ((2, 3), (4, 1))]
    rules = ("Answer with one number and nothing else.", "Write a poem about the sea.")
    with serving(LocalText(model), "smollm2") as server:
        fed = Federation({c: Shard(rows, rows[:1]) for c in ("c0", "c1")}, (), "generation")
        method = make_method("fedlogic", endpoint=server.base_url, endpoint_model="smollm2", rules=rules, tau=0.1,
                             max_new_tokens=4)
        world = World(model, fed)
        engine = InProcess((method,), world)
        state = drive(method.round(method.init(model), world.infos()), engine)
        told = method.report(state)
        assert told["queries"]["calls"] == 2 * 2 * 2 and sum(told["prior"].values()) == pytest.approx(1)
        far = Endpoint(server.base_url, "smollm2")
        asked = World(far, Federation({c: Shard([{"prompt": q, "response": ""}]) for c, q in (
            ("c0", "What is 2 plus 3?"), ("c1", "How much is 2 and 3?"))}, (), "generation"))
        voter = make_method("fed_sp_sc", embed="tfidf", max_new_tokens=16, similarity_threshold=-1.0)
        got = drive(voter.answer("What is 2 plus 3?", asked.infos(), "c0"), InProcess((voter,), asked))
    assert len(got.thoughts) == 2 and got.cost["completion_tokens"] > 0
