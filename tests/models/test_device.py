"""A model's device: what may be asked for, and what is said when it is not there."""

import pytest
import torch

from fedllm.core.errors import ModelError, RecipeError
from fedllm.models.load import load_model
from fedllm.spaces import make_space


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_auto_is_the_cpu_and_cuda_is_refused(tiny_llama_folder):
    assert load_model(tiny_llama_folder, "generation", make_space("lora")).device.type == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ModelError, match=f"model.device = '{name}': this machine has no CUDA card; allowed"):
            load_model(tiny_llama_folder, "generation", make_space("lora"), device=name)


@pytest.mark.parametrize("cards, name, allowed", [(1, "cuda:1", "cuda:0"), (2, "cuda:5", "cuda:0, cuda:1")])
def test_a_card_that_is_not_there_is_refused(tiny_llama_folder, monkeypatch, cards, name, allowed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(ModelError, match=f"has {cards} CUDA card.*allowed here are auto and cpu, {allowed}"):
        load_model(tiny_llama_folder, "generation", make_space("lora"), device=name)


def test_a_recipe_with_another_device_is_refused(tmp_path):
    from fedllm.runs.recipe import load_recipe

    (tmp_path / "r.yaml").write_text("model: {name: embedded, device: gpu}\ndata: {source: office}\nmethod: fedavg\n")
    with pytest.raises(RecipeError, match=r"model.device = .gpu.*allowed is auto, cpu, cuda or cuda:N"):
        load_recipe(tmp_path / "r.yaml")
