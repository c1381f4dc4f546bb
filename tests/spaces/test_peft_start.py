"""A PEFT adapter as a start is the function that PEFT makes of it, or it is refused; what we save is read back."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedllm.core.errors import ModelError, RecipeError
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.peft_io import knobs_of, load_adapter, save_adapter
from fedllm.models.proof import examine
from fedllm.models.reread import reread
from fedllm.spaces import make_space

IDS = torch.tensor([[5, 9, 13, 7, 21, 8]])


def made(folder, tmp_path, tie=False, **config):
    """An adapter that PEFT made, with random weights, and its logits."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    net = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **config})).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    net.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        return tmp_path / "theirs", net(input_ids=IDS).logits


def started(folder, adapter):
    model = load_model(folder, "generation", make_space("lora", **knobs_of(adapter, "lora")))
    model.start = load_adapter(adapter, model)
    reread(Path(adapter), model, model.initial())
    return model


def logits(model, theta):
    from fedllm.models.batch import Batch

    with torch.no_grad(), model.using([theta]):
        return model.logits_of(model.hidden(Batch(1, IDS, torch.ones_like(IDS, dtype=torch.bool), IDS)))


@pytest.mark.parametrize("config", [
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 7, "layers.1.self_attn.q_proj": 2}},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r".*layers\.1\..*": 32, "v_proj": 3}},
    {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up": 1, "up_proj": 5}},
    {"target_modules": r".*\.0\..*(q|down)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\.mlp.*"},
    {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 3}},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
])
def test_an_adapter_is_started_from_as_peft_reads_it(tiny_llama_folder, tmp_path, config):
    adapter, want = made(tiny_llama_folder, tmp_path, **config)
    model = started(tiny_llama_folder, adapter)
    theta = model.initial()
    assert torch.allclose(logits(model, theta), want, atol=1e-4)
    save_adapter(tmp_path / "ours", model, theta, tiny_llama_folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, want, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_starts_that_change_the_base_are_refused(tiny_llama_folder, tmp_path, init):
    adapter, _ = made(tiny_llama_folder, tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(ModelError, match=rf"init_lora_weights = '{init}'.*takes a part out of the base"):
        started(tiny_llama_folder, adapter)


def test_dropout_of_the_adapter_is_said(tiny_llama_folder, tmp_path):
    adapter, _ = made(tiny_llama_folder, tmp_path, target_modules=["q_proj"], lora_dropout=0.2)
    assert started(tiny_llama_folder, adapter).space.dropout == 0.2


def test_an_adapter_that_is_read_otherwise_is_refused(tiny_llama_folder, tmp_path):
    adapter, _ = made(tiny_llama_folder, tmp_path, target_modules=["q_proj", "v_proj"])
    model = started(tiny_llama_folder, adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))
    with pytest.raises(ModelError, match=r"is not one function here and in PEFT: its LoraConfig is read otherwise"):
        reread(adapter, model, model.initial())


def test_modules_to_save_that_cannot_be_are_refused(tiny_llama_folder):
    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tied = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    for one, knobs, why in (
            (net, {"modules_to_save": ["lm_hed"]}, "no module named 'lm_hed'"),
            (net, {"targets": ["q_proj"], "modules_to_save": ["q_proj"]}, "has factors or is trained whole"),
            (tied, {"modules_to_save": ["lm_head"]}, "'lm_head' shares its weights")):
        with pytest.raises(ModelError, match=why):
            Model(one, None, "generation", make_space("lora", **knobs))


def test_peft_sending_targets_elsewhere_is_found_when_the_model_is_loaded():
    """PEFT sends gate, up and down of deepseek's blocks to the fused experts."""
    from evidence.zoo.configs import tiny

    model = Model(tiny("deepseek_v3", dtype=torch.float32), None, "generation",
                  make_space("lora", rank=4, targets=["o_proj", "gate_proj", "up_proj", "down_proj"]), name="ds")
    with pytest.raises(ModelError, match=r"not one function here and in PEFT.*leave .*(gate|up|down)_proj.* out of"):
        examine(model, cache=False)
    dead = Model(tiny("mamba", dtype=torch.float32), None, "generation",
                 make_space("lora", rank=2, targets=["dt_proj", "x_proj"]), name="mamba")
    with pytest.raises(ModelError, match="dt_proj does not do what it does in transformers; leave dt_proj out"):
        examine(dead, cache=False)


def test_gates_narrower_than_the_rank_are_left_out_of_all_linear():
    from evidence.zoo.configs import tiny

    net = tiny("qwen2_moe", dtype=torch.float32)
    names = Model(net, None, "generation", make_space("lora", rank=4)).initial()
    assert names and not any("shared_expert_gate." in n for n in names)
    with pytest.raises(RecipeError, match="must be <= 1"):
        Model(net, None, "generation", make_space("lora", rank=4, targets=["shared_expert_gate"])).initial()
