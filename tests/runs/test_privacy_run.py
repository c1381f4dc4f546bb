"""Privacy layers in whole runs: foreseen, spent, resumed, the same on every engine, and void when something leaks."""

import json
import logging

import pytest

import fedllm
from fedllm.core.errors import CompositionError, RecipeError
from tests.dying import killed

QUIET = {"exact_match": False, "clients": False, "samples": 0}
LAYERS = {
    "dp_fedavg": {"name": "dp_fedavg", "noise_multiplier": 1.5, "clip_norm": 0.5, "delta": 0.01},
    "dp_ftrl": {"name": "dp_ftrl", "noise_multiplier": 3.0, "mechanism": "banded", "min_separation": 2, "delta": 0.01},
    "dp_sgd": {"name": "dp_sgd", "noise_multiplier": 1.0}}


@pytest.fixture
def spec(recipe):
    return recipe | {"evaluate": QUIET, "clients": {}, "rounds": 6, "local": {"optimizer": "sgd", "lr": 0.05}}


def test_a_plan_says_that_the_ring_will_overflow(spec):
    """Before the run: with the steps of a round, the entry to expect, and a clip that is large enough."""
    assert not [c for c in fedllm.plan(spec | {"layers": ["secagg"]}).cautions if "ring" in c]
    said = [c for c in fedllm.plan(spec | {"layers": [{"name": "secagg", "clip": 0.01}]}).cautions if "ring" in c]
    assert len(said) == 1 and "layers.0: an entry" in said[0] and "clip = 0.01" in said[0]
    enough = float(said[0].partition("set clip to ")[2].partition(",")[0])
    fixed = spec | {"layers": [{"name": "secagg", "clip": enough}], "rounds": 1}
    assert not [c for c in fedllm.plan(fixed).cautions if "ring" in c]


def test_a_plan_foresees_shared_noise_and_the_run_keeps_to_it(spec, tmp_path):
    step = {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64}
    more = {"layers": [{"name": "dp_sgd", "noise": "shared", "epsilon": 5.0, "delta": 1e-3}, "secagg"], "rounds": 2,
            "local": step}
    foreseen = fedllm.plan(spec | more)
    got = fedllm.run(spec | more, root=tmp_path)
    assert foreseen.privacy[0]["noise_share"] > 0.3  # a few rows and thousands of trainables: nothing can be learned
    assert got.skipped == [] and got.privacy["claim"] == "private"
    assert 4.5 < foreseen.epsilon <= 5.0
    assert got.privacy["layers"][0]["epsilon"] == pytest.approx(foreseen.epsilon)


def killed_and_resumed(spec, root, rounds=3):
    killed(spec, root, rounds)
    return fedllm.resume(root / "small")


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["dp_sgd", *(pytest.param(x, marks=pytest.mark.slow) for x in LAYERS
                                              if x != "dp_sgd")])
def test_a_killed_run_ends_with_the_same_epsilon_and_digest(spec, tmp_path, layer):
    spec["layers"] = [LAYERS[layer] | {"seed": 5}]  # seeded, so that a run from the start can be compared
    whole, cut = fedllm.run(spec, root=tmp_path / "whole"), killed_and_resumed(spec, tmp_path / "cut")
    assert cut.state_digest == whole.state_digest
    assert json.loads(json.dumps(cut.privacy)) == json.loads(json.dumps(whole.privacy))
    spec["layers"] = [LAYERS[layer]]  # the operating system's noise: another digest, the same price
    free, cut = fedllm.run(spec, root=tmp_path / "free"), killed_and_resumed(spec, tmp_path / "cut2")
    (a,), (b,) = free.privacy["layers"], cut.privacy["layers"]
    assert free.privacy["claim"] == cut.privacy["claim"] == "private" and a["epsilon"] == b["epsilon"] > 0
    assert free.state_digest != cut.state_digest != whole.state_digest


@pytest.mark.parametrize("stack", [["dp_fedavg", "secagg"], ["dp_ftrl", "secagg_plus"], ["codec_powersgd", "secagg"]])
def test_layers_are_the_same_on_every_engine(spec, tmp_path, stack):
    """In process, vectorized, and with every message as bytes: one digest, as the layers know no engine."""
    spec["layers"] = [LAYERS[x] | {"seed": 5} if x in LAYERS else {"name": x} for x in stack]
    spec["data"] |= {"partition": {"kind": "iid", "clients": 8}}  # masks need a cohort of three
    spec |= {"rounds": 3, "model": {"name": spec["model"], "dtype": "float64"}}
    runs = [fedllm.run(spec, root=tmp_path / str(i), engine=engine) for i, engine in enumerate((
        {"kind": "vectorized"}, {"kind": "vectorized", "loopback": True}, {"kind": "in_process", "loopback": True}))]
    assert runs[0].state_digest == runs[1].state_digest
    assert json.dumps(runs[0].privacy) == json.dumps(runs[2].privacy)
    assert distance(runs[0], runs[2]) < 1e-5


def distance(a, b):
    """Largest difference of the two adapters (engines agree to rounding, and the ring to its quantum)."""
    from safetensors.torch import load_file

    x, y = (load_file(r.adapter_path / "adapter_model.safetensors") for r in (a, b))
    return max(float((x[k].double() - y[k].double()).abs().max()) for k in x)


