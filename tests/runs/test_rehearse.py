"""Settings for a wanted epsilon are found on public rows, with the noise that the real run will have."""

import json

import numpy as np
import pytest

import fedllm
from fedllm.core.errors import RecipeError
from fedllm.privacy.accountant import noise_for
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe
from fedllm.runs.rehearse import Setting, _Stage, propose

PRIVATE = {"name": "dp_sgd", "noise": "shared", "epsilon": 60.0, "delta": 1e-3, "clip_norm": 1.0}


@pytest.fixture
def private(tiny_bert_folder, tmp_path):
    """Two words decide a row; the rate that the recipe gives is far too small."""
    coins = np.random.default_rng(0)
    rows = [{"text": " ".join(coins.choice(list("abcdefgh"), 2)) + (" good good good" if i % 2 else " bad bad bad"),
             "label": ["no", "yes"][i % 2]} for i in range(240)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "private", "model": {"name": tiny_bert_folder, "pooling": "mean"}, "space": "head", "rounds": 4,
            "method": "fedavg", "layers": [PRIVATE, "secagg"], "evaluate": {"clients": False, "samples": 0},
            "local": {"optimizer": "sgd", "lr": 0.01, "steps": 1, "batch_size": 512},
            "data": {"source": str(tmp_path / "rows.jsonl"), "task": "classification", "labels": ["no", "yes"],
                     "client_test": 0.0, "fields": {"text": "text", "label": "label"},
                     "partition": {"kind": "iid", "clients": 4}, "public": 0.25}}


def test_what_is_proposed_is_a_run_and_beats_a_rate_that_is_too_small(private):
    found = propose(private)
    assert found == propose(private)  # by the recipe's seed
    best = found.tried[0]
    assert best.loss < found.own.loss and best.setting.lr > 0.05 and best.seeds == found.own.seeds == 3
    again = load_recipe(private, dict(fedllm.runs.complaints.parse_override(o) for o in found.overrides))
    assert (again.rounds, again.layers[0].knobs["clip_norm"]) == (best.setting.rounds, best.setting.clip_norm)
    assert found.rows + found.tested == 54 and found.metric == "accuracy"
    for tried in found.tried:  # each pays for its own rounds
        z = noise_for(60.0, 1e-3, tried.setting.rounds, law="discrete")
        assert tried.noise_multiplier == pytest.approx(z, rel=1e-6)


@pytest.mark.parametrize("noise,batch", [("shared", 512), ("local", 9)])
def test_noise_stands_to_the_rows_at_hand_as_it_will(private, monkeypatch, noise, batch):
    """The noise of a rehearsal's mean gradient is the real run's, for the sum of all and for each client's own."""
    from fedllm.runs import rehearse

    private |= {"layers": [PRIVATE | {"noise": noise}, *(["secagg"] if noise == "shared" else [])]}
    made, plain = [], rehearse.bound
    monkeypatch.setattr(rehearse, "bound", lambda layers, *rest: made.extend(layers) or plain(layers, *rest))
    monkeypatch.setattr(rehearse._Stage, "_noise", lambda self, setting: 5.0)
    stage = _Stage(build(load_recipe(private, {"local.batch_size": batch})), 0)
    stage.rehearse(Setting(1, 0.1, 1.0, batch), 0)
    here, there = 38 / 4, 162 / 4  # rows of a client: 70 % of 54 public ones, and 162 private ones
    assert made[-1].noise_multiplier == pytest.approx(5.0 * here / there)
    assert made[-1].noise == ("central" if noise == "shared" else "local")


@pytest.mark.slow
def test_where_a_client_is_what_is_private_whole_clients_rehearse_it(private, monkeypatch):
    """Of as many rows as the real ones, with the noise of their sum by their number; the server's rate counts too."""
    private |= {"layers": [{"name": "dp_fedavg", "epsilon": 60.0, "delta": 1e-3, "clip_norm": 0.3, "clip_lr": 0.0}],
                "local": {**private["local"], "lr": 1.0}}
    private["data"]["partition"]["clients"] = 54  # three rows each
    stage = _Stage(build(load_recipe(private)), 0)
    assert {len(s.train) for s in stage.shards.values()} <= {3, 4} and len(stage.shards) == 12
    made, plain = [], stage._trial
    monkeypatch.setattr(stage, "_trial", lambda *rest: made.append(plain(*rest)) or made[-1])
    tried = stage.rehearse(Setting(1, 1.0, 0.3, 512, 5.0), 0)
    assert made[-1].noise_multiplier == pytest.approx(tried.noise_multiplier * 12 / 54 * (38 / 12) / 3)


def test_settings_of_rows_in_turn_are_rehearsed_with_the_noise_of_the_federations_tree(private, monkeypatch):
    tree = {"name": "dp_ftrl", "unit": "example", "epsilon": 60.0, "delta": 1e-3, "restart_every": 2}
    private |= {"layers": [tree, "secagg"], "local": {**private["local"], "lr": 1.0}}
    stage = _Stage(build(load_recipe(private)), 0)
    made, plain = [], stage._trial
    monkeypatch.setattr(stage, "_trial", lambda *rest: made.append(plain(*rest)) or made[-1])
    tried = stage.rehearse(Setting(4, 1.0, 1.0, 512), 0)
    here, there = 38 / 4, 162 / 4  # rows of a client, as below shared noise
    assert made[-1].noise_multiplier == pytest.approx(tried.noise_multiplier * here / there / 4**0.5)
    assert made[-1].restart_every == 2 and np.isfinite(tried.loss)
    twice = stage.rehearse(Setting(8, 1.0, 1.0, 512), 0)  # four readings of each row and not two
    assert twice.noise_multiplier > tried.noise_multiplier


@pytest.mark.parametrize("change,says", [
    ({"layers": ["secagg"]}, r"layers = \['secagg'\].*dp_ftrl or dp_fedavg; add one"),
    ({"layers": [{"name": "dp_sgd", "noise_multiplier": 1.0}]}, "layers.0.epsilon is not given"),
    ({"layers": [{"name": "dp_ftrl", "epsilon": 4.0, "delta": 1e-3, "mechanism": "banded"}]},
     "layers.0.unit = 'client': settings of dp_ftrl are proposed for unit: example alone"),
    ({"data.public": 0.0}, "data.public gives 0 rows; settings are proposed from 6")])
def test_what_cannot_be_proposed_is_refused(private, change, says):
    with pytest.raises(RecipeError, match=says):
        propose(private, **change)
