"""A site's rows are what the client of its name would hold in a simulation, whatever its rows are for."""

import json

import pytest

from evidence.bench.rig_rows import TASKS, write_words
from fedllm.core.errors import RecipeError
from fedllm.data.load import load_federation
from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import admitted
from fedllm.federation.coordinator import check_recipe
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import _own_rows
from fedllm.runs.recipe import load_recipe, of_sites
from fedllm.runs.sections import OWN
from fedllm.tasks.registry import task_of

SITES = ("site-a", "site-b")
KINDS = [(task, {}) for task in TASKS if task != "image_text"] + [("classification", {"entity": "id"})]


def files(folder):
    for k, site in enumerate(SITES):
        write_words(folder / "data" / f"{site}.jsonl", k, 24)
    return str(folder / "data")


def recipe_of(task, source, **data):
    read = {**TASKS[task].get("data", {}), "source": source, "partition": {"kind": "per_file"}, "test": 0.0,
            "client_test": 0.3, **data}
    return {**TASKS[task], "name": "rows", "data": read}


@pytest.mark.parametrize("task, more", KINDS)
def test_a_site_keeps_back_what_the_same_client_of_a_simulation_does(task, more, tmp_path):
    spec = recipe_of(task, files(tmp_path), **more)
    recipe = load_recipe(spec)
    simulated = load_federation(recipe.data, recipe.seed).clients
    told = for_sites(of_sites(spec))
    for site in SITES:
        settings = SiteSettings(data=str(tmp_path / "data" / f"{site}.jsonl"), store=str(tmp_path / site))
        mine = _own_rows(admitted(told, settings), site, settings)
        assert list(mine.clients) == [site] and not mine.test and mine.clients[site].test
        assert mine.clients[site].train == simulated[site].train and mine.clients[site].test == simulated[site].test


def test_how_readings_become_rows_is_fixed_by_the_first_run_like_all_else_that_shapes_them(tmp_path):
    source = files(tmp_path)
    settings = SiteSettings(data=str(tmp_path / "data" / "site-a.jsonl"), store=str(tmp_path / "store"))
    spec = recipe_of("forecast", source)
    admitted(for_sites(of_sites(spec)), settings)
    admitted(for_sites(of_sites(spec)), settings)
    spec["data"] = {**spec["data"], "windows": {**spec["data"]["windows"], "of": ["heat", "step"]}}
    with pytest.raises(Refused, match=r"data\.windows"):
        admitted(for_sites(of_sites(spec)), settings)


def test_a_federations_recipe_keeps_its_environment_and_no_source_of_rows(tmp_path):
    assert of_sites({"data": "rows.jsonl"}).data.source == OWN == of_sites({}).data.source
    scene = {"model": "policy", "data": {"source": "env:gridworld", "environment": {"side": 3}}}
    recipe = of_sites(scene, {"rounds": 2})
    assert recipe.data.acts and recipe.data.environment.model_extra == {"side": 3} and recipe.rounds == 2
    assert of_sites({"model": "policy"}, {"data.source": "env:desk"}).data.acts
    with pytest.raises(RecipeError, match=r"data\.environment"):
        of_sites({"data": {"source": "rows.jsonl", "environment": {"side": 3}}})


GREY = [[[0.0, 1.0], [2.0, 3.0]]] * 3


@pytest.mark.parametrize("task, row, good", [
    ("pairs", {"image": GREY, "text": "a cat", "label": 1}, True), ("pairs", {"image": GREY, "label": 0}, True),
    ("pairs", {"text": "a cat", "label": 0}, True), ("pairs", {"label": 0}, False),
    ("pairs", {"image": "/etc/passwd", "label": 0}, False), ("pairs", {"image": ["/etc/passwd"], "label": 0}, False),
    ("pairs", {"image": GREY[:2], "label": 0}, False), ("pairs", {"image": GREY, "label": 2}, False),
    ("image_text", {"features": [0.5, 1], "label": 0}, True),
    ("image_text", {"features": [0.5, 1], "image": "/etc/passwd", "label": 0}, False),
    ("image_text", {"prompt": "", "response": "", "image": "/etc/passwd", "label": 0}, False),
    ("classification", {"text": "x", "label": 1}, True), ("classification", {"text": "x", "label": True}, False),
    ("generation", {"prompt": "x", "response": "y"}, True), ("generation", {"prompt": "x"}, False)])
def test_rows_of_another_machine_are_rows_of_the_task_and_name_no_file_here(task, row, good):
    assert task_of(task).came(row, ("a", "b")) is good


def test_public_rows_that_no_site_would_take_are_refused_before_any_is_asked(tmp_path):
    pytest.importorskip("PIL.Image").new("L", (8, 8)).save(tmp_path / "x.png")
    spec = recipe_of("pairs", files(tmp_path)) | {"method": "creamfl", "space": "full"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"glyph": str(tmp_path / "x.png"), "prompt": "a", "label": "odd"}))
    spec["data"] |= {"public": str(tmp_path / "p.jsonl")}
    with pytest.raises(RecipeError, match="row 1: no site takes such a row from elsewhere"):
        check_recipe(of_sites(spec))
    write_words(tmp_path / "p.jsonl", 5, 3)
    check_recipe(of_sites(spec))
