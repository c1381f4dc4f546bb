"""A space is one file: found by an entry point, it is loaded, trained, planned, saved, started from and exported."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedllm
from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.found import installed
from fedllm.engines import InProcess, Vectorized
from fedllm.models.model import Model
from fedllm.runs.export import export
from fedllm.spaces import make_space

ROOT = Path(__file__).parents[2]


def example() -> str:
    """The space that docs/rooms/spaces.md shows."""
    page = (ROOT / "docs/rooms/spaces.md").read_text()
    return page.split("```python\n", 1)[1].split("```", 1)[0]


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """Install packages: stem of a file -> its source, each with an entry point of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(**files):
        for stem, source in files.items():
            (tmp_path / f"{stem}.py").write_text(source)
            info = tmp_path / f"{stem}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {stem}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[fedllm.spaces]\n{stem} = {stem}\n")
        installed.cache_clear()

    yield install
    installed.cache_clear()


STUCK = '''
"""Gains that are no change of any weight, and that PEFT does not have."""
from output_gain import OutputGain
from dataclasses import dataclass
from fedllm.spaces.space import Space


@dataclass(frozen=True)
class Loose(OutputGain):
    """As it is, but not to be merged."""

    stays = "its gains are loose"
'''


def test_from_recipe_to_export(brought, recipe, tmp_path):
    brought(output_gain=example())
    recipe |= {"space": {"name": "output_gain", "targets": ["q_proj", "down_proj"]}, "rounds": 2, "method": "fedavg",
               "local": {"lr": 0.05, "optimizer": "sgd"}}
    assert fedllm.plan(recipe).up > 0
    runs = {kind: fedllm.run(recipe | {"engine": kind, "name": kind}, root=tmp_path)
            for kind in ("in_process", "vectorized")}
    served = {k: AutoModelForCausalLM.from_pretrained(r.adapter_path) for k, r in runs.items()}
    base = AutoModelForCausalLM.from_pretrained(recipe["model"])
    weights = {k: dict(n.named_parameters()) for k, n in {**served, "base": base}.items()}
    moved = {n for n, p in weights["base"].items() if not torch.equal(p, weights["vectorized"][n])}
    assert moved and all("q_proj" in n or "down_proj" in n for n in moved)
    assert all(torch.allclose(p, weights["in_process"][n], atol=1e-5) for n, p in weights["vectorized"].items())
    assert export(runs["vectorized"].folder, tmp_path / "out").joinpath("config.json").is_file()
    shutil.rmtree(runs["vectorized"].folder / "model")
    again = fedllm.resume(runs["vectorized"].folder)  # from its checkpoint
    assert again.state_digest == runs["vectorized"].state_digest


def test_engines_agree_in_fp64(brought, tiny_llama_folder):
    from tests.engines.test_vectorized import ADAMW, gap, outcome

    brought(output_gain=example())
    one, other = (outcome(e, tiny_llama_folder, "generation", make_space("output_gain"), ADAMW, fast_kernels=False)
                  for e in (InProcess, Vectorized))
    assert gap(one, other) < 1e-10


def test_merged_it_says_the_same(brought, tiny_llama_folder):
    brought(output_gain=example())
    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model = Model(net, AutoTokenizer.from_pretrained(tiny_llama_folder), "generation", make_space("output_gain"))
    theta = {n: t + 0.1 for n, t in model.initial().items()}
    from tests.spaces.test_peft_io import logits_of, peft_logits

    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    plain = peft_logits(fresh)
    model.space.merge(fresh, theta)
    assert torch.allclose(logits_of(model, theta), peft_logits(fresh), atol=1e-5)
    assert not torch.allclose(plain, peft_logits(fresh), atol=1e-3)


def test_one_that_cannot_be_merged_is_saved_as_it_is_and_merging_is_refused(brought, recipe, tmp_path):
    brought(output_gain=example(), loose=STUCK)
    recipe |= {"space": "loose", "rounds": 1, "method": "fedavg"}
    result = fedllm.run(recipe, root=tmp_path)
    assert result.adapter_path.name == "trainables" and not (result.folder / "model").exists()
    assert "works in fedllm alone" in (result.folder / "model_card.md").read_text()
    with pytest.raises(ModelError, match=r"'loose' cannot be merged into the model's weights: its gains are loose"):
        export(result.folder, tmp_path / "merged", merge=True)
    assert (export(result.folder, tmp_path / "out") / "trainables.safetensors").is_file()
    go_on = recipe | {"space": {"name": "loose", "start_from": str(tmp_path / "out")}, "name": "on", "rounds": 0}
    assert fedllm.run(go_on, root=tmp_path).evaluation["global"]["loss"] == result.evaluation["global"]["loss"]
    with pytest.raises(ModelError, match=r"holds trainables of space 'loose', space.name is 'lora'; use 'loose'"):
        fedllm.run(recipe | {"space": {"name": "lora", "start_from": str(tmp_path / "out")}}, root=tmp_path)


def test_what_is_brought_must_be_one_space_of_a_new_name(brought):
    brought(nothing="x = 1\n")
    with pytest.raises(RecipeError, match=r"nothing must hold just one of the kind 'spaces'"):
        make_space("nothing")


def test_a_name_that_is_taken_is_refused(brought):
    brought(lora=example())
    with pytest.raises(RecipeError, match=r"'lora' among the spaces is brought by fedllm itself and"):
        make_space("lora")


@pytest.mark.parametrize("page", ["streams", "slices"])
def test_the_pages_examples_run(page):
    text = (ROOT / f"docs/rooms/{page}.md").read_text()
    exec(compile(text.split("```python\n", 1)[1].split("```", 1)[0], page, "exec"), {"__name__": page})
