"""`fedllm audit RUN`: overfitted and careful runs are told apart, and what cannot be audited is said clearly."""

import json

import pytest

import fedllm
from fedllm.audits.audit_run import audit_run
from fedllm.audits.privacy_audit import PrivacyAudit
from fedllm.core.errors import RecipeError, RunError
from fedllm.runs.seal import verify
from tests.cli.test_cli import call
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, tiny_llama_folder):
    """Every weight trained on 40 random rows until they are known by heart, with canaries and replies kept."""
    import random

    draw, folder = random.Random(1), tmp_path_factory.mktemp("overfitted")
    words = WORDS[:28]
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(100):
            prompt, response = draw.sample(words, 4), draw.sample(words, 4)
            file.write(json.dumps({"prompt": " ".join(prompt), "response": " ".join(response)}) + "\n")
    recipe = {"name": "overfitted", "model": tiny_llama_folder, "rounds": 12, "space": "full",
              "local": {"lr": 0.01, "epochs": 6, "batch_size": 8},
              "data": {"source": str(folder / "rows.jsonl"), "partition": {"kind": "iid", "clients": 2}, "test": 0.5,
                       "canaries": 8},
              "evaluate": {"exact_match": False, "samples": 0}, "record": {"replies": True}}
    return fedllm.run(recipe, root=folder).folder


def test_an_overfitted_run_fails_in_every_way(overfitted, capsys):
    code, out, _ = call(capsys, "audit", str(overfitted))
    found = json.loads((overfitted / "audit.json").read_text())
    checks = {c["name"]: c for c in found["checks"]}
    assert code == 1 and "FAIL: membership" in out and not found["pass"]
    assert checks["membership"]["figure"] > 0.95
    assert 0.3 < found["membership"]["before_training"] < 0.7
    assert checks["exposure"]["figure"] > found["canaries"]["exposure_not_planted"] + 3
    assert checks["verbatim"]["figure"] > 0.2 and found["memorization"]["held_out"]["verbatim"] < 0.1
    assert found["leak"]["attacks"]["film_bag"]["recall"] > 0.8
    assert "<h2>Audit</h2>" in (overfitted / "report.html").read_text()
    assert verify(overfitted).intact  # an audit changes nothing of the record


def test_the_limits_are_what_decides(overfitted, capsys):
    code, out, _ = call(capsys, "audit", str(overfitted), "--only", "membership", "--max-auc", "1.0", "--json")
    assert code == 0 and json.loads(out)["pass"]
    assert set(json.loads(out)) == {"pass", "checks", "left_out", "membership"}


@pytest.mark.slow
def test_shadows_of_the_recipe_tell_members(overfitted):
    got = audit_run(overfitted, only=["membership"], shadows=4, gates=PrivacyAudit(max_auc=1.0))
    assert got.details["membership"]["scores"]["lira"]["auc"] > 0.8


@pytest.fixture
def small(recipe, tmp_path):
    recipe["rounds"] = 1
    return fedllm.run(recipe, root=tmp_path).folder


def test_what_cannot_be_audited_is_said(small, capsys, tmp_path):
    with pytest.raises(RunError, match=r"planted no canaries.*data.canaries"):
        audit_run(small, only=["canaries"])
    with pytest.raises(RunError, match=r"kept no transcript.*record.replies=true"):
        audit_run(small, transcript=True)
    with pytest.raises(RecipeError, match="'leaks' is unknown; allowed are membership"):
        audit_run(small, only=["leaks"])
    code, _, said = call(capsys, "audit", str(tmp_path / "nothing"))
    assert code == 2 and "is no run folder" in said
    (small / "result.json").unlink()
    with pytest.raises(RunError, match="is not finished, so there is no model"):
        audit_run(small)


def test_adapters_on_attention_give_no_words_away(small):
    got = audit_run(small, only=["leak"])
    assert got.passes and not got.details["leak"]["embeddings_seen"] and got.details["leak"]["trainables_seen"]


@pytest.fixture(scope="module")
def loud_bert(tmp_path_factory, tiny_bert_folder):
    """The tiny BERT with weights five times as large: a fresh network has hardly a gradient."""
    import shutil

    import torch
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("loud") / "bert"
    shutil.copytree(tiny_bert_folder, folder)
    net = BertModel.from_pretrained(folder)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1:
                p.mul_(1 if "embeddings" in name else 5)
    net.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("space", ["full", {"name": "lora", "rank": 16}, "head"])
def test_a_classifier_is_inverted(tmp_path, loud_bert, space):
    import random

    draw = random.Random(0)
    texts = [{"text": " ".join(draw.sample(WORDS[:40], 6)), "label": ["a", "b"][i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    done = fedllm.run({
        "name": "read", "model": loud_bert, "rounds": 1, "space": space,
        "local": {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 1},
        "data": {"source": str(tmp_path / "rows.jsonl"), "task": "classification", "labels": ["a", "b"],
                 "fields": {"text": "text", "label": "label"}, "test": 38 / 40, "client_test": 0.0,
                 "partition": {"kind": "iid", "clients": 2}}}, root=tmp_path)
    found = audit_run(done.folder, only=["leak"]).details["leak"]["attacks"]["gradient_inversion"]
    if space == "head":
        assert found["f1"] < 0.5
    else:
        assert found["recall"] > 0.6 > found["guess_recall"]
