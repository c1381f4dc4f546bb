"""The recipes of the FedSecurity suite are built as they stand: every attack and defense that they name is there."""

from pathlib import Path

import pytest

from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "fedsecurity").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_is_built(path):
    recipe = load_recipe(path, {"data.office.rows": 4, "data.office.test_rows": 2, "data.office.client_test_rows": 1})
    parts = build(recipe)
    assert len(parts.layers) == len(recipe.layers) and len(parts.world.federation.clients) == 10


def test_the_family_has_attacks_of_all_three_kinds():
    names = {x.name for path in RECIPES for x in load_recipe(path).layers}
    assert {"att_byzantine", "att_label_flip", "att_backdoor", "att_free_rider", "krum", "median", "rfa"} <= names
