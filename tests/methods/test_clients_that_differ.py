"""Bad input of clients that differ: each is refused in one sentence, before the first round where that can be."""

from __future__ import annotations

import json

import pytest

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.methods.registry import make_method
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe


def made(recipe, **changes):
    return build(load_recipe({**recipe, "evaluate": {"exact_match": False}, **changes}))


@pytest.mark.parametrize("method, declared, says", [
    ("flexlora", {"ranks": [2, 40]}, r"clients\.ranks = 40 is not allowed; .* must be <= \d+"),
    ("flexlora", {"profiles": {"c": {"rank": 40}}}, r"clients\.profiles\.client-00\.rank = 40 is not allowed"),
    ("hetlora", {"ranks": [2, 40]}, r"clients\.ranks|rank 40")])
def test_a_rank_above_the_bases_width(recipe, method, declared, says):
    space = {"name": "lora", "rank": 4, "scaling": "shared"}
    client = next(iter(made(recipe).world.federation.clients))
    if "profiles" in declared:
        declared = {"profiles": {client: declared["profiles"]["c"]}}
    with pytest.raises((RecipeError, CompositionError), match=says):
        made(recipe, method=method, space=space, clients=declared)


def test_a_width_above_the_whole():
    with pytest.raises(RecipeError, match=r"widths = \[1, 5\] is not allowed; each must be from 1 to n_blocks = 4"):
        make_method("raffm", widths=(1, 5))


def test_a_tag_type_that_nobody_has(recipe, tiny_bert_folder, tmp_path):
    rows = [{"tokens": ["red", "cat", "dog"], "tags": ["O", tag, "O"]} for tag in ("B-animal", "I-animal", "B-color")
            for _ in range(6)]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(tmp_path / "tags.jsonl"), "task": "tokens", "test": 0.0, "partition": {
        "kind": "iid", "clients": 2}}
    ours = {"model": {"name": tiny_bert_folder}, "method": "fedner_tagset", "rounds": 1}
    labels = ["O", "B-animal", "I-animal", "B-color"]
    assert made(recipe, **ours, data={**data, "labels": labels}).world.federation.labels == tuple(labels)
    with pytest.raises(DataError, match="has the type 'place', which no client's training rows show"):
        made(recipe, **ours, data={**data, "labels": [*labels, "B-place"]})


@pytest.mark.parametrize("method, knobs, says", [
    ("shapley", {}, "one client a round is not allowed"), ("fed_unlearn", {"forget": "a"}, "is the only client"),
    ("fedbiscuit", {"groups": 2}, "groups = 2 is not allowed with 1 clients")])
def test_one_client_alone(method, knobs, says):
    with pytest.raises(RecipeError, match=says):
        make_method(method, **knobs).check_clients(["a"], 1)
