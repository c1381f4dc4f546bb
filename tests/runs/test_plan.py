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


def test_dropout_lowers_what_is_sent_up_alone(recipe):
    sure, unsure = fedllm.plan(recipe), fedllm.plan(recipe, **{"clients.dropout": 0.5})
    sent, less = (p.by_phase["FedAvg.local"] for p in (sure, unsure))
    assert less["up"] == pytest.approx(0.5 * sent["up"], rel=0.01) and less["down"] == sent["down"]


def test_a_large_models_plan_tries_out_less_and_foresees_the_same(recipe, tmp_path, monkeypatch):
    """As if the model were too large to try whole batches of many clients."""
    from fedllm.runs import thin

    recipe |= {"clients": {"per_round": 1.0}, "evaluate": {"exact_match": False}}
    whole = fedllm.plan(recipe)
    seen, plain = [], thin.Thin.of.__func__
    monkeypatch.setattr(thin.Thin, "of", classmethod(lambda *a: (seen.append(plain(*a)), seen[-1])[1]))
    monkeypatch.setattr(thin, "OPERATIONS", 1e3)
    monkeypatch.setattr(thin, "OF_TESTS", 1e3)
    part = fedllm.plan(recipe)
    assert (seen[0].batch, seen[0].test_rows) == (1, 4) and seen[0].times > 1 and seen[0].missing > 0
    assert (part.up, part.down, part.by_phase, part.evaluation) == (whole.up, whole.down, whole.by_phase,
                                                                    whole.evaluation)
    run = fedllm.run(recipe, root=tmp_path)
    assert run.seconds / 5 < part.seconds < 20 * max(run.seconds, 0.2)
    assert part.peak_memory_bytes == pytest.approx(run.peak_memory_bytes, rel=0.5)


def test_a_plan_says_what_the_model_weighs_before_it_loads_it(recipe, tiny_llama_folder, caplog):
    caplog.set_level("INFO")
    fedllm.plan(recipe | {"model": tiny_llama_folder, "evaluate": {"exact_match": False}})
    said = [r.message for r in caplog.records if r.message.startswith("plan: ")]
    assert "M weights" in said[0] and "slice" in said[1]
