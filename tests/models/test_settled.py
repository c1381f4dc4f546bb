"""Where the classifier alone is trained, a row passes through the body once, and everything else is as it was."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from fedllm.models.batch import collate
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.settled import part_of
from fedllm.spaces import make_space
from fedllm.tasks.row import Encoded

LABELS = ("a", "b", "c")


def model_with(space="head", dtype=torch.float64, **knobs):
    torch.manual_seed(0)
    body = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=32), add_pooling_layer=False)
    return Model(HeadedEncoder(body, 3, "mean").to(dtype), None, "classification", make_space(space, **knobs),
                 labels=LABELS)


def rows(n=70, seed=0):
    rng = np.random.default_rng(seed)
    return [Encoded(rng.integers(1, 50, 3 + i % 9).astype(np.int32), i % 3, 1) for i in range(n)]


def passes(model):
    """How many rows have gone through the body."""
    seen = []
    model.net.body.register_forward_pre_hook(lambda m, args, kwargs: seen.append(
        len(kwargs.get("input_ids", args[0] if args else ()))), with_kwargs=True)
    return seen


@pytest.mark.parametrize("space", ["head", "mlp_head"])
def test_losses_and_gradients_are_those_of_rows_that_pass_each_time(space):
    model = model_with(space)
    read, theta = model.read(rows()), model.initial()
    found = []
    for some in (rows(), read):
        params = {n: t.double().requires_grad_() for n, t in theta.items()}
        with model.using([theta], None, {n: p[None] for n, p in params.items()}):
            loss = model.losses(collate([some], model.pad, model.device)).sum()
        found.append((loss, torch.autograd.grad(loss, list(params.values()))))
    assert abs(float(found[0][0] - found[1][0])) < 1e-12
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_a_row_passes_once_and_is_what_its_reading_makes_it():
    model = model_with(dtype=torch.float32)
    seen = passes(model)
    read = model.read(rows())
    assert sum(seen) == 70
    again = model.read(read)  # as a method does that trains on some of them
    with model.using([model.initial()]):
        model.losses(collate([again[:9]], model.pad, model.device))
    assert sum(seen) == 70
    same = model.read(rows())
    name = part_of(model)
    assert all(np.array_equal(a.parts[name], b.parts[name]) for a, b in zip(read, same, strict=True))


def test_where_something_below_moves_rows_pass_each_time():
    assert not model_with("lora", rank=2).settled and not model_with("full").settled
    model, other = model_with(), model_with()
    read = model.read(rows(4))
    batch = collate([read], model.pad, model.device)
    seen, theirs = passes(model), passes(other)
    with model.using([model.initial()]):
        model.stack.noise = object()  # as NEFTune has it while a client trains
        model.pooled(batch)
        model.stack.noise = None
    assert sum(seen) == 4
    with other.using([other.initial()]):  # another model's states are not this one's
        other.pooled(batch)
    assert sum(theirs) == 4
