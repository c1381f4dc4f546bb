"""A start on clients' synthetic rows: once, through the gate, with where they come from; and without it FedAvg."""

import json

import pytest

from fedllm.core.errors import RecipeError
from fedllm.core.program import drive
from fedllm.gate.made import read
from fedllm.methods.registry import make_method
from fedllm.privacy.responsible_gate import ResponsibleGate
from tests.methods.conftest import begin

KNOBS = {"template": "[q] {prompt} [a] {response} [e] ", "n_syn": 3, "generator_steps": 1, "warm_steps": 2}


def started(monkeypatch, answer, *layers, **knobs):
    """A run whose generators write this; what the server trained on."""
    run = begin("synth_warmstart", engine="in_process", layers=layers, **{**KNOBS, **knobs})
    rows = []

    def generate(self, prompts, theta=None, **options):
        return [answer(self, i) for i in range(len(prompts))]

    monkeypatch.setattr("fedllm.engines.client.ClientCall.generate", generate)
    warmed = type(run.method).warmed

    def seen(self, msg, client):
        rows.extend(msg["rows"])
        return warmed(self, msg, client)

    seen.__dict__.update(warmed.__dict__)
    seen.__name__ = "warmed"
    monkeypatch.setattr(type(run.method), "warmed", seen)
    states = [layer.init() for layer in layers]
    for t in range(2):
        run.engine.begin(t)
        run.state = drive(run.method.round(run.state, run.world.infos()), run.engine, layers, states)
        run.engine.commit()
    return run, rows


def test_rows_are_sent_once_and_say_where_they_come_from(monkeypatch):
    run, rows = started(monkeypatch, lambda c, i: f"w{i} w{2 * i} w7 [a] w{i} w{i + 3} [e]", license="MIT")
    assert len(rows) == 3 * len(run.world.federation.clients) == run.state["rows"]
    row, origin = read(rows[1])
    assert row == {"prompt": "w1 w2 w7", "response": "w1 w4"} and origin["license"] == "MIT" and "seed" in origin
    asked = [e["phase"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    assert asked.count("SynthWarmstart.synthesize") == len(run.world.federation.clients)  # in two rounds


def test_a_generator_that_copies_is_stopped_by_the_gate(monkeypatch):
    """It says the client's first row, or one of nobody's."""
    def answer(c, i):
        row = c.data[0]
        return f"{row['prompt']} [a] {row['response']} [e]" if i % 2 else "w1 w2 w3 w4 w5 [a] w6 [e]"

    open_, all_rows = started(monkeypatch, answer, license="MIT")
    assert len(all_rows) == 2 * len(open_.world.federation.clients)
    monkeypatch.undo()
    gate = ResponsibleGate(encoder="off")
    _, rows = started(monkeypatch, answer, gate, license="MIT")
    said = [read(t)[0] for t in rows]
    own = {json.dumps({"prompt": s.train[0]["prompt"], "response": s.train[0]["response"]})
           for s in open_.world.federation.clients.values()}
    assert said and not own & {json.dumps(r) for r in said} and len(said) < len(all_rows)


def test_rows_of_an_unknown_license_do_not_pass_the_gate(monkeypatch):
    run, rows = started(monkeypatch, lambda c, i: f"w{i} w{2 * i} w7 [a] w{i} [e]", ResponsibleGate(encoder="off"))
    assert rows == [] and run.state["warm"] and run.state["rows"] == 0


def test_a_generator_without_rows_leaves_its_client_out(monkeypatch):
    from fedllm.core.errors import QuorumError

    with pytest.raises(QuorumError, match="has no synthetic row after 12 tries"):
        started(monkeypatch, lambda c, i: "w1 w2")


def test_without_steps_it_is_fedavg():
    one, other = begin("synth_warmstart", warm_steps=0).go(2), begin("fedavg").go(2)
    assert all(t.equal(other.state["theta"][n]) for n, t in one.state["theta"].items())
    with pytest.raises(RecipeError, match="template"):
        make_method("synth_warmstart", template="x")
    with pytest.raises(RecipeError, match="something must follow"):
        make_method("synth_warmstart", template="Q: {prompt} A: {response}")
