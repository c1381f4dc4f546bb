"""What a step holds follows from the model, and large vocabularies are never whole."""

import numpy as np
import pytest
import torch

from fedllm.data.encode import IGNORE, Encoded
from fedllm.local.requests import Limits
from fedllm.models import pieces, size
from fedllm.models.batch import collate
from fedllm.models.blocks import GatedMlp, SwiGlu
from fedllm.models.load import load_model
from fedllm.spaces import make_space
from fedllm.spaces.space import stack_lanes


def rows_of(model, *lengths):
    ids = [np.random.default_rng(n).integers(4, 20, n).astype(np.int32) for n in lengths]
    return [Encoded(i, np.r_[IGNORE, i[1:]].astype(np.int64), len(i) - 1) for i in ids]


@pytest.mark.parametrize("space", ["full", "lora"])
def test_a_trained_or_odd_head_piece_by_piece_gives_the_same_losses_and_gradients(tiny_llama_folder, monkeypatch,
                                                                                  space):
    model = load_model(tiny_llama_folder, "generation", make_space(space), dtype="float64")
    model.head.plain = False  # as where logits are capped
    trees = [model.initial(), {n: t * 1.1 + 0.01 for n, t in model.initial().items()}]
    batch, got = collate([rows_of(model, 9, 4), rows_of(model, 7, 3)], 0, model.device), []
    seen = []
    inner = model.logits_of
    monkeypatch.setattr(model, "logits_of", lambda h: seen.append(h.shape[:-1].numel()) or inner(h))
    for piece in (1 << 24, 40):
        monkeypatch.setattr(pieces, "PIECE", piece)
        seen.clear()
        stacked = {n: t.requires_grad_() for n, t in stack_lanes(trees).items()}
        with model.using(trees, None, stacked):
            losses = model.row_losses(batch)[0]
        losses.sum().backward()  # outside, as training does
        got.append((losses.detach(), {n: t.grad for n, t in stacked.items()}, max(seen)))
    assert torch.allclose(got[0][0], got[1][0], atol=1e-10)
    assert all(torch.allclose(g, got[1][1][n], atol=1e-10) for n, g in got[0][1].items())
    assert got[1][2] < got[0][2]


def test_the_gated_mlp_and_its_gradient_are_torchs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 6, generator=g, dtype=torch.float64)
    a, b, c = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((10, 6), (10, 6), (6, 10)))
    ways = []
    for f in (lambda x: (torch.nn.functional.silu(x @ a.T) * (x @ b.T)) @ c.T, lambda x: GatedMlp.apply(x, a, b, c),
              lambda x: SwiGlu.apply(x @ a.T, x @ b.T) @ c.T):
        y = x.clone().requires_grad_()
        out = f(y)
        out.pow(2).sum().backward()
        ways.append((out.detach(), y.grad))
    assert all(torch.allclose(p, q, atol=1e-10) for other in ways[1:] for p, q in zip(ways[0], other, strict=True))


def test_what_a_step_keeps_is_foreseen_within_a_factor_of_two(tiny_llama_folder):
    model = load_model(tiny_llama_folder, "generation", make_space("lora", targets=("q_proj", "v_proj")))
    sizes, held = size.Sizes.of(model.net.config), {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tree, batch = model.initial(), collate([rows_of(model, *[24] * 8)], 0, model.device)
    stacked = {n: t.requires_grad_() for n, t in stack_lanes([tree]).items()}
    weights = {p.untyped_storage().data_ptr() for p in [*model.net.parameters(), *stacked.values()]}
    with model.using([tree], None, stacked), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.losses(batch)
    kept = sum(n for at, n in held.items() if at not in weights) / batch.ids.numel()
    assert loss.requires_grad and sizes.learned / 2 < kept < 2 * sizes.learned


def test_limits_follow_the_model_and_a_number_holds_for_all(tiny_llama_folder, monkeypatch):
    model = load_model(tiny_llama_folder, "generation", make_space("lora"))
    assert Limits().learned(model) == Limits().read(model) == size.MOST
    assert Limits(77).learned(model) == Limits(77).read(model) == Limits(77).kept(model) == 77
    monkeypatch.setattr(size, "room", lambda device: 1 << 20)
    sizes = size.Sizes.of(model.net.config)
    assert Limits().learned(model) == (1 << 20) // sizes.learned < size.MOST
    both = int(size.READ * (1 << 20) / sizes.read), int(size.CACHE * (1 << 20) / sizes.cached)
    assert Limits().kept(model) == min(both)


def test_sizes_are_read_from_configs_of_other_families():
    from transformers import GPT2Config, OPTConfig

    assert size.Sizes.of(GPT2Config(n_embd=64, n_layer=3, n_head=4)) == size.Sizes(3, 64, 256, 64, 50257)
    assert size.Sizes.of(OPTConfig(hidden_size=64, num_hidden_layers=3, ffn_dim=128, num_attention_heads=4)) == (
        size.Sizes(3, 64, 128, 64, 50272))
    assert size.weights(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100)) > 100 * 64
