"""A prompt takes places of the context: texts are cut to what is left, and one that leaves none is refused by name."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fedllm.core.errors import ModelError
from fedllm.data.encode import Encoded
from fedllm.models.batch import collate
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model
from fedllm.spaces import make_space

PLACES = 16
AHEAD = ("soft_prompt", "p_tuning", "prefix", "layer_prefix")


def model_of(space, task="generation"):
    if task == "generation":
        net = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=PLACES, n_embd=16, n_layer=2, n_head=2,
                                         bos_token_id=1, eos_token_id=2))
        return Model(net, None, task, space)
    body = BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=24, max_position_embeddings=PLACES))
    return Model(HeadedEncoder(body, 2, "mean"), None, task, space, labels=("a", "b"))


@pytest.mark.parametrize("name", AHEAD)
def test_behind_every_prompt_a_text_has_the_room_that_is_left(name):
    """GPT-2 numbers its places: one token more than there is room for has none, whatever stands before it."""
    model = model_of(make_space(name, length=6))
    assert model.room == PLACES - 6

    def loss(tokens):
        ids = np.arange(4, 4 + tokens, dtype=np.int32)
        with torch.no_grad(), model.using([model.initial()]):
            return float(model.losses(collate([[Encoded(ids, ids.astype(np.int64), tokens)]], 0, model.device))[0])

    assert np.isfinite(loss(model.room))
    with pytest.raises(IndexError):
        loss(model.room + 1)


@pytest.mark.parametrize("space, task", [
    *((make_space(name, length=15), "generation") for name in AHEAD),
    (make_space("soft_prompt", length=40), "generation"),
    (make_space("soft_prompt", length=15), "classification"), (make_space("p_tuning", length=16), "classification"),
    (make_space("streams", of={"p": {"name": "p_tuning", "length": 15}, "h": "head"}), "classification")])
def test_a_prompt_longer_than_the_context_is_refused_before_any_work(space, task):
    with pytest.raises(ModelError, match=rf"space '{space.stem}' takes {space.places} places before the text, and "
                                         r"\w+ has 16 in all; allowed is a length of 14 at most"):
        model_of(space, task)


def test_the_longest_allowed_prompt_leaves_two_tokens():
    assert model_of(make_space("prefix", length=14)).room == 2
