"""What the recipe alone tells is refused when the run is built, and not by the first round."""

import json

import pytest

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe

SHARED = {"name": "lora", "rank": 2, "scaling": "shared"}
SGD = {"optimizer": "sgd", "lr": 0.1}


@pytest.mark.parametrize("more, why", [
    ({"method": "hetlora", "space": SHARED, "clients": {"ranks": [1, 4]}}, r"has rank 4, above space\.rank = 2"),
    ({"method": "hetlora", "space": SHARED, "clients": {"profiles": {"client-01": {"rank": 3}}}},
     r"client 'client-01' has rank 3"),
    ({"method": "scaffold"}, r"local\.optimizer = 'adamw' do not fit.*allow_adaptive"),
    ({"method": "scaffold", "local": {**SGD, "momentum": 0.9}}, r"'sgd' \(momentum 0\.9\) do not fit"),
    ({"method": {"name": "gossip", "tracking": True}}, "gossip with tracking and local.optimizer = 'adamw'"),
    ({"method": {"name": "fedmezo", "up": "scalars"}, "local": {**SGD, "weight_decay": 0.1}},
     r"weight_decay = 0\.1 do not fit"),
    ({"method": "fedkseed", "local": {**SGD, "schedule": "linear"}}, "the replay of seeds would be wrong"),
    ({"method": "fedbert_split", "space": {"name": "full"}}, "fedbert_split and local.optimizer = 'adamw'"),
    ({"method": "air_meta_pfl"}, "air_meta_pfl and local.optimizer = 'adamw'"),
])
def test_what_the_recipe_tells_is_refused_when_it_is_built(recipe, more, why):
    with pytest.raises((CompositionError, RecipeError), match=why):
        build(load_recipe({**recipe, **more, "clients": more.get("clients", {})}))


def test_a_client_with_a_row_too_few_for_air_meta_pfl_is_named(recipe, tmp_path):
    for name, n in (("a", 4), ("b", 1)):
        row = json.dumps({"prompt": "say red", "response": "cat"}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(row * n)
    data = {"source": str(tmp_path), "partition": {"kind": "per_file"}, "test": 0.0}
    with pytest.raises(DataError, match="client 'b' has 1; leave it out"):
        build(load_recipe({**recipe, "method": "air_meta_pfl", "local": SGD, "data": data, "clients": {}}))
