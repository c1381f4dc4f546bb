"""PFCR and FELLRec: what is coded and decoded, whose words cross, and whom a client leans on."""

import math

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError
from fedllm.core.payload import leaves
from fedllm.methods._randomized import coded, decoded
from fedllm.methods._similar import flat
from fedllm.methods.registry import make_method
from tests.methods.conftest import tried


@pytest.mark.parametrize("epsilon, bits", [(None, 8), (2.0, 3), (0.3, 1)])
def test_the_codec_is_unbiased(epsilon, bits):
    x = torch.tensor([-0.12, -0.05, 0.0, 0.031, 0.12], dtype=torch.float64).repeat(40_000, 1)
    rng = np.random.default_rng(0)
    told = decoded(coded(x, 0.12, bits, epsilon, rng), 0.12, bits, epsilon)
    error = told.std(0) / math.sqrt(len(told))
    assert ((told.mean(0) - x[0]).abs() <= 3.5 * error + 1e-9).all()
    assert decoded(coded(torch.tensor([9.0]), 0.12, 8, None, rng), 0.12, 8, None).item() == pytest.approx(0.12)


def test_no_level_tells_more_than_epsilon_allows():
    """The odds of any level under two numbers are at most e^epsilon: here at the two ends, where they are largest."""
    n, rng = 200_000, np.random.default_rng(1)
    often = [np.bincount(coded(torch.full((n,), v), 1.0, 2, 1.0, rng).numpy(), minlength=4) / n for v in (-1.0, 1.0)]
    assert (often[0] / often[1]).max() == pytest.approx(math.e, rel=0.04)
    assert (often[1] / often[0]).max() == pytest.approx(math.e, rel=0.04)


def test_the_table_moves_by_what_was_told_and_nothing_else_crosses(begin):
    run = begin("pfcr", **tried("pfcr"), dtype=torch.float32)
    before, seen = run.state["table"]["table.weight"], []
    emit = run.engine.record.emit
    run.engine.record.emit = lambda kind, **f: (seen.append((kind, f)), emit(kind, **f))[1]
    run.go(1)
    moved = run.state["table"]["table.weight"] - before
    assert 0 < moved.abs().max() <= 0.12 + 1e-6
    up = [f for k, f in seen if k == "wire" and f["direction"] == "up"]
    assert up and all(f["bytes"] < 2 * before.numel() + 2000 for f in up)  # a byte an entry
    kept = {p for c in run.engine.memory for p, _ in leaves(run.engine.memory[c])}
    assert any("encoder/encoder." in p for p in kept)
    assert set(run.state["table"]) == {"table.weight"}


def test_prompts_are_trained_at_home_while_the_reader_rests(begin):
    run = begin("pfcr", **tried("pfcr")).go(1)
    reader = {c: {p: t.clone() for p, t in leaves(m) if p.startswith("encoder")} for c, m in run.engine.memory.items()}
    up = run.up()
    run.go(1)
    assert run.up() - up < 4 * 600  # four clients' counts
    for c, m in run.engine.memory.items():
        assert all(torch.equal(t, reader[c][p]) for p, t in leaves(m) if p.startswith("encoder"))
        assert m["prompt"]["prompt.gate.weight"].abs().max() > 0


def test_epsilon_is_composed_and_said_to_be_no_users():
    method = make_method("pfcr", ldp_epsilon=0.3)
    said = method.report({"round": 12, "table": {"t": torch.zeros(10, 2)}})
    assert said["epsilon_of_a_client"] == pytest.approx(0.3 * 20 * 10) and "no user's" in said["of"]
    assert make_method("pfcr").report({"round": 1, "table": {}}) is None


def test_whom_a_client_leans_on():
    method, rng = make_method("fellrec"), torch.Generator().manual_seed(0)
    trees = [{"w": torch.randn(6, generator=rng, dtype=torch.float64)} for _ in range(4)]
    same = method.mixed([trees[0]] * 3, [1.0, 2.0, 3.0], 0)
    assert all(torch.allclose(t["w"], trees[0]["w"]) for t in same)
    losses = [0.9, 1.0, 1.1, 1.05]
    mixed = method.mixed(trees, losses, 3)
    order = [2, 0, 3, 1]
    again = method.mixed([trees[i] for i in order], [losses[i] for i in order], 3)
    assert all(torch.allclose(again[k]["w"], mixed[i]["w"], atol=1e-12) for k, i in enumerate(order))
    two = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"b": torch.zeros(3), "a": torch.ones(2)}]
    assert all(torch.equal(t["a"], torch.ones(2)) for t in method.mixed(two, [1.0, 1.0], 0))  # by name, in any order
    w = method.weights(flat(trees), torch.tensor(losses).double(), 0)
    cos = torch.nn.functional.cosine_similarity(trees[0]["w"], trees[1]["w"], dim=0)
    share = torch.tensor(losses).double().div(0.05).softmax(0)
    row = (w[0] / w[0, 0])[1]
    assert row == pytest.approx(float((1 + cos) / 2 * torch.tanh(0.7 / share[0])), rel=1e-9)
    equal = method.weights(torch.ones(3, 4).double(), torch.ones(3).double(), 5)
    assert torch.allclose(equal, equal[0, 0] * torch.eye(3).double() + (1 - torch.eye(3).double()) * equal[0, 1])
    assert torch.isfinite(method.weights(torch.zeros(2, 3).double(), torch.tensor([0.0, 90.0]).double(), 100)).all()


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """So that no process is started for a rule's sake."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})


def test_a_recipe_of_two_shops_runs_with_its_fields_rules_beside(tmp_path):
    recipe = {"model": {"name": "shop", "width": 8, "depth": 1, "codes": [2, 4], "prompts": 2}, "space": "full",
              "method": {"name": "pfcr", "fed_rounds": 1}, "rounds": 2, "local": {"steps": 2, "batch_size": 8},
              "data": {"source": "sim:shops", "simulated": {"items": 20, "users": 9}, "task": "next_item",
                       "sequences": {}, "partition": {"kind": "by_key", "key": "shop"}, "test": 0.0},
              "evaluate": {"baselines": ["popularity", "item_knn"]}}
    result = fedllm.run(recipe, root=tmp_path)
    assert set(result.evaluation["clients"]) == {"arts", "office"}
    for got in (result.evaluation["clients"]["arts"], result.evaluation["baselines"]["item_knn"]["clients"]["arts"]):
        assert 0 <= got["ndcg10"] <= got["hr10"] <= 1
    with pytest.raises(CompositionError, match="method 'pfcr' trains the code table"):
        fedllm.run({**recipe, "space": "lora"}, root=tmp_path / "lora")


def test_a_language_model_ranks_the_same_rows(tmp_path, tiny_bert_folder):
    recipe = {"model": tiny_bert_folder, "space": {"name": "lora", "rank": 2}, "method": "fellrec", "rounds": 1,
              "local": {"steps": 1, "batch_size": 4},
              "data": {"source": "sim:shops", "simulated": {"items": 12, "users": 8, "shops": 1, "segments": 2},
                       "task": "next_item", "sequences": {}, "partition": {"kind": "by_key", "key": "segment"}},
              "evaluate": {"baselines": ["item_knn"], "samples": 0}}
    result = fedllm.run(recipe, root=tmp_path)
    assert 0 <= result.evaluation["global"]["hr10"] <= 1 and result.evaluation["baselines"]["item_knn"]["global"]
