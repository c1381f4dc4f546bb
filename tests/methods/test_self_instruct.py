"""Self-Instruct at home: what each filter alone rejects, how prompts are made up, when the search ends."""

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.program import drive
from fedllm.methods._bootstrap import Filter, Frame, picked
from fedllm.methods.registry import make_method
from fedllm.models.overlap import rouge_l
from tests.methods.conftest import begin

POOL = [{"prompt": "name a large city in the north", "response": "Oslo"}]
GOOD = {"prompt": "tell which animals sleep during the day", "response": "owls and bats"}
KNOBS = {"template": "[q] {prompt} [a] {response} [e] ", "max_new_tokens": 6, "least_words": 1}


@pytest.mark.parametrize("row, why", [
    ({"prompt": "tell which animals"}, "length"), ({"prompt": "word " * 151}, "length"),
    ({"prompt": "say what the image shows us"}, "undoable"),
    ({"prompt": "Write a program that adds numbers"}, "program"),
    ({"prompt": "- tell which animals sleep during"}, "punctuation"),
    ({"prompt": "été is which of the seasons"}, "script"),
    ({"prompt": "name a large city in the south"}, "near"), ({"response": "  "}, "empty"),
    ({"response": GOOD["prompt"]}, "echo"), ({"response": "these are the following:"}, "colon"),
    ({"prompt": POOL[0]["prompt"], "response": "Rome"}, "contradiction")])
def test_every_filter_has_a_row_that_it_alone_rejects(row, why):
    judge = Filter(rouge_max=1.0 if why == "contradiction" else 0.7)
    assert judge.why({**GOOD, **row}, POOL) == why
    assert judge.why(GOOD, POOL) is None
    loose = Filter(1, 1000, 1.0, ascii_first=False)
    if why in ("length", "near", "script"):
        assert loose.why({**GOOD, **row}, POOL) is None


def test_a_prompt_is_made_of_six_of_ones_own_and_two_machine_made():
    own = [{"prompt": f"own {i}", "response": "x"} for i in range(20)]
    made = [{"prompt": f"made {i}", "response": "x"} for i in range(5)]
    for seed in range(5):
        shown = picked(np.random.default_rng(seed), own, made, 8, 2)
        assert [sum(r["prompt"].startswith(w) for r in shown) for w in ("own", "made")] == [6, 2]
        assert len({r["prompt"] for r in shown}) == 8
    assert len(picked(np.random.default_rng(0), own, [], 8, 2)) == 8
    frame = Frame("Q: {prompt}\nA: {response}\n\n")
    text = frame.shown(own[:2])
    assert text == "Q: own 0\nA: x\n\nQ: own 1\nA: x\n\nQ:"
    assert frame.read(" how so?\nA: like this\n\nQ: next") == {"prompt": "how so?", "response": "like this"}
    assert frame.read(" how so? like this") is None
    assert frame.read(" how so?\nA: like this\n\n") == {"prompt": "how so?", "response": "like this"}
    assert frame.read(" how so?\nA: like th") is None


def test_a_row_that_was_cut_off_is_none():
    assert Frame(KNOBS["template"]).read("w1 w2 [a] w3 w4") is None
    assert Frame(KNOBS["template"]).read("w1 w2 [a] w3 [e] [q]") == {"prompt": "w1 w2", "response": "w3"}


def says(run, answers):
    """Clients whose model says these texts, one after the other."""
    from fedllm.engines.client import ClientCall

    asked, plain = [], ClientCall.generate

    def generate(self, prompts, theta=None, **options):
        asked.append((self.id, list(prompts)))
        return [answers(self.id, len(asked), i) for i in range(len(prompts))]

    return asked, plain, generate


def test_what_a_model_writes_is_taken_once_kept_and_trained_on(monkeypatch):
    run = begin("self_instruct_local", target=1.0, batch=3, max_attempts=4, engine="in_process", **KNOBS)
    line = "w{} w{} w9 [a] w{} w{} [e] "
    asked, _, generate = says(run, lambda c, n, i: line.format((7 * n + i) % 60, (11 * n + 3 * i) % 60, n, i))
    monkeypatch.setattr("fedllm.engines.client.ClientCall.generate", generate)
    run.go(1)
    pools = {c: m["pool"] for c, m in run.engine.memory.items() if "pool" in m}
    for c, shard in run.world.federation.clients.items():
        rows = [*shard.train, *pools[c]]
        assert 0 < len(pools[c]) <= len(shard.train)
        for i, row in enumerate(pools[c], len(shard.train)):
            assert max(rouge_l(row["prompt"], r["prompt"]) for r in rows[:i]) <= 0.7
    calls = len(asked)
    plain = begin("self_instruct_local", target=0.0, engine="in_process").go(1)
    assert any(not run.state["theta"][n].equal(t) for n, t in plain.state["theta"].items())
    full = [c for c, s in run.world.federation.clients.items() if len(pools[c]) == len(s.train)]
    run.go(1)
    assert {c: run.engine.memory[c]["pool"] for c in full} == {c: pools[c] for c in full}
    assert not {c for c, _ in asked[calls:]} & set(full)  # who has enough does not ask again


def test_a_model_that_repeats_itself_ends_the_search(monkeypatch):
    run = begin("self_instruct_local", target=3.0, batch=2, max_attempts=3, engine="in_process", **KNOBS)
    asked, _, generate = says(run, lambda c, n, i: "w1 w2 w3 [a] w4 [e] ")
    monkeypatch.setattr("fedllm.engines.client.ClientCall.generate", generate)
    run.go(1)
    for c in run.world.federation.clients:
        assert sum(who == c for who, _ in asked) == 3 and len(run.engine.memory[c]["pool"]) <= 1
    assert all(torch.isfinite(t).all() for t in run.state["theta"].values())


def test_with_no_target_it_is_fedavg():
    one, other = begin("self_instruct_local", target=0.0).go(2), begin("fedavg").go(2)
    assert all(t.equal(other.state["theta"][n]) for n, t in one.state["theta"].items())


def test_a_round_that_is_done_again_ends_in_the_same_pool():
    def once():
        run = begin("self_instruct_local", target=1.0, batch=2, max_attempts=2, engine="in_process", temperature=1.0,
                    **{**KNOBS, "template": "{prompt} w1 {response} w2 ".replace("{prompt}", "w0 {prompt}")})
        run.engine.begin(0)
        drive(run.method.round(run.state, run.world.infos()), run.engine)
        run.engine.abandon()  # killed before the round counted
        run.go(1)
        return {c: m["pool"] for c, m in run.engine.memory.items() if "pool" in m}

    assert once() == once()


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="template"):
        make_method("self_instruct_local", template="{prompt}{response}")
    with pytest.raises(RecipeError, match="machine_share = 8"):
        make_method("self_instruct_local", machine_share=8)
    with pytest.raises(CompositionError, match="classification"):
        begin("self_instruct_local", task="classification").method.check(
            begin("fedavg", task="classification").world.model)
