"""The demo on a real language model."""

import json

import pytest
import yaml

from fedllm.cli.demo import LLM, demo
from fedllm.cli.main import out
from fedllm.models.load import EMBEDDED
from fedllm.runs.recipe import load_recipe


def test_its_recipe_is_one():
    recipe = load_recipe(LLM)
    assert recipe.model.name == "smollm2" and recipe.evaluate.baselines == ["local_only", "centralized"]


@pytest.mark.slow
def test_it_shows_what_a_demo_shows(tmp_path, capsys):
    said = yaml.safe_load(LLM.read_text()) | {"model": str(EMBEDDED), "rounds": 1, "local": {"steps": 1}, "engine": {}}
    said["data"]["office"] |= {"rows": 12, "test_rows": 8, "client_test_rows": 2}
    small = tmp_path / "demo.yaml"
    small.write_text(yaml.safe_dump(said))
    demo(out, tmp_path / "runs", small)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("before", "local only", "federated", "centralized", "after", "expected"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_federation_pays_on_smollm2(tmp_path):
    demo(out, tmp_path / "runs", LLM)
    found = json.loads((tmp_path / "runs" / "demo-llm" / "result.json").read_text())["evaluation"]
    alone = found["baselines"]["local_only"]["global"]["loss"]
    assert found["global"]["loss"] < alone < found["before"]["global"]["loss"]
