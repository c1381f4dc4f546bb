"""A run from its recipe to its folder."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import fedllm
from fedllm.core.client import ClientInfo
from fedllm.core.errors import CompositionError, RunError
from fedllm.runs.course import draw_cohort
from fedllm.runs.folder import RunFolder


def test_a_run_leaves_a_whole_folder(recipe, tmp_path):
    recipe["evaluate"] |= {"every": 2, "baselines": ["local_only", "centralized"]}
    result = fedllm.run(recipe, root=tmp_path)
    want = {"recipe.yaml", "events.jsonl", "checkpoints", "adapter", "result.json", "report.html", "model_card.md"}
    assert want <= {p.name for p in result.folder.iterdir()}
    kept = json.loads((result.folder / "result.json").read_text())
    assert {"method", "engine", "rounds", "seed", "evaluation", "bytes", "privacy", "seconds", "peak_memory_bytes",
            "state_digest"} <= kept.keys()
    e = kept["evaluation"]
    assert e["global"]["loss"] < e["before"]["global"]["loss"]
    assert len(e["clients"]) == 5 and set(e["baselines"]) == {"local_only", "centralized"}
    assert kept["privacy"] is None and len(kept["state_digest"]) == 64
    events = RunFolder(result.folder).events()
    assert [x["round"] for x in events if x["kind"] == "evaluation"] == [0, 2, 4]
    for way in ("up", "down"):
        sent = [x for x in events if x["kind"] == "wire" and x["direction"] == way]
        assert sum(x["bytes"] for x in sent if "purpose" not in x) == kept["bytes"][way]
        tests = kept["bytes"]["evaluation"]
        assert sum(x["bytes"] for x in sent if x.get("purpose") == "evaluation") == tests[way] > 0
        assert set(tests["by_phase"]) == {"FedAvg.score"} and set(kept["bytes"]["by_phase"]) == {"FedAvg.local"}
    assert all(len(x["cohort"]) == 3 for x in events if x["kind"] == "round")
    assert "plotly" in (result.folder / "report.html").read_text()
    assert not [p for p in result.folder.rglob("*.tmp")]


def test_the_adapter_loads_in_plain_peft(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path)
    net = AutoPeftModelForCausalLM.from_pretrained(result.adapter_path)
    assert any(float(p.detach().abs().sum()) > 0 for n, p in net.named_parameters() if "lora_B" in n)


def test_engines_and_repeats_agree(recipe, tmp_path):
    first = fedllm.run(recipe, root=tmp_path)
    again = fedllm.run(recipe, root=tmp_path)
    assert again.folder != first.folder and again.state_digest == first.state_digest
    loop = fedllm.run(recipe, root=tmp_path, engine={"kind": "in_process", "loopback": True})
    assert loop.bytes == first.bytes
    assert loop.evaluation["global"]["loss"] == pytest.approx(first.evaluation["global"]["loss"], abs=1e-3)
    assert fedllm.run(recipe, root=tmp_path, seed=1).state_digest != first.state_digest


def test_a_space_that_peft_lacks_gives_a_model(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    result = fedllm.run(recipe, root=tmp_path, space="full", rounds=1)
    net = AutoModelForCausalLM.from_pretrained(result.adapter_path)
    base = AutoModelForCausalLM.from_pretrained(recipe["model"])
    assert result.adapter_path.name == "model"
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), base.parameters(), strict=True))


def test_personal_parts_go_to_the_clients(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path, method="local_only", clients={"per_round": 1.0}, rounds=2)
    assert result.adapter_path is None
    assert len(list((result.folder / "clients").glob("*/theta/adapter_model.safetensors"))) == 5
    assert result.evaluation["global"]["loss"] < result.evaluation["before"]["global"]["loss"]


def test_classification_with_a_head(tmp_path, tiny_bert_folder):
    rows = tmp_path / "films.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the film is {w} {i % 7 * 'a '}", "label": w}) + "\n"
                            for i in range(60) for w in ("good", "bad")))
    recipe = {"name": "films", "model": tiny_bert_folder, "rounds": 3, "local": {"lr": 0.01, "epochs": 2},
              "data": {"source": str(rows), "task": "classification", "partition": {"kind": "iid", "clients": 4}}}
    result = fedllm.run(recipe, root=tmp_path)
    assert result.evaluation["global"]["accuracy"] >= 0.9
    assert (result.adapter_path / "head.safetensors").exists()


def test_start_from_an_adapter(recipe, tmp_path):
    first = fedllm.run(recipe, root=tmp_path, space={"name": "lora", "rank": 4, "alpha": 6.0})
    more = fedllm.run(recipe, root=tmp_path, space={"name": "lora", "start_from": str(first.adapter_path)}, rounds=1)
    assert more.evaluation["before"]["global"]["loss"] == pytest.approx(first.evaluation["global"]["loss"], abs=1e-4)


def test_rounds_without_answers_are_skipped_and_three_stop_the_run(recipe, tmp_path):
    recipe["clients"] = {"per_round": 3, "quorum": 2, "availability": 0.6}
    result = fedllm.run(recipe, root=tmp_path, rounds=6)
    assert 0 < len(result.skipped) < 6
    names = [c["id"] for c in json.loads((result.folder / "clients.json").read_text())]
    recipe["clients"]["profiles"] = {c: {"availability": 1e-9} for c in names}
    with pytest.raises(RunError, match="3 rounds in a row"):
        fedllm.run(recipe, root=tmp_path)


def test_clients_are_lost_while_they_work_whether_time_is_virtual_or_not(recipe, tmp_path):
    """The same ones, with the same state at the end; what a lost one noted in its memory does not count."""
    recipe |= {"method": {"name": "scaffold", "allow_adaptive": True}, "clients": {"dropout": 0.4}, "rounds": 3}
    real = fedllm.run(recipe, root=tmp_path)
    recipe["clients"]["step_seconds"] = 1.0
    virtual = fedllm.run(recipe, root=tmp_path)

    def lost(run):
        return [(e["round"], e["client"]) for line in (run.folder / "events.jsonl").open()
                if (e := json.loads(line))["kind"] == "missing" and e["why"].startswith("lost")]

    assert 0 < len(lost(real)) < 9 and lost(real) == lost(virtual) and real.state_digest == virtual.state_digest


def test_cohorts_depend_on_seed_and_round_alone():
    clients = [ClientInfo(f"c{i}", 1) for i in range(10)]
    a = draw_cohort(clients, 4, seed=0, round=2)
    assert a == draw_cohort(clients, 4, seed=0, round=2) and a == sorted(a, key=lambda c: c.id)
    assert len(draw_cohort(clients, 0.25, 0, 0)) == 3 and draw_cohort(clients, 99, 0, 0) == clients
    assert len({tuple(c.id for c in draw_cohort(clients, 4, 0, r)) for r in range(8)}) > 1


def test_layers_over_a_method_without_rounds(monkeypatch):
    from fedllm.core.layer import Layer
    from fedllm.core.method import Method
    from fedllm.runs.fits import compose

    class Answers(Method):
        def answer(self, query, clients):
            return query

    with pytest.raises(CompositionError, match="has no rounds"):
        compose(Answers(), [Layer()])
