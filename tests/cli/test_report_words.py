"""The report says what it shows and nothing else: notes, axes in whole rounds, code between backticks, long hashes."""

from __future__ import annotations

import re

from fedllm.report import charts, report
from fedllm.report.clients import clients
from fedllm.report.facts import Facts
from fedllm.report.page import STYLE, section
from fedllm.runs.result import Result


def facts(loss):
    return Facts({"name": "x"}, rounds=[{"round": 0, "loss": loss}],
                 evaluations=[{"round": k, "global": {"loss": 2.0 - k}} for k in range(2)],
                 clients=[{"id": "a", "n": 3, "rank": None, "info": {}}])


def result(tmp_path, **evaluation):
    return Result(tmp_path, "fedavg", "vectorized", 1, 0, evaluation, {"up": 1, "down": 1}, 1.0, 1, "d")


def test_a_note_is_of_what_stands_below_it(tmp_path):
    """Under noise on gradients no client says its loss, and nobody tests on rows of its own."""
    bare = result(tmp_path, **{"global": {"loss": 1.0}, "clients": {}})
    assert "<p class='note'>The model on the global test.</p>" in report._learning(facts(None), bare)
    assert "Training loss as clients report it, and the model on" in report._learning(facts(0.5), bare)
    assert "<p class='note'>What each holds to train on.</p>" in clients(facts(None), bare)
    tested = result(tmp_path, **{"global": {"loss": 1.0}, "clients": {"a": {"loss": 1.0}}})
    assert "Each client on rows of its own that it did not train on, and what" in clients(facts(None), tested)


def test_baselines_are_explained_where_they_stand(tmp_path):
    told = {"global": {"loss": 1.0}, "clients": {}}
    both = result(tmp_path, before=told, **told, baselines={"centralized": told})
    page = report._table(both)
    assert "Centralized: all rows pooled" in page and "Local only" not in page and "own tests" not in page


def test_rounds_are_whole_code_is_code_and_a_hash_breaks():
    assert re.search(r'"dtick":1\b', charts.testing(facts(None), {}, {}) or "")
    page = section("T", "by `fedllm audit <run>`", "x")
    assert "by <code>fedllm audit &lt;run&gt;</code></p>" in page and "`" not in page
    assert re.search(r"\.note \{[^}]*overflow-wrap: anywhere", STYLE())
