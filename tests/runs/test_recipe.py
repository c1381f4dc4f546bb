"""A recipe says all, and says clearly what is wrong with it."""

from pathlib import Path

import pytest
import yaml

from fedllm.core.errors import RecipeError
from fedllm.runs.complaints import Yaml, parse_override, read_yaml
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import Recipe, load_recipe


def test_short_forms_and_overrides():
    short = {"method": "fedprox", "model": "minilm", "space": "bias", "engine": "in_process", "data": "x.jsonl"}
    recipe = load_recipe(short, {"method.mu": 0.5, "local.lr": 0.1, "clients.per_round": 2})
    assert (recipe.method.name, recipe.method.knobs) == ("fedprox", {"mu": 0.5})
    assert recipe.data.source == "x.jsonl" and recipe.engine.kind == "in_process"
    assert recipe.local == {"lr": 0.1} and recipe.clients.per_round == 2


def test_another_method_does_not_inherit_knobs():
    recipe = load_recipe({"method": {"name": "fedprox", "mu": 1.0}}, {"method": {"name": "fedavg"}})
    assert recipe.method.knobs == {}


def test_what_was_resolved_loads_again():
    recipe = load_recipe({"method": "fedavg", "rounds": 3})
    assert load_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump()))) == recipe
    assert load_recipe(recipe) == recipe


def test_numbers_as_people_write_them():
    assert yaml.load("a: 3e-3\nb: 1E5\nc: 7\nd: .5", Loader=Yaml) == {"a": 0.003, "b": 1e5, "c": 7, "d": 0.5}
    assert parse_override("local.lr=3e-3") == ("local.lr", 0.003)
    assert parse_override("clients.ranks=[2, 4]") == ("clients.ranks", [2, 4])


BAD = [
    ({"rouns": 3}, "rouns: unknown key; did you mean 'rounds'"),
    ({"rounds": -1}, r"rounds = -1: .*greater than or equal to 0"),
    ({"rounds": "ten"}, "rounds = 'ten': .*integer"),
    ({"seed": True}, "seed = True"),
    ({"clients": {"per_rond": 1}}, r"clients\.per_rond: unknown key; did you mean 'per_round'"),
    ({"clients": {"per_round": 1.5}}, r"clients\.per_round = 1\.5: allowed is a count"),
    ({"clients": {"per_round": 0}}, r"clients\.per_round = 0"),
    ({"clients": {"ranks": [4, 0]}}, r"clients\.ranks\.1 = 0"),
    ({"data": {"sorce": "x"}}, r"data\.sorce: unknown key; did you mean 'source'"),
    ({"data": {"source": 5}}, r"data\.source = 5: .*string, or .*list"),
    ({"data": {"office": {"clints": 3}}}, r"data\.office\.clints: unknown key; did you mean 'clients'"),
    ({"data": {"partition": {"kind": "dirichelt"}}}, r"data\.partition\.kind = 'dirichelt'.*did you mean 'dirichlet'"),
    ({"evaluate": {"baselines": ["x"]}}, r"evaluate\.baselines\.0 = 'x': .*'local_only' or 'centralized'"),
    ({"engine": "roy"}, r"engine\.kind = 'roy': .*'in_process', 'vectorized', 'ray'"),
    ({"layers": [{"nam": "x"}]}, r"layers\.0\.name: this key is needed"),
    ({"model": {"dtype": "fp8"}}, r"model\.dtype = 'fp8'"),
    ({"name": "../x"}, r"name = '\.\./x': allowed are letters"),
    ({"rouns": 3, "seed": -1}, r"(?s)seed = -1.*rouns|rouns.*seed = -1"),
]


@pytest.mark.parametrize(("raw", "says"), BAD)
def test_bad_keys_and_values_name_their_path(raw, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe(raw)


@pytest.mark.parametrize(("key", "value", "says"), [
    ("rounds.x", 1, r"rounds\.x: 'rounds' is 3 and holds no keys"), ("layers.4", 1, r"layers\.4: it is a list of 0")])
def test_bad_overrides(key, value, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe({"rounds": 3, "layers": []}, {key: value})


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "demo.yaml").write_text("a: [1, 2\nb: 3")
    with pytest.raises(RecipeError, match=r"demo\.yaml, line 2: not YAML"):
        read_yaml(tmp_path / "demo.yaml")
    (tmp_path / "twice.yaml").write_text("rounds: 1\nrounds: 2")
    with pytest.raises(RecipeError, match="'rounds' is given twice"):
        read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        read_yaml(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match=r"did you mean '.*demo\.yaml'"):
        read_yaml(tmp_path / "dmo.yaml")
    with pytest.raises(RecipeError, match="no override"):
        parse_override("local.lr")


def test_profiles():
    clients = {"ranks": [2, 4], "availability": 0.5, "profiles": {"b": {"rank": 8, "speed": 2.0}}}
    made = make_profiles(Recipe.model_validate({"clients": clients}), ["a", "b", "c"])
    assert [made[c].rank for c in "abc"] == [2, 8, 2]
    assert made["a"].availability == 0.5 and made["b"].speed == 2.0
    for profiles, says in (({"d": {}}, r"clients\.profiles\.d: no such client"),
                           ({"a": {"rnk": 1}}, "did you mean 'rank'"),
                           ({"a": {"rank": 0}}, r"rank = 0"), ({"a": {"speed": -1}}, "speed = -1")):
        with pytest.raises(RecipeError, match=says):
            make_profiles(Recipe.model_validate({"clients": {"profiles": profiles}}), ["a", "b"])


@pytest.mark.parametrize("path", sorted(p for p in (Path(__file__).parents[2] / "recipes").rglob("*.yaml")
                                        if p.parent.name != "families"), ids=lambda p: p.stem)
def test_every_recipe_that_we_hand_out_is_one(path):
    """Those of families are built by tests/comparisons/test_families.py."""
    assert load_recipe(path).rounds > 0
