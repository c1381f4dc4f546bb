"""Adapters go to plain peft and back with the same logits."""

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedllm.core.errors import ModelError
from fedllm.core.rng import torch_stream
from fedllm.models.batch import Batch
from fedllm.models.load import load_model
from fedllm.models.peft_io import knobs_of, load_adapter, save_adapter
from fedllm.spaces import make_space

SPACES = [("lora", {"rank": 4}), ("lora", {"rank": 4, "scaling": "rslora", "targets": ["q_proj", "down_proj"]}),
          ("lora", {"rank": 4, "targets": ["q_proj", "lm_head"]}),
          ("lora", {"rank": 4, "scaling": "shared", "alpha": 6.0}), ("ia3", {}), ("soft_prompt", {"length": 3}),
          ("prefix", {"length": 3})]
IDS = torch.tensor([[1, 5, 9, 12, 7], [1, 20, 8, 6, 30]])


def shaken(model, rank=None):
    """Trainables that differ from the start everywhere."""
    rng = torch_stream("shaken")
    return {n: t + 0.2 * torch.randn(t.shape, generator=rng) for n, t in model.initial(rank).items()}


def logits_of(model, theta):
    ids = IDS.to(model.device)
    with torch.no_grad(), model.using([theta]):
        return model.logits_of(model.hidden(Batch(1, ids, torch.ones_like(ids, dtype=torch.bool), ids))).cpu()


def peft_logits(net):
    with torch.no_grad():
        return net.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize(("name", "knobs"), SPACES)
def test_ours_loads_in_peft(name, knobs, tiny_llama_folder, tmp_path):
    model = load_model(tiny_llama_folder, "generation", make_space(name, **knobs))
    theta = shaken(model)
    save_adapter(tmp_path, model, theta, tiny_llama_folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path)
    assert torch.allclose(logits_of(model, theta), peft_logits(theirs), atol=1e-5)
    again = load_adapter(tmp_path, model)
    assert again.keys() == theta.keys()
    assert torch.allclose(logits_of(model, again), logits_of(model, theta), atol=1e-6)


def test_p_tuning_is_pefts_own_network_and_saves_what_it_makes(tiny_llama_folder, tmp_path):
    model = load_model(tiny_llama_folder, "generation", make_space("p_tuning", length=3, hidden=5))
    theta = shaken(model)
    config = PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5, task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), config)
    named = {n.removeprefix("prompt_encoder."): t for n, t in theta.items()}
    own = theirs.prompt_encoder["default"]
    own.load_state_dict(named)  # strictly: the very same names and shapes
    assert torch.allclose(logits_of(model, theta), peft_logits(theirs), atol=1e-5)
    save_adapter(tmp_path, model, theta, tiny_llama_folder)
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path)
    assert torch.allclose(logits_of(model, theta), peft_logits(saved), atol=1e-5)


def test_a_grown_rank_is_saved_as_it_is(tiny_llama_folder, tmp_path):
    model = load_model(tiny_llama_folder, "generation", make_space("lora", rank=4))
    theta = shaken(model, rank=7)
    save_adapter(tmp_path, model, theta, tiny_llama_folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path)
    assert torch.allclose(logits_of(model, theta), peft_logits(theirs), atol=1e-5)


CONFIGS = [("lora", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
           ("lora", LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")),
           ("ia3", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
                             task_type="CAUSAL_LM")),
           ("soft_prompt", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
           ("prefix", PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_theirs_loads_in_ours(name, config, tiny_llama_folder, tmp_path):
    torch.manual_seed(1)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    model = load_model(tiny_llama_folder, "generation", make_space(name, **knobs_of(tmp_path, name)))
    assert torch.allclose(logits_of(model, load_adapter(tmp_path, model)), peft_logits(theirs), atol=1e-5)


def test_gpt2_whose_weights_lie_the_other_way(tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
                               eos_token_id=2)).save_pretrained(base)
    from tests.conftest import word_tokenizer

    word_tokenizer().save_pretrained(base)
    model = load_model(str(base), "generation", make_space("lora", rank=2))
    theta = shaken(model)
    save_adapter(tmp_path / "adapter", model, theta, str(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(logits_of(model, theta), peft_logits(theirs), atol=1e-5)


def test_an_encoder_keeps_its_head_beside_the_adapter(tiny_bert_folder, tmp_path):
    model = load_model(tiny_bert_folder, "classification", make_space("lora", rank=4), labels=("bad", "good"))
    theta = shaken(model)
    save_adapter(tmp_path, model, theta, tiny_bert_folder)
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert_folder), tmp_path).eval()
    ids = IDS.to(model.device)
    batch = Batch(1, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    with torch.no_grad(), model.using([theta]):
        ours = model.hidden(batch).cpu()
        assert torch.allclose(ours, theirs(input_ids=IDS).last_hidden_state, atol=1e-5)
    again = load_adapter(tmp_path, model)
    assert all(torch.equal(again[n], theta[n]) for n in theta if "classifier" in n)


def test_what_does_not_fit_is_refused(tiny_llama_folder, tmp_path):
    model = load_model(tiny_llama_folder, "generation", make_space("lora", rank=4, targets=["q_proj"]))
    with pytest.raises(ModelError, match="no PEFT adapter folder"):
        load_adapter(tmp_path / "none", model)
    save_adapter(tmp_path, model, model.initial(), tiny_llama_folder)
    with pytest.raises(ModelError, match="use 'lora'"):
        knobs_of(tmp_path, "ia3")
    other = load_model(tiny_llama_folder, "generation", make_space("lora", rank=4, targets=["v_proj"]))
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(tmp_path, other)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(ModelError, match="uses bias"):
        load_adapter(tmp_path, model)
    adapter = load_model(tiny_llama_folder, "generation", make_space("adapter"))
    with pytest.raises(ModelError, match="no PEFT format"):
        save_adapter(tmp_path, adapter, adapter.initial(), tiny_llama_folder)
