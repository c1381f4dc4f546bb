"""Models that the server alone uses, in whole runs: refused where they lack, counted, paid and kept."""

from __future__ import annotations

import json

import pytest

import fedllm
from fedllm.core.errors import CompositionError, FedLLMError, RecipeError

SMALL = {"steps": 1, "batch_size": 2, "max_length": 64}
TAUGHT = {"model": "embedded", "models": {"teacher": {"name": "embedded", "prices": [1.0, 3.0]}}, "rounds": 1,
          "method": {"name": "fedcollm", "teach_steps": 1, "alignment": 4, "top_k": 4}, "local": SMALL,
          "evaluate": {"exact_match": False, "clients": False, "samples": 0},
          "data": {"source": "office", "office": {"clients": 2, "rows": 4, "public_rows": 6, "test_rows": 2,
                                                  "client_test_rows": 0}}}


def test_a_teacher_is_counted_paid_and_kept(tmp_path):
    result = fedllm.run(TAUGHT, root=tmp_path)
    said = result.reports["ModelUsage"]["teacher"]
    assert said["calls"] >= 4 + 2 and said["prompt_tokens"] > 20 and said["completion_tokens"] == 0
    assert said["cost"] == pytest.approx(said["prompt_tokens"] / 1e6)
    assert (result.folder / "models" / "teacher" / "adapter_model.safetensors").is_file()
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file()


def refused(changes, match, kind=CompositionError):
    with pytest.raises(kind, match=match):
        fedllm.run({**TAUGHT, **changes}, root="/nowhere")


def test_what_lacks_is_refused_before_any_work():
    refused({"models": {}}, r"method 'fedcollm' asks for a model that the recipe does not have: 'teacher'")
    office = {**TAUGHT["data"]["office"], "public_rows": 0}
    refused({"data": {"source": "office", "office": office}}, r"data.public", FedLLMError)
    rest = {"method": "fedmkt", "models": {}, "data": {"source": "office", "office": office}}
    refused(rest, r"method 'fedmkt' works on public rows at the clients and the server", FedLLMError)
    refused({"models": {"teacher": {"name": "embedded", "prices": [1.0]}}}, r"models.teacher.prices", RecipeError)
    refused({"models": {"teacher": {"name": "embedded", "prices": [-1.0, 2.0]}}}, r"models.teacher.prices", RecipeError)


def test_fdkt_says_what_it_spent(tmp_path):
    rows = [{"text": f"the {w} was {how}", "label": label} for w in ("film", "play", "song", "book", "talk", "game")
            for label, how in (("good", "fine"), ("bad", "dull"), ("good", "great"), ("bad", "poor"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = {"name": "embedded", "task": "generation"}
    result = fedllm.run({
        "model": "embedded", "models": {"generator": made, "writer": made}, "rounds": 2, "local": SMALL,
        "method": {"name": "fdkt", "texts": 2, "more": 1, "generator_steps": 3, "max_new_tokens": 6, "embed": "tfidf",
                   "target_epsilon": 4.0, "least_new": 0.0},
        "evaluate": {"clients": True, "samples": 0},
        "data": {"source": str(tmp_path / "rows.jsonl"), "task": "classification", "test": 0.2,
                 "partition": {"kind": "iid", "clients": 2}}}, root=tmp_path / "runs")
    [said] = result.privacy["layers"]
    assert result.privacy["claim"] == "private" and said["layer"] == "fdkt" and 2 < said["epsilon"] <= 4.0
    assert set(said["clients"]) == {"client-0", "client-1"} or len(said["clients"]) == 2
    used = result.reports["ModelUsage"]  # the writer's alone: counts of private rows are no noisy release
    assert 0 < used["writer"]["calls"] <= 8 and "generator" not in used
    assert "fdkt" in (result.folder / "privacy_statement.md").read_text()
