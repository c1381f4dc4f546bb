"""Recipes that strangers write: as mappings, as text, by overrides, and as far as a run is built from them. Each is
taken or refused in a sentence, soon, and what is taken means something."""

import json
import random
import time

import pytest
import yaml

from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.runs.build import build
from fedllm.runs.complaints import parse_override
from fedllm.runs.recipe import Recipe, read_recipe
from tests.fuzz.hostile import ODD, bent, changed, garbled, places, tries, unfit, value_at

LAYERS = [{"name": "norm_clip"}, {"name": "codec_quant"}, {"name": "secagg"}, {"name": "krum"}, {"name": "he_ckks"},
          {"name": "dp_sgd", "noise_multiplier": 1.0}, {"name": "codec_topk_ef"},
          {"name": "att_byzantine", "clients": 0.2}]
KNOBS = ("method", "space", "layers", "select", "local", "models")
"""Sections whose keys are looked at when their parts are made."""
SECONDS = 20.0
"""Longest that one recipe may take to be refused or built, on a slow and busy machine."""


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


def met(work, what):
    """The result or the refusal; anything else is a fault, and so is a long wait or a long sentence."""
    began = time.monotonic()
    try:
        got = work()
    except FedLLMError as error:
        got = error
        assert len(str(error)) < 30_000, what
    assert time.monotonic() - began < SECONDS, what
    return got


def test_recipes_as_mappings(whole):
    rnd, known = random.Random(1), set(places(whole))
    for _ in range(tries(600)):
        raw, did = changed(rnd, whole)
        got = met(lambda: read_recipe(raw), did)  # noqa: B023
        if not isinstance(got, Recipe):
            assert isinstance(got, RecipeError)
            continue
        assert not unfit(got.model_dump()), did
        for path, value in did:
            before = value_at(whole, path) if path in known else None
            number = isinstance(before, int | float) and not isinstance(before, bool)
            stands = isinstance(value, bool) and path in set(places(raw)) and value_at(raw, path) is value
            assert not (number and stands and path[0] not in KNOBS and "profiles" not in path), (path, value)


def test_recipes_that_are_built(whole):
    """What read well is built, or refused; rows, models and layers included."""
    rnd, built = random.Random(2), 0
    for i in range(tries(60)):
        start = {**whole, "layers": rnd.sample(LAYERS, rnd.randint(0, 2))} if i % 3 else whole
        at = rnd.choice([k for k in whole if k not in ("versions", "plugins", "name", "engine", "model", "models")])
        raw = {**start, at: bent(rnd, start[at]) if rnd.random() < 0.1 else changed(rnd, {at: start[at]}, 1)[0].get(at)}
        if not isinstance(got := met(lambda: read_recipe(raw), raw[at]), Recipe):  # noqa: B023
            continue
        if got.data.source != whole["data"]["source"] or (got.rounds > 3 and at != "rounds"):
            continue  # what lies elsewhere on this machine is not ours to read
        met(lambda: build(got), (at, raw[at]))
        built += 1
    assert built > tries(60) / 20


def test_recipes_as_text(whole, tmp_path):
    rnd, text = random.Random(3), yaml.safe_dump({k: v for k, v in whole.items() if v}, sort_keys=False).encode()
    path = tmp_path / "r.yaml"
    for _ in range(tries(100)):
        path.write_bytes(data := garbled(rnd, text))
        assert isinstance(met(lambda: read_recipe(path), data), Recipe | RecipeError)


def test_overrides(whole):
    rnd = random.Random(4)
    keys = [".".join(map(str, p)) for p in places(whole)]
    for _ in range(tries(300)):
        key = rnd.choice(keys)
        key = key if rnd.random() < 0.7 else garbled(rnd, key.encode()).decode(errors="replace")
        value = rnd.choice(ODD)
        got = met(lambda: read_recipe(whole, {key: value}), (key, value))  # noqa: B023
        assert isinstance(got, Recipe | RecipeError)
        word = f"{key}={yaml.safe_dump(value)}" if not isinstance(value, str) or "\ud800" not in value else key
        met(lambda: parse_override(word), word)  # noqa: B023
