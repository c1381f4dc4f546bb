"""Rows without padding between them, attention by blocks of queries, and backward products by the piece."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.data.encode import IGNORE, Encoded
from fedllm.models.attention import CausalAttention, Laid
from fedllm.models.batch import collate
from fedllm.models.hidden import densely
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.ways import Ways
from fedllm.spaces import frozen, make_space
from fedllm.spaces.space import stack_lanes
from fedllm.spaces.twice import twice


def rows_of(*lengths):
    ids = [np.random.default_rng(n).integers(4, 20, n).astype(np.int32) for n in lengths]
    return [Encoded(i, np.r_[IGNORE, i[1:]].astype(np.int64), len(i) - 1) for i in ids]


def answer(model, batch, trees):
    stacked = {n: t.clone().requires_grad_() for n, t in stack_lanes(trees).items()}
    with model.using(trees, None, stacked):
        losses = model.row_losses(batch)[0]
    losses.sum().backward()
    return [losses.detach(), *(t.grad for t in stacked.values())]


def test_rows_lie_end_to_end_short_ones_first_and_equal_ones_in_one_span():
    laid, first = Laid.of([[5, 2, 5], [4, 1]])
    assert (laid.lanes, laid.tokens, laid.spans) == (2, 12, ((0, 1, 2), (2, 2, 5), (12, 1, 1), (13, 1, 4)))
    assert first == [[2, 0, 7], [13, 12]]


@pytest.mark.parametrize("space", ["lora", "full", "ia3", "adapter", "layers", "lora_sb"])
def test_without_padding_losses_and_gradients_are_the_same(tiny_llama_folder, space):
    model = load_model(tiny_llama_folder, "generation", make_space(space), dtype="float64")
    assert model.ways == Ways() and model.dense > 1000
    trees = [{n: t + 0.02 for n, t in model.initial().items()}, {n: t * 1.1 + 0.01 for n, t in model.initial().items()}]
    batch, seen, body = collate([rows_of(9, 4, 4), rows_of(70, 3)], 0, model.device), [], type(model.net.model).forward
    model.net.model.__dict__["forward"] = lambda **feed: (seen.append(feed["input_ids"].numel()), body(
        model.net.model, **feed))[1]
    padded = answer(model, batch, trees)
    model.worth = 0
    dense = answer(model, batch, trees)
    assert seen == [6 * 70, 2 * (70 + 3 + 1)]  # the row that fills a lane has a token
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(padded, dense, strict=True))


def test_padding_stays_where_somebody_looks_at_it_or_it_costs_less(tiny_llama_folder):
    model = load_model(tiny_llama_folder, "generation", make_space("lora", targets=["q_proj"]), dtype="float64")
    batch, seen = collate([rows_of(40, 3, 4)], 0, model.device), []
    inner = model.net.model.forward
    model.net.model.__dict__["forward"] = lambda **feed: (seen.append("laid" in feed), inner(**feed))[1]
    with torch.no_grad(), model.using([model.initial()]):
        model.hidden(batch, padded=False)  # so small a network is not worth it
        model.worth = 0
        model.hidden(batch, padded=False)
        model.hidden(batch)
        with twice():
            model.hidden(batch, padded=False)
        hook = model.net.model.layers[0].register_forward_hook(lambda *_: None)
        model.hidden(batch, padded=False)
        hook.remove()
        model.hidden(collate([rows_of(9, 9)], 0, model.device), padded=False)
    assert seen == [False, True, False, False, False, False]


@pytest.mark.parametrize("change, fits", [({}, True), ({"sliding_window": 8}, False), ({"hidden_size": 48,
                         "head_dim": 16}, True)])
def test_a_network_that_sees_no_farther_than_its_window_keeps_its_padding(change, fits):
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "num_key_value_heads": 2, **change})
    model = Model(LlamaForCausalLM(config), None, "generation", make_space("lora"))
    assert (model.dense > 0) is fits and (densely(model.net) > 0) is fits


@pytest.mark.parametrize("n, t, heads, groups", [(2, 3, 4, 2), (3, 150, 2, 1), (40, 64, 6, 3)])
def test_attention_by_blocks_is_torchs(n, t, heads, groups):
    rng, h = torch.Generator().manual_seed(t), 4
    q, k, v, d = (torch.randn(n, t, w * h, generator=rng, dtype=torch.float64) for w in (heads, groups, groups, heads))
    angle = torch.randn(1, t, h // 2, generator=rng, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()

    def plain(q, k, v):
        q, k, v = (x.view(n, t, -1, h).transpose(1, 2) for x in (q, k, v))
        q, k = (x * cos + torch.cat([-x[..., h // 2 :], x[..., : h // 2]], -1) * sin for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
        return y.transpose(1, 2).flatten(2)

    got = []
    for f in (plain, lambda q, k, v: CausalAttention.apply(q, k, v, cos, sin, 0.3, ((0, n, t),))):
        asked = [x.clone().requires_grad_() for x in (q, k, v)]
        y = f(*asked)
        y.backward(d)
        got.append([y.detach(), *(x.grad for x in asked)])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*got, strict=True))


def test_attention_gives_no_gradient_that_nobody_asks_for():
    x = [torch.randn(2, 70, 8, dtype=torch.float64) for _ in range(3)]
    angle = torch.randn(1, 70, 4, dtype=torch.float64)
    whole = [y.clone().requires_grad_() for y in x]
    CausalAttention.apply(*whole, angle.cos(), angle.sin(), 0.5, ((0, 2, 70),)).sum().backward()
    for one in range(3):
        some = [y.clone().requires_grad_(i == one) for i, y in enumerate(x)]
        CausalAttention.apply(*some, angle.cos(), angle.sin(), 0.5, ((0, 2, 70),)).sum().backward()
        assert torch.equal(some[one].grad, whole[one].grad)


def test_products_by_the_piece_are_the_products(monkeypatch):
    x = torch.randn(3, 100, 6, dtype=torch.float64)
    w = torch.nn.Linear(6, 10, bias=False).double().requires_grad_(False)
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append(len(a)), mm(a, b, out=out))[1])
    got = []
    for f in (w, lambda x: frozen.linear(w, x)):
        y = x.clone().requires_grad_()
        f(y).pow(2).sum().backward()
        got.append(y.grad)
    assert torch.allclose(*got, atol=1e-12) and seen == [128, 128, 44]
    w.weight.requires_grad_()
    frozen.linear(w, x).sum().backward()
    assert w.weight.grad is not None
