"""Stages: each begins with what an earlier one ended with, and a kill between or within them changes nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fedllm
from fedllm.core.errors import CompositionError, RecipeError, RunError
from fedllm.runs.course import Course
from fedllm.runs.folder import RunFolder
from fedllm.runs.run import Run
from fedllm.runs.stages import summary

LIFE = [{"name": "pre-train", "space": "full", "local": {"lr": 1e-3}, "data": {"completion_only": False}},
        {"name": "tune", "space": {"name": "lora", "rank": 4}},
        {"name": "grow", "method": "fedprox", "rounds": 1},
        {"name": "apply", "rounds": 0}]


@pytest.fixture
def recipe(recipe):
    return recipe | {"name": "life", "rounds": 2, "local": {"lr": 0.02, "steps": 1}, "clients": {"per_round": 2},
                     "evaluate": {"exact_match": False, "samples": 0, "clients": False},
                     "stages": json.loads(json.dumps(LIFE))}


def summed(folder):
    return json.loads((folder / "stages.json").read_text())


def test_each_begins_where_the_one_before_ended(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path)
    room = tmp_path / "life" / "stages"
    assert result.folder == room / "apply" and result.rounds == 0
    said = summed(tmp_path / "life")
    assert [s["name"] for s in said["stages"]] == ["pre-train", "tune", "grow", "apply"]
    tests = {s: json.loads((room / s / "result.json").read_text())["evaluation"] for s in ("pre-train", "tune", "grow")}
    for one, other in (("pre-train", "tune"), ("tune", "grow")):
        assert tests[other]["before"]["global"]["loss"] == pytest.approx(tests[one]["global"]["loss"], rel=1e-5)
    assert result.evaluation["global"]["loss"] == pytest.approx(tests["grow"]["global"]["loss"], rel=1e-5)
    made = yaml.safe_load((room / "tune" / "recipe.yaml").read_text())
    assert made["model"]["name"] == str(room / "pre-train" / "model") and "start_from" not in made["space"]
    made = yaml.safe_load((room / "grow" / "recipe.yaml").read_text())
    assert made["space"]["start_from"] == str(room / "tune" / "adapter") and made["space"]["rank"] == 4
    assert made["method"]["name"] == "fedprox"


def test_by_hand_it_is_the_same(recipe, tmp_path):
    """Two stages are two recipes, the second of which names what the first one ended with."""
    recipe["stages"] = recipe["stages"][1:3]
    fedllm.run(recipe, root=tmp_path)
    one = {k: v for k, v in recipe.items() if k != "stages"} | {"space": {"name": "lora", "rank": 4}}
    first = fedllm.run(one, root=tmp_path / "hand")
    last = fedllm.run(one | {"rounds": 1, "method": "fedprox", "space": {
        "name": "lora", "rank": 4, "start_from": str(first.adapter_path)}}, root=tmp_path / "hand")
    assert [s["state_digest"] for s in summed(tmp_path / "life")["stages"]] == [first.state_digest, last.state_digest]


def test_another_space_begins_over_the_merged_model(recipe, tmp_path):
    recipe["stages"] = [{"name": "a", "space": {"name": "lora", "rank": 2}, "rounds": 1},
                        {"name": "b", "space": {"name": "soft_prompt", "length": 2}, "rounds": 1},
                        {"name": "c", "start": "a", "space": "ia3", "rounds": 1},
                        {"name": "d", "start": "base", "rounds": 1}]
    fedllm.run(recipe, root=tmp_path)
    room = tmp_path / "life" / "stages"
    models = {s: yaml.safe_load((room / s / "recipe.yaml").read_text())["model"]["name"] for s in "abcd"}
    assert models["b"] == models["c"] == str(room / "a" / "merged") and models["d"] == models["a"]
    theirs, ours = load_file(room / "a" / "merged" / "model.safetensors"), load_file(f"{models['a']}/model.safetensors")
    assert any(not torch.equal(theirs[n], ours[n]) for n in ours)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3])
def test_killed_within_or_between_it_ends_the_same(recipe, tmp_path, monkeypatch, at):
    """Before the round `at` of all (2: as the second stage begins, 3: within it), and once more as a stage ends."""
    whole = summary_of(fedllm.run(recipe, root=tmp_path / "whole"))
    step, publish, seen = Course.step, Run._publish, []

    def stopped(self, round):
        seen.append(round)
        if len(seen) == at + 1:
            raise KeyboardInterrupt
        return step(self, round)

    monkeypatch.setattr(Course, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(recipe, root=tmp_path)
    monkeypatch.setattr(Course, "step", step)

    def ended(self, result):
        publish(self, result)
        if self.parts.recipe.name == "tune":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_publish", ended)
    with pytest.raises(KeyboardInterrupt):
        fedllm.resume(tmp_path / "life")
    monkeypatch.setattr(Run, "_publish", publish)
    (tmp_path / "life" / "stages" / "grow").mkdir(exist_ok=True)  # it was just being made
    assert summary_of(fedllm.resume(tmp_path / "life")) == whole
    assert summary_of(fedllm.resume(tmp_path / "life")) == whole  # nothing is left to do


def summary_of(result):
    said = summed(result.folder.parents[1])
    return said["state_digest"], [s["state_digest"] for s in said["stages"]]


@pytest.mark.slow
def test_a_process_that_is_killed_for_good(recipe, tmp_path):
    whole = summary_of(fedllm.run(recipe, root=tmp_path / "whole"))
    for stage, lines in (("pre-train", 12), ("tune", 3)):
        shutil.rmtree(tmp_path / "life", ignore_errors=True)
        code = "import json, sys, fedllm; fedllm.run(json.loads(sys.argv[1]), root=sys.argv[2])"
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(recipe), str(tmp_path)])
        events, ends = tmp_path / "life" / "stages" / stage / "events.jsonl", time.monotonic() + 120
        while time.monotonic() < ends and process.poll() is None and not (
                events.exists() and events.read_bytes().count(b"\n") >= lines):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert summary_of(fedllm.resume(tmp_path / "life")) == whole


@pytest.mark.parametrize("stages, error, why", [
    ([], RecipeError, r"stages = \[\]: list should have at least 1 item"),
    ([{"space": "lora"}], RecipeError, r"stages\.0\.name: this key is needed"),
    ([{"name": "a"}, {"name": "a"}], RecipeError, "'a' is the name of 2 of them"),
    ([{"name": "base"}], RecipeError, "the name 'base' is not allowed"),
    ([{"name": "../a"}], RecipeError, "it must be of letters"),
    ([{"name": "a", "rouns": 1}], RecipeError, r"stages\.a\.rouns: unknown key; did you mean 'rounds'\?"),
    ([{"name": "a", "rounds": -1}], RecipeError, r"stages\.a\.rounds = -1"),
    ([{"name": "a", "track": []}], RecipeError, r"stages\.a\.track: this is the whole recipe's"),
    ([{"name": "a", "start": "b"}, {"name": "b"}], RecipeError, r"stages\.a\.start = 'b': allowed are base"),
    ([{"name": "a"}, {"name": "b", "model": "embedded"}], RecipeError, r"stages\.b\.model\.name = 'embedded': the"),
    ([{"name": "a", "space": "soft_prompt"}, {"name": "b"}], CompositionError,
     "'b' with space 'lora' .* cannot begin with what stage 'a' ends with: space 'soft_prompt' cannot be put into"),
    ([{"name": "a", "method": "local_only"}, {"name": "b"}], CompositionError, "ends with no language model that all"),
    ([{"name": "a"}, {"name": "b", "method": {"name": "fedprox", "mu": -1}}], RecipeError, "stage 'b': method.mu"),
    ([{"name": "a", "engine": "flare"}, {"name": "b"}], RecipeError, "flare' and stages do not go together")])
def test_stages_that_do_not_fit_are_refused_before_anything_is_made(recipe, tmp_path, stages, error, why):
    with pytest.raises(error, match=why):
        fedllm.run(recipe | {"stages": stages}, root=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_where_one_run_is_needed_the_stages_are_named(recipe, tmp_path):
    with pytest.raises(RecipeError, match="this recipe is 4 runs"):
        fedllm.plan(recipe)
    recipe["stages"] = [{"name": "a", "rounds": 0}]
    fedllm.run(recipe, root=tmp_path)
    with pytest.raises(RunError, match=r"each a run of its own: name one of them, as in .*/stages/a"):
        fedllm.export(tmp_path / "life")
    with pytest.raises(RunError, match="is a run of stages"):
        RunFolder.open(tmp_path / "life")
    with pytest.raises(RecipeError, match=r"rounds: .* is a run of stages, which keeps its recipe"):
        fedllm.resume(tmp_path / "life", rounds=9)


def test_what_stages_spend_together_is_no_less_than_each(recipe, tmp_path):
    private = {"layers": [{"name": "dp_fedavg", "clip_norm": 1.0, "noise_multiplier": 2.0}]}
    recipe["stages"] = [{"name": "a", "rounds": 1}, {"name": "b", "rounds": 1}]
    fedllm.run(recipe | private, root=tmp_path)
    said = summed(tmp_path / "life")
    each = [layer["epsilon"] for s in said["stages"] for layer in s["privacy"]["layers"]]
    assert said["privacy"]["composed"]["client"]["epsilon"] == pytest.approx(sum(each)) and min(each) > 0
    assert said["privacy"]["claim"] == "private"
    recipe["stages"] = [{"name": "a", "rounds": 1}, {"name": "b", "rounds": 1, "layers": []}]
    done = fedllm.run(recipe | private, root=tmp_path)
    said = summed(done.folder.parents[1])["privacy"]
    assert said["claim"] == "none" and said["void"] == ["b: nothing in it accounts for privacy"]
    assert summary({})["privacy"] is None
