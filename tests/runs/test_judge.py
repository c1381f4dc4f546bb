"""One name means one quantity: server and clients are tested by the same function, and own metrics keep their names."""

from typing import ClassVar

import pytest

from fedllm.core.ask import Ask, on_client
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RunError
from fedllm.core.method import Method
from fedllm.methods.registry import method_class, modules
from fedllm.runs.build import Parts
from fedllm.runs.judge import Judge
from fedllm.runs.metrics import check_metrics
from fedllm.runs.recipe import Recipe
from tests.methods.conftest import begin
from tests.methods.test_matrix import METHODS

NEEDS = {"fedpit": {"ranks": ()}, "gossip": {}, "dataset_grouper": {"tune_steps": 1},
         "skill_cmib": {"task": "classification", "space": "head"}}
EXAMINES = {"fical", "consensus_graph"}
"""Methods whose `examine` asks for figures of their own, which no other score has, or says that there are none."""
OWN_SCORE = [m for m in modules() if method_class(m).score is not Method.score and m not in EXAMINES]


def judged(run, method=None):
    method = method or run.method
    return Judge(Parts(Recipe(), run.world, method, []), method).test(run.state, run.engine.memory, 1)


@pytest.mark.parametrize("name", OWN_SCORE)
def test_the_server_is_tested_by_the_methods_own_score(name, monkeypatch):
    """Whatever the method's `score` says is what the report says, of the server as of each client."""
    run = begin(name, **METHODS.get(name, NEEDS.get(name, {})))
    kind, asked = type(run.method), []

    @on_client()
    def score(self, msg, client):
        asked.append((client.id, msg["on"]))
        return {"loss": 0.125, "n": 1}

    monkeypatch.setattr(kind, "score", score)
    got = judged(run)
    assert got["global"]["loss"] == 0.125 and all(m["loss"] == 0.125 for m in got["clients"].values())
    globally = {who for who, on in asked if on == "global"}
    assert globally == ({SERVER} if run.method.serves else set(run.world.federation.clients))


OWN_MODEL = {"m2fedsa": "towers and a fusion over them, which no forward of the plain model is"}


@pytest.mark.parametrize("name", [m for m in OWN_SCORE if m in METHODS and method_class(m).serves is True
                                  and m not in OWN_MODEL])
def test_that_score_is_the_served_models(name):
    """What the server's copy of `score` rebuilds from a message is the model that would be deployed."""
    run = begin(name, **METHODS[name]).go(1)
    theta, base = run.method.served(run.state)
    plain = run.world.model
    from fedllm.engines.carry import carry_out
    from fedllm.local.requests import Limits, Losses

    rows = run.world.encoded(SERVER, "test")
    want = carry_out([Losses("server", plain, theta, base, rows)], Limits())[0].mean
    assert judged(run)["global"]["loss"] == pytest.approx(want, abs=1e-6)


class Ranked(Method):
    metrics: ClassVar = {"ndcg10": "max", "miss": "min"}
    gives: ClassVar = {"ndcg10": 0.75, "miss": 2}

    def examine(self, state, clients, rows):
        out = yield Ask(self.ping, {c.id: {} for c in clients})
        return {**self.gives, "exact_match": len(out) / len(clients)}

    @on_client()
    def ping(self, msg, client):
        return {"here": 1}


def test_own_metrics_stand_under_their_own_names():
    run = begin("fedavg")
    got = judged(run, Ranked())
    assert got["global"] == {"n": 4, "ndcg10": 0.75, "miss": 2, "exact_match": 1.0}


@pytest.mark.parametrize("gives, says", [
    ({"ndcg10": 0.75}, "lacks \\['miss'\\]"), ({"ndcg10": 0.75, "miss": "two"}, "gave {'miss': 'two'}"),
    ({"ndcg10": 1.0, "miss": 0, "mrr": 1.0}, "mrr.*does not declare")])
def test_what_examine_returns_is_what_the_method_declares(gives, says):
    class Wrong(Ranked):
        pass

    Wrong.gives = gives
    with pytest.raises(RunError, match=says):
        judged(begin("fedavg"), Wrong())


@pytest.mark.parametrize("metrics, says", [({"ndcg10": "up"}, "'max' and 'min'"), ({"loss": "max"}, "'min' is better"),
                                           ({"n": "max"}, "any name but 'n'")])
def test_directions_are_checked_before_the_run(metrics, says):
    class Wrong(Ranked):
        pass

    Wrong.metrics = metrics
    with pytest.raises(CompositionError, match=says):
        check_metrics(Wrong())
