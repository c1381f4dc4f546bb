"""A run in virtual time under a selector: what the recipe says, what the result says, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

import fedllm
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.profiles import drawn
from fedllm.runs.recipe import load_recipe

FLEET = {"speed": {"lognormal": 1.0}, "bandwidth": 1e5, "step_seconds": 1.0}


def test_a_selector_and_a_fleet_for_any_method(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path, select="oort", rounds=3, method="fedadam",
                        clients={"per_round": 2, **FLEET}, evaluate={"clients": False, "samples": 0})
    told = json.loads((result.folder / "result.json").read_text())
    rounds = [e for e in RunFolder(result.folder).events() if e["kind"] == "round"]
    assert told["virtual"]["seconds"] == rounds[-1]["virtual"] > rounds[0]["virtual"] > 0
    assert all(len(r["cohort"]) == 2 for r in rounds) and told["seconds"] != told["virtual"]["seconds"]


def test_late_answers_outlive_a_killed_run(recipe, tmp_path):
    asked = {"method": {"name": "fedbuff", "buffer_size": 2, "concurrency": 3}, "clients": {"per_round": 1.0, **FLEET},
             "evaluate": {"clients": False, "samples": 0, "exact_match": False}}
    whole = fedllm.run(recipe | asked, root=tmp_path, rounds=4)
    cut = tmp_path / "cut"
    shutil.copytree(whole.folder, cut)
    (cut / "result.json").unlink()
    folder = RunFolder(cut)
    (folder.checkpoints / f"{folder.rounds()[-1]:06d}.json").unlink()  # the last round is done again
    assert folder.load()[0] < 4
    again = fedllm.resume(cut)
    assert again.state_digest == whole.state_digest and again.virtual == whole.virtual
    assert sum(again.reports["FedBuff"]["answers"].values()) == 8


@pytest.mark.parametrize("change, words", [
    ({"select": "orot"}, r"select\.name = 'orot' is unknown; did you mean 'oort'\? Allowed: by_energy, by_loss, "),
    ({"select": {"name": "oort", "blacklist": -3}}, r"select\.blacklist = -3 is not allowed; it must be >= -1"),
    ({"select": {"name": "oort", "explore": 1}}, r"select\.explore: unknown key"),
    ({"clients": {"step_seconds": 2.0, "deadline": 1.5}}, r"clients\.deadline = 1\.5: no client can make a single step "
                                                          r".* allowed is 2 and more"),
    ({"clients": {"step_seconds": 2.0}, "method": {"name": "stragglers", "deadline": 1.0}},
     r"method\.deadline = 1: no client"),
    ({"clients": {"speed": {"normal": 1}}}, r"clients\.speed = \{'normal': 1\}: allowed is a number above 0"),
    ({"clients": {"speed": [1.0, 0.0]}}, r"clients\.speed"),
    ({"clients": {"dropout": 1.0}}, r"clients\.dropout = 1\.0"),
    ({"clients": {"profiles": {"client-00": {"dropout": 1.5}}}}, r"dropout = 1\.5 is not allowed"),
    ({"method": {"name": "fedbuff", "max_staleness": -1}}, r"method\.max_staleness = -1 is not allowed; it must be")])
def test_what_is_refused(recipe, change, words):
    with pytest.raises(RecipeError, match=words):
        build(load_recipe(recipe | change))


def test_guided_selection_under_differential_privacy_is_refused(recipe):
    private = [{"name": "dp_fedavg", "noise_multiplier": 1.0}]
    with pytest.raises(CompositionError, match="use select: uniform or by_size"):
        build(load_recipe(recipe | {"layers": private, "select": "oort"}))
    build(load_recipe(recipe | {"layers": private, "select": "by_size"}))


def test_speeds_are_dealt_or_drawn_from_the_seed():
    assert [drawn([1.0, 2.0], 1.0, 0, i, "c", "speed") for i in range(3)] == [1.0, 2.0, 1.0]
    law = {"lognormal": 1.0}
    assert drawn(law, 1.0, 0, 0, "c0", "speed") == drawn(law, 1.0, 0, 5, "c0", "speed") != drawn(law, 1.0, 1, 0, "c0",
                                                                                               "speed")
    assert 2 <= drawn({"uniform": [2.0, 3.0]}, 1.0, 0, 0, "c", "speed") <= 3
    assert drawn({"choice": [7.0]}, 1.0, 0, 0, "c", "speed") == 7.0
