"""LoRA where a recipe names no modules: every linear map that the network calls and PEFT takes, in any architecture."""

import pytest
import torch

from evidence.zoo.cell import judge
from evidence.zoo.configs import tiny
from fedllm.core.errors import ModelError
from fedllm.spaces import make_space


@pytest.mark.parametrize("name, out", [
    ("mamba", {"dt_proj", "out_proj"}), ("mamba2", {"out_proj"}), ("falcon_h1", {"out_proj"}), ("jamba", {"dt_proj"}),
    ("deepseek_v3", {"gate_proj", "up_proj", "down_proj"}), ("qwen3_next", {"gate_proj", "up_proj", "down_proj"}),
    ("lfm2", set()), ("llama", set())])
def test_what_peft_or_the_network_passes_over_is_left_out(name, out):
    net = tiny(name, "generation", torch.float32)
    linear = {p.rpartition(".")[2] for p, m in net.named_modules() if type(m) is torch.nn.Linear} - {"lm_head"}
    sites = {p.rpartition(".")[2] for p in make_space("lora", rank=1).sites(net)}
    assert linear - sites - {"gate", "shared_expert_gate"} == out and sites
    assert set(make_space("lora_sb", rank=1).start(net, torch.Generator())) >= {
        f"base_model.model.{p}.lora_R.weight" for p in make_space("lora", rank=1).sites(net)}


@pytest.mark.parametrize("name, space", [("mamba", "lora"), ("deepseek_v3", "lora"), ("mamba2", "lora")])
def test_the_default_is_right_and_loads_in_plain_peft(name, space):
    found = judge(name, space)
    assert found.outcome in ("right", "falls back"), found.why


def test_where_nothing_is_left_the_sentence_says_what_to_set(monkeypatch):
    monkeypatch.setattr("fedllm.spaces.lora.adaptable", lambda net, found: {})
    with pytest.raises(ModelError, match=r"lora: .*LlamaForCausalLM.*name some in space\.targets"):
        make_space("lora", rank=1).sites(tiny("llama", "generation", torch.float32))
