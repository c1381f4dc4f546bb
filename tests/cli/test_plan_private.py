"""`fedllm plan` on recipes of differential privacy: what cannot be done right, and what may not be meant, is said."""

import json

import pytest

from tests.cli.test_cli import call

SHARED = {"name": "dp_sgd", "noise": "shared", "epsilon": 4.0, "delta": 1e-3}
TREE = {"name": "dp_ftrl", "unit": "example", "epsilon": 4.0, "delta": 1e-3}
LOCAL = {"name": "dp_sgd", "epsilon": 4.0, "delta": 1e-3}
CLIENTS = {"name": "dp_fedavg", "epsilon": 4.0, "delta": 0.01}
BANDED = {"name": "dp_ftrl", "epsilon": 4.0, "delta": 0.01, "mechanism": "banded", "min_separation": 2}
SEVERAL = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Plan a recipe of six clients of nine rows; exit code and all that was said."""
    monkeypatch.setenv("COLUMNS", "1000")
    rows = [{"text": f"w{i} say the {'red' if i % 2 else 'blue'} word", "label": ["no", "yes"][i % 2]}
            for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def plan(layers, more):
        recipe = {"name": "p", "model": "embedded", "rounds": 6, "space": "head", "layers": layers,
                  "local": {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64},
                  "data": {"source": str(tmp_path / "rows.jsonl"), "task": "classification", "test": 0.1,
                           "client_test": 0.0, "partition": {"kind": "iid", "clients": 6}},
                  "evaluate": {"clients": False, "samples": 0}, **more}
        (tmp_path / "p.json").write_text(json.dumps(recipe))
        code, out, err = call(capsys, "plan", str(tmp_path / "p.json"))
        return code, f"{out} {err}"

    return plan


@pytest.mark.parametrize("layers,more,why", [
    # an epsilon that no number of rounds reaches
    ([{**SHARED, "noise_multiplier": 0.3}, "secagg"], {}, "layers.0.epsilon = 4 is not allowed with noise_multiplier = "
                                                          "0.3: a single round costs"),
    ([{**TREE, "noise_multiplier": 0.3}, "secagg"], {}, "layers.0.epsilon = 4 is not allowed with noise_multiplier"),
    ([{**LOCAL, "noise_multiplier": 0.1}], {"local": SEVERAL}, "layers.0.epsilon = 4 is not allowed with noise"),
    ([{**CLIENTS, "noise_multiplier": 0.3}], {}, "no number of rounds keeps to it"),
    ([{**BANDED, "noise_multiplier": 0.3}], {}, "no number of rounds keeps to it"),
    # a delta above one over those whom it is about
    ([{**SHARED, "delta": 0.05}, "secagg"], {}, "layers.0.delta = 0.05 is not allowed with 54 units; it must be"),
    ([{**TREE, "delta": 0.05}, "secagg"], {}, "layers.0.delta = 0.05 is not allowed with 54 units"),
    ([{**LOCAL, "delta": 0.2}], {"local": SEVERAL}, "layers.0.delta = 0.2 is not allowed with 9 units"),
    ([{**CLIENTS, "delta": 0.2}], {}, "layers.0.delta = 0.2 is not allowed with 6 units"),
    ([{**BANDED, "delta": 0.2}], {}, "layers.0.delta = 0.2 is not allowed with 6 units"),
    # the ring
    ([{"name": "secagg", "quantum": 1e-9}], {}, "overflow the ring of 2^32; the finest quantum that fits"),
    # fewer clients than the noise or the sum needs
    ([SHARED, "secagg"], {"clients": {"per_round": 2}}, "at least 3 and 2 take part; ask more clients "
                                                        "(clients.per_round)"),
    ([{**SHARED, "colluding": 5}, "secagg"], {}, "layers.0.colluding = 5 is not allowed: a sum opens when 5 of 6"),
    ([{**TREE, "colluding": 5}, "secagg"], {}, "layers.0.colluding = 5 is not allowed: a sum opens when 5 of 6"),
    ([SHARED], {}, "no layer below hides what clients send; list secagg"),
    # a sampling that nothing covers
    ([SHARED, "secagg"], {"local": {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 4}},
     "local.batch_size = 4 is not allowed: a client has 9 rows, a part of them would be a sampling"),
    ([TREE, "secagg"], {"rounds": 40}, "layers.0.restart_every = 40 is not allowed: a client has 9 rows"),
    ([{**CLIENTS, "rate": 0.5}], {}, "layers.0.rate = 0.5 is not allowed with sampling 'none'"),
    ([CLIENTS], {"select": "power_of_choice"}, "reads clients' losses without noise")])
def test_what_cannot_be_done_right_is_refused_before_anything_is_trained(planned, layers, more, why):
    code, said = planned(layers, more)
    assert code == 2 and why in said, said
    assert "a slice of the run is tried" not in said


@pytest.mark.parametrize("layers,more,says,minds", [
    ([SHARED, "secagg"], {}, "dp_sgd: epsilon 4.00 at delta 0.001 with noise multiplier 2.21; 6 rounds fit", ""),
    ([TREE, "secagg"], {}, "dp_ftrl: epsilon 4.00 at delta 0.001 with noise multiplier 1.57; 6 rounds fit", ""),
    ([{**SHARED, "clip_norm": 1e-4}, "secagg"], {}, "dp_sgd: epsilon 4.00", ""),  # every client had refused the scale
    ([{**SHARED, "noise_multiplier": 2.0}, "secagg"], {}, "epsilon 4.53", "layers.0: 6 rounds would cost epsilon 4.53, "
     "and the budget is 4: the run will end after 4 of them"),
    ([SHARED, "secagg"], {"clients": {"availability": 0.5}}, "epsilon 4.00", "layers.1: of 6 clients asked 3 answer on "
     "average (availability, dropout), and a sum opens where 5 do: 89 % of the rounds would be lost"),
    ([SHARED, {"name": "secagg", "clip": 1.0}], {"clients": {"dropout": 0.02}}, "epsilon 4.00", ""),
    ([{"name": "secagg", "clip": 1e-6}], {}, "no layer that accounts", "layers.0: an entry of what a client adds"),
    ([CLIENTS], {"clients": {"per_round": 3}}, "dp_fedavg: epsilon 4.00", "layers.0: 3 of 6 clients are asked "
     "(clients.per_round), who follow from the recipe's seed: no epsilon is saved by that")])
def test_a_plan_says_what_will_be_spent_and_what_may_not_be_meant(planned, layers, more, says, minds):
    code, said = planned(layers, more)
    assert code == 0 and says in said, said
    assert (minds in said) if minds else ("mind" not in said), said
    assert "_compute_log_a_frac" not in said


@pytest.mark.slow
def test_accountants_warnings_of_single_orders_do_not_bury_the_plan(planned):
    code, said = planned([LOCAL], {"local": SEVERAL})
    assert code == 0 and "dp_sgd: epsilon" in said and "Excluding this order" not in said
