"""MetePFL: what is trained when, what the graph makes of prompts, what crosses, and the field's own rules beside."""

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, RecipeError, Withheld
from fedllm.core.payload import tensor_bytes
from fedllm.local.objectives.impute import spans
from fedllm.methods._similar import smoothed
from fedllm.methods.registry import make_method
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import Encoded
from tests.methods.applications import HORIZON, VARIABLES
from tests.methods.conftest import tried

PLAIN = tried("metepfl")


def test_first_the_encoder_is_trained_and_then_prompts_alone(begin, gap):
    run = begin("metepfl", **PLAIN)
    start = run.state
    one = run.go(1).state
    assert gap(start["prompt"], one["prompt"]) == 0 and gap(start["encoder"], one["encoder"]) > 0
    two = run.go(1).state
    assert gap(one["encoder"], two["encoder"]) == 0
    assert all(not torch.equal(one["prompt"][n], two["prompt"][n]) for n in one["prompt"])  # a gradient reaches each


def test_what_a_graph_makes_of_prompts():
    prompts = [{"p": torch.tensor([float(i), 2.0 * i], dtype=torch.float64)} for i in (0, 1, 5)]
    method = lambda graph: make_method("metepfl", graph=graph).weights  # noqa: E731
    flat = lambda graph: [p["p"].tolist() for p in smoothed(prompts, method(graph), 2, 0.2)]  # noqa: E731
    assert flat("none") == [pytest.approx(p["p"].tolist()) for p in prompts]
    assert flat("mean") == [pytest.approx([0.8 * 2 + 0.2 * i, 0.8 * 4 + 0.4 * i]) for i in (0, 1, 5)]
    near = flat("similarity")
    assert near[0][0] < 1.6 and near[2][0] > 0.8 * 2 + 0.2 * 5  # the two that are near lean on one another
    same = [{"p": torch.ones(2)}] * 3
    assert all(torch.equal(p["p"], torch.ones(2)) for p in smoothed(same, make_method("metepfl").weights, 2, 0.2))
    order = smoothed(prompts[::-1], make_method("metepfl").weights, 2, 0.2)[::-1]
    assert [p["p"].tolist() for p in order] == [pytest.approx(p) for p in near]


def test_a_round_of_prompts_sends_prompts_and_the_encoder_once(begin):
    run = begin("metepfl", **PLAIN, dtype=torch.float32, loopback=True).go(2)
    assert tensor_bytes(run.state["prompt"]) == 4 * (HORIZON * VARIABLES + 4 * HORIZON)
    run.go(1)
    wire = [e for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"]
    size = {r: max(e["bytes"] for e in wire if e["round"] == r) for r in (1, 2)}
    assert size[1] - size[2] > tensor_bytes(run.state["encoder"])


def test_who_lost_the_encoder_says_so_and_is_told_it_again(begin):
    run = begin("metepfl", **PLAIN).go(2)
    run.engine.memory["c1"].clear()
    assert "c1" not in run.go(1).state["holds"] and "c1" in run.go(1).state["holds"]
    with pytest.raises(Withheld, match="lost the encoder"):
        run.method.learn({}, type("Client", (), {"memory": {}})())


def test_masks_are_runs_of_the_asked_share_and_length():
    masks = spans(np.random.default_rng(0), 400, 60, 3, 0.15, 3.0)
    starts = ((masks[:, 1:] == 1) & (masks[:, :-1] == 0)).sum()
    assert masks.mean() == pytest.approx(0.15, abs=0.01)
    assert masks[:, 1:].sum() / starts == pytest.approx(3.0, abs=0.35)


def test_rules_by_hand():
    """An AR process without noise is foretold exactly, and a constant one by persistence."""
    x = [1.0, 0.5]
    for _ in range(60):
        x.append(1.6 * x[-1] - 0.81 * x[-2])
    rows = [Encoded(np.zeros(6, np.int32), 0, 2, {
        "past": np.array(x[i : i + 4], np.float32)[:, None], "future": np.array(x[i + 4 : i + 6], np.float32)[:, None],
        "scale": np.array([5.0, 10.0])}) for i in range(50)]
    task = task_of("forecast")
    assert task.by_rule("linear_ar", rows[:20], rows[:20], ())["mae"] < 0.05
    last = task.by_rule("persistence", rows, rows, ())
    off = [10 * abs(x[i + 3] - x[i + 4 + h]) for i in range(50) for h in range(2)]
    assert last["mae"] == pytest.approx(np.mean(off), rel=1e-5) and last["n"] == 50


RECIPE = {"model": {"name": "series", "width": 8, "depth": 1}, "space": "full", "rounds": 2,
          "method": {"name": "metepfl", "pretrain_rounds": 1}, "local": {"steps": 2, "batch_size": 4},
          "data": {"source": "sim:stations", "simulated": {"stations": 2, "steps": 60, "variables": 2},
                   "task": "forecast", "partition": {"kind": "by_key", "key": "series"},
                   "windows": {"of": ["temperature", "pressure"], "time": "hour", "series": "station", "horizon": 4}},
          "evaluate": {"baselines": ["persistence", "linear_ar"]}}


def test_a_recipe_runs_with_its_fields_rules_beside(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # no process of its own for two rules
    result = fedllm.run(RECIPE, root=tmp_path)
    got = result.evaluation["baselines"]
    assert set(got) == {"persistence", "linear_ar"} and set(got["linear_ar"]["clients"]) == {"station-00", "station-01"}
    assert result.evaluation["global"]["mae"] > 0 and got["persistence"]["global"]["rmse"] > 0
    assert (tmp_path / "run" / "model" / "series.safetensors").is_file()
    report, card = result.report_path.read_text(), (tmp_path / "run" / "model_card.md").read_text()
    assert "persistence" in report and "| linear ar |" in card and "the recipe beside it says how it is built" in card
    plan = fedllm.plan(RECIPE)
    assert plan.seconds_baselines == 0


@pytest.mark.parametrize("change, why", [
    ({"evaluate": {"baselines": ["persistence"]}, "model": "embedded", "method": "fedavg", "data": {}, "space": "lora"},
     "'persistence' is no rule of data.task = 'generation'"),
    ({"model": "embedded"}, "data.task = 'forecast' and model.name = 'embedded' do not fit together"),
    ({"model": {"name": "series", "width": 12}}, "model.width"),
    ({"data": {**RECIPE["data"], "windows": None}}, "data.task = 'forecast'|no field 'past'|needs data.windows"),
    ({"space": "head"}, "metepfl|head")])
def test_what_does_not_fit_is_refused(change, why, tmp_path):
    with pytest.raises((RecipeError, CompositionError, fedllm.FedLLMError), match=why):
        fedllm.run({**RECIPE, **change}, root=tmp_path)
