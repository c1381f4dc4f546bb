"""Recipes that strangers write: as mappings, as text, by overrides, and as far as a run is built from them. Each is
taken or refused in a sentence, soon, and what is taken means something."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import RecipeError
from fedllm.runs.build import build
from fedllm.runs.complaints import parse_override
from fedllm.runs.recipe import Recipe, read_recipe
from tests.fuzz.hostile import ANYTHING, bent, changed, changes, fuzzed, garbled, met, places, slips, unfit, value_at

LAYERS = [{"name": "norm_clip"}, {"name": "codec_quant"}, {"name": "secagg"}, {"name": "krum"}, {"name": "he_ckks"},
          {"name": "dp_sgd", "noise_multiplier": 1.0}, {"name": "codec_topk_ef"},
          {"name": "att_byzantine", "clients": 0.2}]
KNOBS = ("method", "space", "layers", "select", "local", "models")
"""Sections whose keys are looked at when their parts are made."""
ELSEWHERE = ("versions", "plugins", "name", "engine", "model", "models")
"""Sections that a run is not built with as somebody changed them: what they name is not ours to load or start."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama_folder):
    """A recipe with every key written out, which builds in a moment."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {w}", "response": w}) + "\n" for w in "abcdefghijkl"))
    return read_recipe({
        "model": tiny_llama_folder, "rounds": 1, "data": {"source": str(rows), "test": 0.0, "template": "plain",
                                                         "partition": {"kind": "iid", "clients": 3}},
        "space": {"name": "lora", "rank": 2}, "local": {"lr": 0.1, "steps": 1, "batch_size": 2, "optimizer": "sgd"},
        "method": {"name": "fedadam", "server_lr": 0.1}, "layers": [{"name": "norm_clip"}], "energy": {},
        "select": {"name": "oort"},
        "clients": {"profiles": {"client-00": {"memory_bytes": 10**9, "speed": 1.0}}, "step_seconds": 1.0},
        "evaluate": {"samples": 0, "exact_match": False, "clients": False}}).model_dump(mode="json")


@fuzzed(100)
@given(st.data())
def test_recipes_as_mappings(whole, data):
    known = set(places(whole))
    raw, did = changed(whole, data.draw(changes(whole)))
    got = met(lambda: read_recipe(raw), RecipeError)
    if not isinstance(got, Recipe):
        return
    assert not unfit(got.model_dump())
    for path, value in did:
        before = value_at(whole, path) if path in known else None
        number = isinstance(before, int | float) and not isinstance(before, bool)
        stands = isinstance(value, bool) and path in set(places(raw)) and value_at(raw, path) is value
        assert not (number and stands and path[0] not in KNOBS and "profiles" not in path), (path, value)


def test_recipes_that_are_built(whole):
    """What read well is built, or refused; rows, models and layers included."""
    built = []
    stacks = st.none() | st.lists(st.sampled_from(LAYERS), max_size=2, unique_by=lambda layer: layer["name"])

    @fuzzed(40)
    @given(st.data())
    def each(data):
        stack = data.draw(stacks, "layers")
        start = whole if stack is None else {**whole, "layers": stack}
        at = data.draw(st.sampled_from([k for k in whole if k not in ELSEWHERE]), "section")
        raw, _ = changed(start, data.draw(changes({at: start[at]}, 1)))
        if not isinstance(got := met(lambda: read_recipe(raw)), Recipe):
            return
        if got.data.source != whole["data"]["source"] or (got.rounds > 3 and at != "rounds"):
            return  # what lies elsewhere on this machine is not ours to read
        met(lambda: build(got))
        built.append(at)

    each()
    assert len(built) > 3


@fuzzed(30)
@given(st.data())
def test_recipes_as_text(whole, tmp_path, data):
    text = yaml.safe_dump({k: v for k, v in whole.items() if v}, sort_keys=False).encode()
    path = tmp_path / "r.yaml"
    path.write_bytes(garbled(text, data.draw(slips(text))))
    met(lambda: read_recipe(path), RecipeError)


@fuzzed(60)
@given(st.data())
def test_overrides(whole, data):
    key = data.draw(st.sampled_from([".".join(map(str, p)) for p in places(whole)]), "key")
    if data.draw(st.booleans(), "garbled"):
        key = garbled(key.encode(), data.draw(slips(key.encode()))).decode(errors="replace")
    value = data.draw(ANYTHING | bent(1), "value")
    met(lambda: read_recipe(whole, {key: value}), RecipeError)
    word = f"{key}={yaml.safe_dump(value)}" if not isinstance(value, str) or "\ud800" not in value else key
    met(lambda: parse_override(word))
