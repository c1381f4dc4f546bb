"""A plan says beforehand what a run then measures."""

import pytest

import fedllm

METHODS = ["fedavg", "flora_stacking", "rolora", "scaffold", "local_only", "hetlora"]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_within_ten_percent(recipe, tmp_path, method):
    recipe |= {"method": method, "rounds": 5, "evaluate": {"exact_match": False, "every": 2}}
    if method == "scaffold":
        recipe["local"] = {"lr": 0.05, "optimizer": "sgd"}
    if method in ("flora_stacking", "hetlora"):
        recipe["clients"] = {"per_round": 1.0, "ranks": [2, 4, 8]}
    if method == "hetlora":
        recipe["space"] = {"name": "lora", "scaling": "shared"}
    plan, run = fedllm.plan(recipe), fedllm.run(recipe, root=tmp_path)
    for way, planned in (("up", plan.up), ("down", plan.down)):
        assert abs(planned - run.bytes[way]) <= 0.1 * run.bytes[way], (way, planned, run.bytes)
        assert plan.evaluation[way] == pytest.approx(run.bytes["evaluation"][way], rel=0.1)
    assert plan.peak_memory_bytes == pytest.approx(run.peak_memory_bytes, rel=0.3)
    assert plan.seconds > 0  # wall-clock time is measured by hand: a busy machine is no yardstick


def test_plan_and_run_book_the_same_bytes_to_the_same_side(recipe, tmp_path):
    """Where every message weighs the same, what is foreseen is what is sent, to the byte: rounds and tests apart."""
    recipe |= {"clients": {"per_round": 1.0}, "evaluate": {"exact_match": False, "every": 2}}
    plan, run = fedllm.plan(recipe), fedllm.run(recipe, root=tmp_path)
    assert {"up": plan.up, "down": plan.down, "by_phase": plan.by_phase, "evaluation": plan.evaluation} == run.bytes
    assert run.bytes["evaluation"]["down"] > 0 and "FedAvg.score" not in run.bytes["by_phase"]


def test_nothing_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = fedllm.plan(recipe | {"evaluate": {"baselines": ["centralized"], "max_new_tokens": 2}})
    assert not list(tmp_path.iterdir())
    assert plan.cohort == 3 and plan.seconds_baselines > 0 and set(plan.as_json()) >= {"up", "down", "seconds"}


def test_availability_lowers_what_is_sent(recipe):
    sure, unsure = fedllm.plan(recipe), fedllm.plan(recipe, **{"clients.availability": 0.5})
    phase = "FedAvg.local"
    assert unsure.by_phase[phase]["up"] == pytest.approx(0.5 * sure.by_phase[phase]["up"], rel=0.01)
