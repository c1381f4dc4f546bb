"""Multilingual prompt tuning: FedAvg of the prompt's network and the head, and languages with few rows told apart."""

from __future__ import annotations

import pytest

from fedllm.core.errors import CompositionError, DataError, PayloadError
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.methods.registry import make_method
from tests.methods.conftest import tried

HERE = {k: v for k, v in tried("multilingual_fpt").items() if k not in ("ranks", "local")}


def spoken(begin, name="multilingual_fpt", **options):
    """The tiny federation, client c0 to c3 with 5, 7, 9 and 12 rows in `a`, `b` (two clients) and `c`."""
    run = begin(name, **{**HERE, **options})
    held, tongue = run.world.federation, dict(zip(("c0", "c1", "c2", "c3"), "abbc", strict=True))
    mark = lambda rows, lang: [{**r, "lang": lang} for r in rows]  # noqa: E731
    test = [{**r, "lang": "ab"[i % 2]} for i, r in enumerate(held.test)]
    run.world.federation = Federation({c: Shard(mark(s.train, tongue[c]), mark(s.test, tongue[c]))
                                       for c, s in held.clients.items()}, test, held.task, held.labels)
    return run


def test_it_is_fedavg_of_the_prompt_encoder_and_the_head(begin, gap):
    mine, theirs = spoken(begin).go(2), spoken(begin, "fedavg").go(2)
    assert gap(mine.state["theta"], theirs.state["theta"]) == 0
    assert any("mlp_head" in n for n in mine.state["theta"]) and any("classifier" in n for n in mine.state["theta"])


def test_languages_with_few_rows_are_told_apart(begin):
    run = spoken(begin).go(2)
    told = run.method.report(run.state)
    assert told["rows"] == {"c0": {"a": 5}, "c1": {"b": 7}, "c2": {"b": 9}, "c3": {"c": 12}}
    assert (told["low"], told["high"]) == (["a"], ["b", "c"])  # at most 0.85 of a mean of 11
    assert told["trained"] == sum(t.numel() for t in run.state["theta"].values())
    named = spoken(begin, low_resource=("b",)).go()
    assert named.method.report(named.state)["low"] == ["b"]
    asked = [e for e in run.engine.record.events if e["kind"] == "wire" and "enroll" in e["phase"]]
    assert {e["round"] for e in asked} == {0}


def test_the_global_test_has_an_accuracy_for_either_group(begin):
    run = spoken(begin).go()
    score = lambda on: drive(run.method.evaluate(run.state, run.world.infos()[:1], on), run.engine)["c0"]  # noqa: E731
    told = score("global")
    a, b = (drive(one(run, lang), run.engine) for lang in "ab")
    assert told["low_resource_accuracy"] == a and told["high_resource_accuracy"] == b  # no test row is in c
    assert set(score("local")).isdisjoint(run.method.metrics)


def one(run, lang):
    """The accuracy on the global test's rows of one language alone."""
    whole = run.world.federation
    run.world.federation = Federation(whole.clients, [r for r in whole.test if r["lang"] == lang], whole.task,
                                      whole.labels)
    got = yield from run.method.evaluate(run.state, run.world.infos()[:1], "global")
    run.world.federation = whole
    return got["c0"]["accuracy"]


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(CompositionError, match=r"'multilingual_fpt' and space 'lora' .* beside it at most head"):
        begin("multilingual_fpt", task="classification")
    with pytest.raises(CompositionError, match="a class head is trained beside the prompt"):
        begin("multilingual_fpt", space="p_tuning", space_knobs={"length": 3}, task="classification")
    method = spoken(begin).method
    with pytest.raises(PayloadError, match="'languages' names 2 and 'rows' counts 1"):
        method.few({}, {"languages": ["a", "b"], "rows": [1]})


def test_rows_that_name_no_language_are_refused():
    method, rows = make_method("multilingual_fpt"), [{"text": "x", "label": 0, "lang": "a"}, {"text": "y", "label": 0}]
    method.check_rows((), {"a": rows[:1]})
    with pytest.raises(DataError, match=r"client 'b' has rows without 'lang', .*data\.fields .*\{lang: lang\}"):
        method.check_rows((), {"a": rows[:1], "b": rows})
