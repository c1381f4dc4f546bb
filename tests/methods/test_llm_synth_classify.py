"""Labelled text by a language model: what is asked, what is left out, who learns which of it, how often it is sent."""

import numpy as np
import pytest

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.engines.client import ClientCall
from fedllm.gate.made import read
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Completion
from fedllm.models.shelf import Shelf
from tests.methods.conftest import begin

KNOBS = {"generator": "writer", "n_per_label": 3, "embed": "tfidf", "agree": False}
OF = {"one": ("w1 w2 w3", "w2 w3 w4 w1", "w3 w1"), "two": ("w20 w21", "w21 w22 w20", "w22 w23"),
      "three": ("w40 w41", "w41 w42 w40", "w42 w43 three")}


class Writer:
    """A text model with ready answers."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def complete(self, prompts, max_new_tokens, temperature=0.0, seed=0):
        self.asked += prompts
        return [Completion(self.answer(p, i)) for i, p in enumerate(prompts)]


def ready(answer=None, **knobs):
    run = begin("llm_synth_classify", engine="in_process", task="classification", **{**KNOBS, **knobs})
    writer = Writer(answer or (lambda p, i: next(t for name, t in OF.items() if f"'{name}'" in p)[i % 3]))
    run.world.models = Shelf({"writer": lambda: writer})
    return run, writer


def test_every_label_is_asked_for_in_every_style_and_texts_do_not_name_it():
    run, writer = ready()
    run.go(1)
    assert len(writer.asked) == 9 and sum("'two'" in p for p in writer.asked) == 3
    assert {p.split(" of the kind")[0] for p in writer.asked} == {f"Write {s}" for s in run.method.styles}
    rows = [read(t) for t in run.state["rows"]]
    assert {r["label"] for r, _ in rows} == {0, 1, 2} and not any("three" in r["text"] for r, _ in rows)
    assert all(o["by"] == "writer" and o["license"] == "CC0-1.0" for _, o in rows)
    assert run.method.report(run.state)["rows"] == len(rows)


def test_rows_go_down_once_and_each_client_learns_labels_that_it_lacks(monkeypatch):
    run, _ = ready()
    for i, shard in enumerate(run.world.federation.clients.values()):
        shard.train[:] = [{**r, "label": i % 2} for r in shard.train]
    learned, fit = {}, ClientCall.fit

    def seen(self, theta, **how):
        learned.setdefault(self.id, []).append([r["label"] for r in how.get("on") or ()])
        return fit(self, theta, **how)

    monkeypatch.setattr(ClientCall, "fit", seen)
    run.go(2)
    down = [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"]
    half = len(down) // 2
    assert max(down[half:]) < min(down[:half])
    for i, (name, shard) in enumerate(run.world.federation.clients.items()):
        first, second = learned[name]
        extra = first[len(shard.train):]
        assert extra and set(extra) == {0, 1, 2} - {i % 2} and sorted(first) == sorted(second)


def test_a_few_public_rows_are_shown():
    run, writer = ready(mode="few", shots=2)
    for k in range(3):
        run.world.federation.public.append({"text": f"w{k} w{k} w9", "label": k})
    run.go(1)
    two = next(p for p in writer.asked if "'two'" in p)
    assert two.count("of the kind 'two'") >= 2 and "w1 w1 w9" in "".join(p for p in writer.asked if "'two'" in p)


def test_what_disagrees_with_its_neighbors_is_left_out():
    found = [(0, "w1 w2 w3"), (0, "w1 w2 w3 w4"), (0, "w2 w3 w1"), (0, "w3 w2 w1"), (1, "w1 w2 w3 w5"),
             (1, "w30 w31"), (1, "w30 w31 w32"), (1, "w31 w32 w30"), (1, "w32 w30 w31 w33")]
    method = make_method("llm_synth_classify", **{**KNOBS, "agree": True})
    _, ok = method.looked_at(found)
    assert ok[4] is False and all(ok[:4]) and sum(ok) >= 7


def test_a_model_that_repeats_itself_or_says_nothing_is_an_error():
    run, _ = ready(lambda p, i: "w1 w2 w3 w4")
    with pytest.raises(DataError, match=r"repeats itself|has no text of"):
        run.go(1)
    run, _ = ready(lambda p, i: "" if "'two'" in p else f"w{i} w{i + 7}")
    with pytest.raises(DataError, match="no text of two"):
        run.go(1)
    with pytest.raises(DataError, match="repeats itself"):
        make_method("llm_synth_classify", **KNOBS, collapse=0.2).looked_at([(0, "w1 w2"), (1, "w1 w2 w3")])


def test_without_texts_it_is_fedavg_and_what_does_not_fit_is_refused():
    one, other = (begin(n, task="classification", **k).go(2) for n, k in
                  (("llm_synth_classify", {"n_per_label": 0}), ("fedavg", {})))
    assert all(t.equal(other.state["theta"][n]) for n, t in one.state["theta"].items())
    assert np.isclose(one.up(), other.up())
    with pytest.raises(RecipeError, match="generator"):
        make_method("llm_synth_classify")
    with pytest.raises(RecipeError, match="ask"):
        make_method("llm_synth_classify", generator="x", ask="write")
    with pytest.raises(CompositionError, match="labelled text"):
        make_method("llm_synth_classify", **KNOBS).check(begin("fedavg").world.model)
