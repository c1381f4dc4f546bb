"""Trackers are told a run's figures and nothing else of it, go on with it, and never end it."""

import importlib.util
import json
import time
from typing import ClassVar

import pytest

import fedllm
from fedllm.core.errors import RecipeError
from fedllm.runs.recipe import load_recipe
from fedllm.runs.tracked import track
from fedllm.trackers import registry, stream
from fedllm.trackers.stream import Figures, Tracking, config_of
from fedllm.trackers.tracker import Tracker


def scalars(folder):
    """What a TensorBoard folder holds: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder))
    seen.Reload()
    return {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def test_tensorboard_holds_what_the_record_holds(recipe, tmp_path, monkeypatch):
    """Read back from its event file; after a stop in mid run the same file goes on, each step told once."""
    from fedllm.runs.run import Run

    told = {**recipe, "track": ["tensorboard"], "evaluate": {"every": 1, "max_new_tokens": 2, "samples": 0}}
    step = Run._round

    def stopped(self, round, total):
        if round == 2:
            raise KeyboardInterrupt
        step(self, round, total)

    monkeypatch.setattr(Run, "_round", stopped)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(told, root=tmp_path)
    monkeypatch.setattr(Run, "_round", step)
    result = fedllm.resume(tmp_path / "small")
    found = scalars(result.folder / "trackers" / "tensorboard")
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    rounds = [e for e in events if e["kind"] == "round"]
    assert found["train/loss"] == [(e["round"] + 1, pytest.approx(e["loss"])) for e in rounds] and len(rounds) == 4
    tests = [(e["round"], pytest.approx(e["global"]["loss"])) for e in events if e["kind"] == "evaluation"]
    assert found["test/loss"] == tests and [r for r, _ in tests] == [0, 1, 2, 3, 4]
    assert found["bytes/up"][-1] == (4, pytest.approx(result.bytes["up"]))
    again = track(result.folder, ["tensorboard"])
    assert again == ["tensorboard: told up to round 4 (run small)"]
    assert scalars(result.folder / "trackers" / "tensorboard") == found


def test_an_old_run_is_told_later(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path, rounds=2)
    assert not (result.folder / "trackers").exists()
    track(result.folder, ["tensorboard"])
    assert [s for s, _ in scalars(result.folder / "trackers" / "tensorboard")["train/loss"]] == [1, 2]


def test_nothing_but_figures_is_told(recipe):
    made = load_recipe({**recipe, "models": {"judge": {"endpoint": {"base_url": "http://inside.bank/v1",
                                                                    "api_key_env": "SECRET_KEY"}}}})
    config = config_of(made.model_dump())
    text = json.dumps(config)
    assert config["local.lr"] == 0.02 and config["method.name"] == "fedavg" and config["rounds"] == 4
    assert not any(word in text for word in ("SECRET", "bank", "/", "rows.jsonl"))
    figures = Figures()
    hospital = {"kind": "round", "round": 0, "cohort": ["st-mary"], "loss": 1.5, "seconds": 2.0, "note": "st-mary",
                "whom": {"st-mary": 1}, "odd": float("nan")}
    kind, step, told = figures(hospital)
    assert (kind, step) == ("round", 1) and told["train/loss"] == 1.5 and told["round/asked"] == 1
    assert "st-mary" not in json.dumps(told) and "round/odd" not in told
    _, _, tests = figures({"kind": "evaluation", "round": 1, "global": {"loss": 1.0, "n": 4},
                           "clients": {"a": {"loss": 1.0, "n": 2}, "b": {"loss": 2.0, "n": 2}}})
    assert tests == {"test/loss": 1.0, "test/n": 4.0, "clients/loss": 1.5}


class Odd(Tracker):
    """Fails, or sleeps, when it is told something."""

    package: ClassVar[str] = "json"
    sleeps: ClassVar[bool] = False

    def open(self, folder, name, config, id):
        return "x"

    def log(self, step, figures):
        if self.sleeps:
            time.sleep(60)
        raise OSError("the line is down")


def test_a_tracker_that_fails_ends_no_run_and_says_so_once(recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(registry, "trackers", lambda: {"odd": Odd})
    monkeypatch.setattr(stream, "trackers", lambda: {"odd": Odd})
    result = fedllm.run({**recipe, "track": ["odd"], "rounds": 2}, root=tmp_path)
    assert result.rounds == 2 and caplog.text.count("the line is down") == 1
    monkeypatch.setattr(Odd, "sleeps", True)
    slow = Tracking(result.folder.parent, ["odd"], {})
    slow({"kind": "round", "round": 0, "cohort": [], "loss": 1.0})
    began = time.monotonic()
    assert "within 0.2 s" in slow.close(0.2)[0] and time.monotonic() - began < 40


def test_unknown_and_missing_trackers_are_refused_before_any_work(recipe, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"track = 'tensorbord': allowed are mlflow, tensorboard, trackio, wandb"):
        fedllm.run({**recipe, "track": ["tensorbord"]}, root=tmp_path)
    with pytest.raises(RecipeError, match="named once"):
        load_recipe({**recipe, "track": ["wandb", "wandb"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"fedlm\[wandb\]"):
        fedllm.run({**recipe, "track": ["wandb"]}, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio"])
def test_trackers_with_packages_of_their_own(recipe, tmp_path, name, monkeypatch):
    """Offline, in the run's folder; told again, nothing is there twice (needs the extras mlflow, wandb, trackio)."""
    for key in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.delenv(key, raising=False)
    result = fedllm.run({**recipe, "track": [name], "rounds": 2}, root=tmp_path)
    kept = json.loads((result.folder / "trackers" / f"{name}.json").read_text())
    assert kept["id"] and kept["told"] == {"round": 2, "evaluation": 2}
    assert track(result.folder, [name]) == [f"{name}: told up to round 2 (run {kept['id']})"]
    want = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    want = [e["loss"] for e in want if e["kind"] == "round"]
    place = result.folder / "trackers" / name
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=place.resolve().as_uri())
        assert [m.value for m in client.get_metric_history(kept["id"], "train/loss")] == pytest.approx(want)
        assert client.get_run(kept["id"]).info.status == "FINISHED"
        assert client.get_run(kept["id"]).data.params["local.lr"] == "0.02"
    elif name == "wandb":
        raw = b"".join(p.read_bytes() for p in place.rglob("*.wandb"))
        assert b"train/loss" in raw and str(want[0])[:8].encode() in raw
    else:
        import sqlite3

        db, = place.rglob("*.db")
        rows = sqlite3.connect(db).execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        told = [m["train/loss"] for m in (json.loads(text) for _, text in rows) if "train/loss" in m]
        assert told == pytest.approx(want)
