"""A site's rows are what the client of its name would hold in a simulation, whatever its rows are for."""

import pytest

from evidence.bench.rig_rows import TASKS, write_words
from fedllm.core.errors import RecipeError
from fedllm.data.load import load_federation
from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import admitted
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import _own_rows
from fedllm.runs.recipe import load_recipe, of_sites
from fedllm.runs.sections import OWN

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
