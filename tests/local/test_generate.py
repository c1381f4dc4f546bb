"""Texts are continued together as each is alone, and rows that are done make room."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.local import generate
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.models import decode
from fedllm.models.load import load_model
from fedllm.spaces import make_space

PROMPTS = [np.random.default_rng(i).integers(4, 20, n).astype(np.int32) for i, n in enumerate((3, 11, 6, 2, 9, 7))]
NEW = 24


@pytest.fixture(scope="module")
def model(tiny_llama_folder):
    return load_model(tiny_llama_folder, "generation", make_space("lora"), dtype="float64")


def moved(model, by):
    return {n: t + by * torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t)
            for n, t in model.initial().items()}


@pytest.mark.parametrize("limits", [Limits(), Limits(80)])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_together_as_alone_while_rows_are_dropped(model, monkeypatch, limits, temperature):
    monkeypatch.setattr(type(model), "ends", {5, 6, 7, 8})
    trees = [model.initial(), moved(model, 0.3)]
    asks = [Generate(f"c{k}", model, t, None, PROMPTS[k:], NEW, temperature, seed=k) for k, t in enumerate(trees)]
    alone = [run_generates([Generate("one", model, t, None, PROMPTS[k:], NEW, temperature, seed=k)], Limits(1))[0]
             for k, t in enumerate(trees)]
    widths = []
    plain = decode.Continuation.keep
    monkeypatch.setattr(decode.Continuation, "keep", lambda self, rows: (widths.append(len(rows)), plain(self, rows)))
    assert run_generates(asks, limits) == alone
    assert len({len(said) for one in alone for said in one}) > 2  # they end at different words
    assert widths or limits.batch_tokens or not temperature  # greedy words of a random model may go in circles


def test_greedy_words_are_those_of_transformers(model, tiny_llama_folder):
    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64)
    got = run_generates([Generate("c", model, model.initial(), None, PROMPTS, NEW)], Limits())[0]
    for prompt, said in zip(PROMPTS, got, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        want = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                            pad_token_id=0)[0, len(prompt) :].tolist()
        assert said == [w for w in want if w not in model.ends]


def test_lanes_of_a_batch_fit_the_limit_too(model, monkeypatch):
    seen = []
    plain = generate.decode
    monkeypatch.setattr(generate, "decode", lambda m, batch, how, seats: (
        seen.append(batch.ids.shape[0] * (batch.ids.shape[1] + how.max_new_tokens)), plain(m, batch, how, seats))[1])
    asks = [Generate(f"c{k}", model, moved(model, 0.1 * k), None, PROMPTS, NEW) for k in range(4)]
    run_generates(asks, Limits(80))
    assert max(seen) <= 80


def test_a_cache_with_room_says_what_a_growing_one_says():
    grown, layer = (decode.DynamicLayer() for _ in range(2))
    start = [torch.randn(3, 2, 4, 5) for _ in range(2)]
    grown.update(*start)
    layer.update(*start)
    roomy = decode.Roomy(layer, 6)
    for i in range(4):  # beyond its room
        new = [torch.randn(3 if i < 2 else 2, 2, 1, 5) for _ in range(2)]
        if i == 2:
            for one in (grown, roomy):
                one.batch_select_indices(torch.tensor([2, 0]))
        assert all(torch.equal(a, b) for a, b in zip(grown.update(*new), roomy.update(*new), strict=True))
    assert roomy.get_seq_length() == 8
