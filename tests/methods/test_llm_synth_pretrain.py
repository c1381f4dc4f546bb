"""A large model's text before the first round: how it is made, what is kept out, and that no client is asked for it."""

import pytest

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.gate.copies import distinct
from fedllm.gate.made import read
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Completion
from tests.methods.conftest import begin


def told(monkeypatch, answer, **knobs):
    """A run whose model says this to each prompt; what it was asked, and what the server trained on."""
    run = begin("llm_synth_pretrain", engine="in_process", **{"warm_steps": 1, "n_synth": 10, **knobs})
    asked, rows = [], []

    def complete(self, prompts, new, heat=0.0, seed=0, **more):
        asked.append((self.id, list(prompts), heat))
        return [Completion(answer(p, i)) for i, p in enumerate(prompts)]

    monkeypatch.setattr("fedllm.engines.holder.Holder.complete", complete)
    fit = type(run.method).warmed

    def seen(self, msg, client):
        rows.extend(msg["rows"])
        return fit(self, msg, client)

    seen.__dict__.update(fit.__dict__)
    seen.__name__ = "warmed"
    monkeypatch.setattr(type(run.method), "warmed", seen)
    return run, asked, rows


WORDS = ("red", "green", "blue", "seven", "north", "early", "quiet", "round", "paper", "glass")


def test_each_way_makes_its_share_and_says_how(monkeypatch):
    run, asked, rows = told(monkeypatch, lambda p, i: "yes" if "yes or no" in p else f"{WORDS[i % 10]} {p[:3]} says so",
                            filtered=0.2, generated=0.5, transformed=0.3, dedupe=1.0)
    run.go(1)
    origins = [read(t)[1] for t in rows]
    counts = {how: sum(o["how"] == how for o in origins) for how in ("public", "filtered", "generated", "transformed")}
    assert counts == {"public": 0, "filtered": 2, "generated": 5, "transformed": 3}
    assert all(o["license"] == "CC0-1.0" and isinstance(o["seed"], int) and o["by"] for o in origins)
    assert {who for who, *_ in asked} == {SERVER}  # nobody else is asked for text
    heats = [heat for _, prompts, heat in asked if "yes or no" in prompts[0]]
    assert heats == [0.0] and run.state["warm"] and run.state["rows"] == len(rows)
    first = min(i for i, e in enumerate(run.engine.record.events) if e["kind"] == "wire")
    assert run.engine.record.events[first]["phase"].endswith("local")


def test_notices_copies_and_addresses_are_kept_out(monkeypatch):
    def answer(p, i):
        return ["© all of it", "Copyright 2020 x", "mail to a@b.org", "the very same", "the very same"][i % 5]

    run, _, rows = told(monkeypatch, answer, filtered=0.0, generated=1.0, transformed=0.0)
    run.go(1)
    assert sorted(read(t)[0]["response"] for t in rows) == ["mail to <EMAIL>", "the very same"]
    assert distinct(["the very same", "the very same", "another one"]) == [0, 2]


def test_a_model_without_a_word_is_an_error(monkeypatch):
    run, _, _ = told(monkeypatch, lambda p, i: " ", filtered=0.0, generated=1.0, transformed=0.0)
    with pytest.raises(DataError, match="no text left"):
        run.go(1)


def test_without_steps_it_is_fedavg():
    one, other = begin("llm_synth_pretrain", warm_steps=0).go(2), begin("fedavg").go(2)
    assert all(t.equal(other.state["theta"][n]) for n, t in one.state["theta"].items())


def test_what_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="must add up to 1"):
        make_method("llm_synth_pretrain", filtered=0.5)
    with pytest.raises(RecipeError, match="blocked"):
        make_method("llm_synth_pretrain", blocked=("(",))
    with pytest.raises(CompositionError, match="writes text"):
        make_method("llm_synth_pretrain").check(begin("fedavg", task="classification").world.model)
    assert make_method("llm_synth_pretrain", generator="large").asks_for() == ("large",)
    assert make_method("llm_synth_pretrain").public_at() == ("server",)