@pytest.mark.slow
@pytest.mark.parametrize("layer, unit", [("dp_fedavg", "client"), ("dp_ftrl", "client"), ("dp_sgd", "example")])
def test_the_plan_says_what_the_run_then_spends(spec, tmp_path, layer, unit):
    knobs = {k: v for k, v in LAYERS[layer].items() if k != "noise_multiplier"}
    spec["layers"] = [knobs | {"epsilon": 6.0}]
    plan = fedllm.plan(spec)
    (says,) = plan.privacy
    assert says["unit"] == unit and 5.8 < says["epsilon"] <= 6.0 and plan.epsilon == says["epsilon"]
    assert says["rounds_that_fit"] == 6
    run = fedllm.run(spec, root=tmp_path)
    (said,) = run.privacy["layers"]
    assert said["noise_multiplier"] == says["noise_multiplier"] > 0
    assert said["epsilon"] == pytest.approx(says["epsilon"], rel=0.01)
    assert run.privacy["claim"] == "private" and run.rounds == 6
    assert f"({said['epsilon']:.4g}, " in (run.folder / "privacy_statement.md").read_text()
    spec["layers"] = [LAYERS[layer] | {"epsilon": said["epsilon"] / 2, "noise_multiplier": said["noise_multiplier"]}]
    fits = fedllm.plan(spec).privacy[0]["rounds_that_fit"]
    assert 0 <= fits < 6 and (fits > 0 or layer == "dp_ftrl")  # correlated noise is paid for all at once
    if fits:
        short = fedllm.run(spec, root=tmp_path / "short")
        assert short.rounds == fits and short.privacy["layers"][0]["epsilon"] <= said["epsilon"] / 2


def test_the_terminal_shows_the_plan_s_privacy(spec, tmp_path, capsys):
    from tests.cli.test_cli import call

    spec["layers"] = [LAYERS["dp_fedavg"] | {"epsilon": 40.0}]
    (tmp_path / "r.yaml").write_text(json.dumps(spec))
    code, out, _ = call(capsys, "plan", str(tmp_path / "r.yaml"))
    assert code == 0 and "privacy dp_fedavg: epsilon" in out and "rounds fit the budget" in out
    assert json.loads(call(capsys, "plan", str(tmp_path / "r.yaml"), "--json")[1])["epsilon"] > 0


def test_client_metrics_take_the_claim_away_loudly(spec, tmp_path, caplog):
    spec |= {"layers": [LAYERS["dp_fedavg"]], "evaluate": QUIET | {"clients": True}, "rounds": 1}
    with caplog.at_level(logging.WARNING):
        run = fedllm.run(spec, root=tmp_path)
    assert run.privacy["claim"] == "none" and "evaluate.clients" in run.privacy["void"][0]
    assert "can make no privacy claim: evaluate.clients" in caplog.text
    card = (run.folder / "model_card.md").read_text()
    assert "No privacy claim stands" in card and "differential privacy**" not in card
    spec["layers"] = [LAYERS["dp_sgd"]]  # held-out rows are other rows
    assert fedllm.run(spec, root=tmp_path / "rows").privacy["claim"] == "private"


@pytest.mark.parametrize("layer, says", [
    ({"name": "dp_fedavg", "epsilon": 0}, "layers.0.epsilon = 0"),
    ({"name": "dp_fedavg", "epsilon": -1.0}, r"layers.0.epsilon = -1.0 is not allowed; it must be > 0"),
    ({"name": "dp_sgd", "epsilon": 0.0}, "layers.0.epsilon = 0.0"),
    ({"name": "dp_ftrl", "epsilon": 0.0}, "layers.0.epsilon = 0.0"),
    ({"name": "dp_fedavg", "noise_multiplier": 1.0, "delta": 0.2}, r"delta = 0.2 is not allowed with 5 units.*< 1/5"),
    ({"name": "dp_ftrl", "noise_multiplier": 1.0, "delta": 0.25}, r"delta = 0.25 is not allowed with 5 units"),
    ({"name": "dp_sgd", "noise_multiplier": 1.0, "delta": 0.5}, r"delta = 0.5 is not allowed with \d+ units"),
    ({"name": "dp_fedavg", "noise_multiplier": 1.0, "clip_norm": 0}, "layers.0.clip_norm = 0"),
    ({"name": "dp_sgd", "noise_multiplier": 1.0, "clip_norm": -1.0}, "layers.0.clip_norm = -1.0"),
    ({"name": "dp_ftrl", "noise_multiplier": 1.0, "clip_norm": 0.0}, "layers.0.clip_norm = 0.0"),
    ({"name": "secagg", "threshold": 1.0}, r"layers.0.threshold = 1.0 is not allowed; it must be >= 0.5 and < 1"),
    ({"name": "secagg", "clip": 0}, "layers.0.clip = 0")])
def test_bad_values_name_the_key_the_value_and_what_is_allowed(spec, tmp_path, layer, says):
    spec["layers"] = [layer]
    with pytest.raises(RecipeError, match=says):
        fedllm.run(spec, root=tmp_path)
    assert not list(tmp_path.iterdir())  # refused before anything is made


@pytest.mark.parametrize("layer, says", [
    ({"name": "secagg", "quantum": 1e-9}, "overflow the ring"),
    ({"name": "secagg"}, "hides a client among at least 3 and 2 take part")])
def test_what_cannot_hold_is_refused_before_the_run(spec, tmp_path, layer, says):
    spec |= {"layers": [layer], "clients": {"per_round": 2 if "2 take" in says else 1.0}}
    with pytest.raises(CompositionError, match=says):
        fedllm.run(spec, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["codec_quant", "codec_topk_ef", "codec_powersgd", "secagg", "thgs_secagg"])
def test_the_report_and_the_card_are_written_under_every_layer(recipe, tmp_path, layer):
    result = fedllm.run(recipe | {"rounds": 1, "layers": [layer], "clients": {"per_round": 1.0}}, root=tmp_path)
    page = (result.folder / "report.html").read_text()
    assert ("each client&#x27;s reply" if layer.startswith("codec") else f"sums only, by {layer}") in page
