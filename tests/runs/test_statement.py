"""The privacy statement says what the record says, and no more: each sentence with a run that breaks it."""

import json

import pytest

import fedllm
from fedllm.runs.result import Result


def said(recipe, root, **changes):
    run = fedllm.run({**recipe, **changes}, root=root)
    return (run.folder / "privacy_statement.md").read_text(), run


FIVE = {"per_round": 1.0}


@pytest.mark.parametrize("select", ["uniform", "oort", "power_of_choice"])
def test_sums_only_stands_beside_what_is_told_in_the_clear(recipe, tmp_path, select):
    text, run = said(recipe, tmp_path, layers=[{"name": "secagg"}], rounds=1, select={"name": select},
                     clients={"per_round": 4})
    assert "sums only, by secagg" in text
    alone = select == "uniform"
    told = "`PowerOfChoice.probe` (numbers)" if select == "power_of_choice" else "`FedAvg.local` (numbers)"
    assert (told in text) != alone
    assert ("In the clear, each client's own" in text) != alone
    assert "No text of rows left a client" in text
    up = [e for e in map(json.loads, (run.folder / "events.jsonl").open()) if e["kind"] == "wire"
          and e["phase"] == "FedAvg.local" and e["direction"] == "up"]
    assert up and all(e["hidden"] == "SecAgg" for e in up)


def test_without_a_layer_updates_are_each_clients_own(recipe, tmp_path):
    text, _ = said(recipe, tmp_path, rounds=1)
    assert "sums only" not in text and "`FedAvg.local` (numbers, tensors)" in text


def test_text_that_leaves_is_said(recipe, tmp_path):
    """fed_sp_sc's clients send questions."""
    text, _ = said(recipe, tmp_path, rounds=1, method={"name": "fed_sp_sc", "pool": "raw", "max_new_tokens": 8},
                   evaluate={"max_new_tokens": 2, "samples": 0, "exact_match": False, "clients": False})
    assert "**Text left clients in the clear**, in `FedSPSC.offer`" in text
    assert "No text of rows left a client" not in text


@pytest.mark.slow
def test_baselines_beside_a_claim_are_marked(recipe, tmp_path):
    dp = {"layers": [{"name": "dp_fedavg", "noise_multiplier": 1.0}], "rounds": 1, "clients": FIVE,
          "evaluate": {**recipe["evaluate"], "clients": False}}
    text, _ = said(recipe, tmp_path, **dp)
    assert "differential privacy**" in text and "Not covered:** the figures" not in text
    dp["evaluate"] |= {"baselines": ["centralized"]}
    text, _ = said({**recipe, "name": "beside"}, tmp_path, **dp)
    assert "**Not covered:** the figures of the baselines centralized" in text


def test_a_claim_over_no_answers_is_no_claim(recipe, tmp_path):
    from fedllm.report.facts import read_facts
    from fedllm.report.statement import summary
    from fedllm.runs.folder import RunFolder

    _, run = said(recipe, tmp_path, rounds=1, clients=FIVE, layers=[{"name": "dp_fedavg", "noise_multiplier": 1.0}],
                  evaluate={**recipe["evaluate"], "clients": False})
    facts, result = read_facts(RunFolder.open(run.folder)), Result.load(run.folder)
    assert "differential privacy" in summary(result, facts)[0]
    facts.messages = {key: n for key, n in facts.messages.items() if key[2] != "up"}
    assert "No client answered" in summary(result, facts)[0]
