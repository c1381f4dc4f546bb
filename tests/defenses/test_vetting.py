"""Vetting against real forgeries, and over honest checkpoints: fresh, trained here, and pre-trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedllm.defenses.vetting import oddity
from fedllm.models.load import EMBEDDED

LIMITS = [0.5, 0.1, 1e4, 16]
"""The layer's own, by default."""


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=32, n_embd=96, n_layer=3, n_head=4, n_inner=384,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def weights(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def test_decepticons_are_found():
    audits = pytest.importorskip("fedllm.audits.att_decepticons")
    forged = audits.Decepticons().forge(gpt2(0))
    assert "equal rows" in oddity({n: forged[n] for n in forged if ".mlp.c_fc.weight" in n}, LIMITS)
    assert oddity(forged, LIMITS)


def test_twenty_honest_checkpoints_pass():
    for seed in range(4):
        net = gpt2(seed)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        for _ in range(5):
            assert not oddity(weights(net), LIMITS)
            ids = torch.randint(20, (4, 16))
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_embedded_model_passes():
    assert not oddity(weights(AutoModelForCausalLM.from_pretrained(EMBEDDED)), LIMITS)
