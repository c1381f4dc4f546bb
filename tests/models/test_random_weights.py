"""Random weights by recipe: the same bits wherever they are drawn, recorded, trained whole and saved whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fedllm
from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.payload import digest
from fedllm.models.load import load_model
from fedllm.runs.build import make_recipe_space, recipe_model
from fedllm.runs.recipe import load_recipe
from fedllm.spaces import make_space


def drawn(folder, seed=3, **options):
    return load_model(folder, "generation", make_space("full"), weights="random", seed=seed, device="cpu", **options)


def test_the_bits_follow_from_the_seed_alone(tiny_llama_folder):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = drawn(tiny_llama_folder).initial()
    assert torch.equal(before, torch.get_rng_state())  # nobody else's numbers change
    code = ("from fedllm.models.load import load_model; from fedllm.spaces import make_space; "
            "from fedllm.core.payload import digest; import sys, torch; torch.set_num_threads(2); torch.rand(5); "
            "print(digest(load_model(sys.argv[1], 'generation', make_space('full'), weights='random', seed=3, "
            "device='cpu').initial()))")
    other = subprocess.run([sys.executable, "-c", code, tiny_llama_folder], capture_output=True, text=True, timeout=120)
    assert other.stdout.strip() == digest(one), other.stderr[-500:]
    assert digest(drawn(tiny_llama_folder, seed=4).initial()) != digest(one)
    stored = load_model(tiny_llama_folder, "generation", make_space("full"), device="cpu")
    assert digest(stored.initial()) != digest(one)
    half = drawn(tiny_llama_folder, dtype="bfloat16").net.state_dict()  # rounded, not drawn anew
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in one.items())


def test_a_folder_needs_no_weights_and_the_result_is_whole(recipe, tiny_llama_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    given = {**recipe, "model": {"name": str(bare), "weights": "random"}, "space": "full", "rounds": 1, "seed": 5}
    result = fedllm.run(given, root=tmp_path / "runs")
    written = yaml.safe_load((Path(result.folder) / "recipe.yaml").read_text())
    assert written["model"]["weights"] == "random" and written["seed"] == 5
    saved = AutoModelForCausalLM.from_pretrained(result.adapter_path).state_dict()
    checked = load_recipe(written)  # what a site or a worker builds from the same recipe
    begun = recipe_model(checked, make_recipe_space(checked)[0], "generation").initial()
    moved = {n: float((saved[n] - t.cpu()).abs().max()) for n, t in begun.items()}
    assert 0 < max(moved.values()) < 0.5


def test_classifiers_too(tiny_bert_folder):
    one, two = (load_model(tiny_bert_folder, "classification", make_space("full"), labels=("a", "b"), weights="random",
                           seed=s, device="cpu").initial() for s in (1, 1))
    assert digest(one) == digest(two)


def test_what_would_stay_random_and_other_words_are_refused(recipe, tiny_llama_folder, tmp_path):
    random = {"name": tiny_llama_folder, "weights": "random"}
    for space in ("lora", "layers", "soft_prompt"):
        with pytest.raises(CompositionError, match=r"model\.weights = 'random' and space '\w+' do not fit together: "
                                                   r"'.+' would stay random; use space: full"):
            fedllm.run({**recipe, "model": random, "space": space}, root=tmp_path)
    with pytest.raises(RecipeError, match=r"model\.weights = 'fresh'.*pretrained.*random"):
        load_recipe({**recipe, "model": {**random, "weights": "fresh"}})
    with pytest.raises(ModelError, match="model.weights = 'fresh' is not allowed".replace(".", r"\.")):
        load_model(tiny_llama_folder, "generation", make_space("full"), weights="fresh")
    assert not list(tmp_path.iterdir())
