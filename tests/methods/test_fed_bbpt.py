"""Fed-BBPT: no gradient, no weights, every call counted; and a client that only has text in, text out."""

from __future__ import annotations

import json
import random

import pytest
import torch

import fedllm
from evidence.rigs.blackbox import noisy_box
from fedllm.cli.serve_model import serving
from fedllm.core.ask import Ask, Replies
from fedllm.core.errors import BudgetSpent, CompositionError, EndpointError, PayloadError, RecipeError
from fedllm.core.payload import tensor_bytes
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.text import LocalText
from fedllm.methods._blackbox import miss
from fedllm.methods._spoken import asked
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model
from fedllm.spaces import make_space

ARMS = {"policy": {"candidates": 6, "samples": 3}, "spsa": {"intrinsic_dim": 5, "sp_avg": 2},
        "bayes": {"intrinsic_dim": 3}}
BOX = {"space": "soft_prompt", "space_knobs": {"length": 3}, "steps": 2, "batch": 4}


@pytest.mark.parametrize("arm", ARMS)
def test_it_needs_no_gradient_and_counts_every_call(begin, monkeypatch, arm):
    run, rows = begin("fed_bbpt", **BOX, estimator=arm, **ARMS[arm]), []
    original = run.world.model.row_losses

    def counted(batch):
        assert torch.is_inference_mode_enabled()
        got = original(batch)
        rows.append(int((got[1] > 0).sum()))  # rows that only fill the rectangle count nothing
        return got

    monkeypatch.setattr(run.world.model, "row_losses", counted)
    run.go(2)
    each = {"policy": 3 * 2, "spsa": 2 * 2 * 2, "bayes": 2 * 2}[arm]
    assert run.state["queries"]["calls"] == sum(rows) == 2 * 4 * 4 * each  # rounds, clients, rows of a batch
    assert run.method.calls(9) == 4 * each


@pytest.mark.parametrize("arm", ARMS)
def test_engines_agree(begin, gap, arm):
    one, other = (begin("fed_bbpt", engine=e, **BOX, estimator=arm, **ARMS[arm]).go(2)
                  for e in ("in_process", "vectorized"))
    assert gap(one.method.served(one.state)[0], other.method.served(other.state)[0]) <= 1e-10
    assert gap(one.state["shared"], other.state["shared"]) <= 1e-10


def test_the_policy_stays_on_the_simplex_and_serves_tokens(begin):
    run = begin("fed_bbpt", **BOX, candidates=20, samples=4, lr=0.2).go(3)
    p = run.state["shared"]["p"]
    assert p.shape == (3, 20) and p.min() >= 0 and (p.sum(1) - 1).abs().max() < 1e-6
    assert not torch.allclose(p, torch.full_like(p, 1 / 20))
    [prompt] = run.method.served(run.state)[0].values()
    table = run.world.model.words.float()
    found = [int((table - row).abs().sum(1).argmin()) for row in prompt]
    assert torch.equal(table[found], prompt) and min(found) >= 4  # never <pad>, <s>, </s> or <unk>


@pytest.mark.parametrize(("arm", "floats"), [("policy", 3 * 6), ("spsa", 5), ("bayes", 2 * (3 + 1))])
def test_what_goes_up(begin, arm, floats):
    run = begin("fed_bbpt", **BOX, estimator=arm, **ARMS[arm])
    ask = Ask(run.method.local, {c.id: run.method.down(run.state, c) for c in run.world.infos()})
    out = drive((lambda: (yield ask))(), run.engine)
    assert {tensor_bytes(out[c]) for c in out} == {4 * floats}


def test_bayes_keeps_all_that_was_asked(begin):
    run = begin("fed_bbpt", **BOX, estimator="bayes", intrinsic_dim=3).go(2)
    assert run.state["shared"]["z"].shape == (1 + 2 * 4 * 2, 3) and run.state["shared"]["y"].shape == (17,)


def test_a_reply_of_another_shape_is_refused(begin):
    run = begin("fed_bbpt", **BOX, estimator="spsa", intrinsic_dim=5)
    reply = {"found/z": torch.zeros(4), "n": 3}
    with pytest.raises(PayloadError, match=r"found \{'z': \(4,\)\}, and \{'z': \(5,\)\} is allowed"):
        run.method.merge(run.state, Replies({"c0": reply}, answered=("c0",)))
    run = begin("fed_bbpt", **BOX, estimator="bayes", intrinsic_dim=2)
    reply = {"found/z": torch.zeros(4, 2), "found/y": torch.zeros(3), "n": 3}
    with pytest.raises(PayloadError, match=r"z \[m, 2\] with y \[m\] is allowed"):
        run.method.merge(run.state, Replies({"c0": reply}, answered=("c0",)))


def test_a_budget_ends_it(begin):
    run = begin("fed_bbpt", **BOX, **ARMS["policy"], budget=100).go()
    with pytest.raises(BudgetSpent, match="may take 96 calls of the model; 96 of the budget of 100 are spent"):
        run.go()


@pytest.mark.parametrize("knobs", [{"samples": 1}, {"c": 0.0}, {"candidates": 1}, {"steps": 0}, {"batch": 0},
                                   {"estimator": "luck"}, {"words": ("a", "b")}, {"endpoint": "http://h/v1"},
                                   {"endpoint": "http://h/v1", "words": "ab"},
                                   {"endpoint": "http://h/v1", "words": ("a", "b"), "estimator": "spsa"}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match="is not allowed"):
        make_method("fed_bbpt", **knobs)


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(CompositionError, match="soft_prompt, or an endpoint"):
        begin("fed_bbpt")
    with pytest.raises(CompositionError, match=r"candidates = 61 is not allowed; it must be <= 60"):
        begin("fed_bbpt", **BOX, candidates=61)
    with pytest.raises(CompositionError, match=r"intrinsic_dim = 49 is not allowed; it must be <= 48"):
        begin("fed_bbpt", **BOX, estimator="spsa", intrinsic_dim=49)
    with pytest.raises(RecipeError, match="must start with http"):
        make_method("fed_bbpt", endpoint="localhost", words=("a", "b"))


def test_the_policy_beats_random_prompts_on_a_noisy_box():
    got = [noisy_box("fed_bbpt", seed) for seed in range(5)]
    assert sum(g["below_random"] > 0 for g in got) >= 4


def test_how_far_an_answer_is():
    assert miss("Yes", "yes") == 0 and miss("no", "yes") == 1 and miss("", "") == 0 and miss("", "a") == 1
    assert miss("a b", "a c") == 0.5 and miss("a a", "a") == pytest.approx(1 / 3)


RIGHT = "### Task: Give the reference."
TASKS = (RIGHT, "### Task: Name the type of record.", "### Task: Is Quebec mentioned?")


def records(rnd, count):
    """Records whose reference is wanted; nothing in the row says so."""
    out = []
    for _ in range(count):
        ref = rnd.randint(1000, 9999)
        out.append({"prompt": f"Linus Bolton will see the advisor in Zurich on 26/11 (case {ref}).\n### Answer:\n",
                    "response": str(ref)})
    return out


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded", "generation", make_space("soft_prompt"), device="cpu")


def spoken(model, url, engine="vectorized", rounds=0, **knobs):
    """Two clients behind an endpoint; the method, its state, what was answered."""
    rnd = random.Random(0)
    shards = {f"c{i}": Shard(records(rnd, 4), records(rnd, 3)) for i in range(2)}
    world = World(model, Federation(shards, records(rnd, 4), "generation"))
    method = make_method("fed_bbpt", **{"endpoint": url, "words": TASKS, "length": 1, "samples": 6, "steps": 2,
                                        "batch": 2, "lr": 0.3, "max_new_tokens": 8, **knobs})
    running, state = ENGINES[engine]((method,), world, loopback=True), method.init(model)
    for t in range(rounds):
        running.begin(t)
        state = drive(method.round(state, world.infos()), running)
        running.commit()
    return method, state, drive(method.evaluate(state, world.infos(), "local"), running)


@pytest.mark.slow
def test_text_in_text_out_is_enough(embedded):
    """The embedded model behind an OpenAI-compatible endpoint: clients learn which instruction their rows want."""
    far = LocalText(embedded)
    with serving(far, "embedded") as server:
        asked.cache_clear()
        url = server.base_url
        before = spoken(embedded, url)[2]
        calls, read, said = far.usage.calls, far.usage.prompt_tokens, far.usage.completion_tokens
        method, state, after = spoken(embedded, url, rounds=3)
        tests = 2 * 3
        assert state["queries"]["calls"] == far.usage.calls - calls - tests == 3 * 2 * 2 * 6 * 2
        assert 0 < state["queries"]["read"] < far.usage.prompt_tokens - read
        assert 0 < state["queries"]["said"] < far.usage.completion_tokens - said
        assert method.text(state) == RIGHT and method.served(state)[0] == {} and not method.serves
        assert all(m["exact_match"] == 1.0 and m["loss"] == 0.0 and m["n"] == 3 for m in after.values())
        assert sum(m["loss"] for m in before.values()) > 0 or method.text(method.init(embedded)) == RIGHT
        other = spoken(embedded, url, "in_process", rounds=3)
        assert torch.equal(other[1]["shared"]["p"], state["shared"]["p"]) and other[1]["queries"] == state["queries"]
    with pytest.raises(EndpointError, match="embedded"):  # gone: an error that names it, no hanging run
        asked.cache_clear()
        spoken(embedded, url.replace("/v1", "/v2"), rounds=1, endpoint_model="embedded")


def test_a_whole_run_over_an_endpoint(embedded, tmp_path):
    """From recipe to report; the budget ends it, and the global test is asked of the endpoint too."""
    rows = tmp_path / "rows.jsonl"

    rows.write_text("".join(json.dumps(r) + "\n" for r in records(random.Random(1), 30)))
    far = LocalText(embedded)
    with serving(far, "embedded") as server:
        asked.cache_clear()
        result = fedllm.run({
            "name": "spoken", "model": "embedded", "rounds": 5, "space": {"name": "soft_prompt", "length": 1},
            "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 2}, "client_test": 0.2},
            "method": {"name": "fed_bbpt", "endpoint": server.base_url, "words": list(TASKS), "length": 1, "samples": 4,
                       "steps": 2, "batch": 2, "budget": 2 * 2 * 4 * 2 * 2, "price": 2.0, "lr": 0.3}}, root=tmp_path)
    spent = result.reports["FedBBPT"]["queries"]
    assert result.rounds == 2 and "are spent" in result.ended and spent["calls"] == 64
    assert spent["cost"] == pytest.approx((spent["read"] + spent["said"]) * 2e-6)
    assert result.adapter_path is None and result.evaluation["global"]["exact_match"] == 1.0
    assert {m["exact_match"] for m in result.evaluation["clients"].values()} == {1.0}
