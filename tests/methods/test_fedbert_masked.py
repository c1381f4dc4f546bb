"""FedBERT on masked words: the cut model steps as the whole one does, and no token or label leaves."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from evidence.rigs.masked import MASK, bert, masked_texts
from evidence.rigs.trials import Trial
from fedllm.core.errors import CompositionError
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space


def trial(name, steps, batch, kind=Vectorized, clients=2, dtype=torch.float64, net=None, **knobs):
    model = Model((net or bert(0)).to(dtype), None, "masked_words", make_space("full"), fast_kernels=False)
    rows = {f"c{k}": Shard(masked_texts(0, 6 + k, str(k)), masked_texts(0, 3, "t")) for k in range(clients)}
    spec = LocalSpec(optimizer="sgd", lr=0.1, steps=steps, batch_size=batch)
    knobs = {"steps": steps, **knobs} if name == "fedbert_split" else knobs
    return Trial(name, World(model, Federation(rows, [], "masked_words"), spec, 0), knobs, kind)


@pytest.mark.parametrize("cut", [0, 1])
def test_a_step_of_all_clients_is_the_unsplit_models(gap, cut):
    three = BertConfig(vocab_size=MASK + 1, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                       num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    net = BertForMaskedLM(three)
    mine = trial("fedbert_split", 1, 16, net=net, cut=cut).rounds(2)
    theirs = trial("fedavg", 1, 16, net=net).rounds(2)
    assert gap(mine.method.served(mine.state)[0], theirs.state["theta"]) < 1e-12


def test_engines_agree(gap):
    one, many = (trial("fedbert_split", 2, 4, kind).rounds(2) for kind in (InProcess, Vectorized))
    assert gap(one.method.served(one.state)[0], many.method.served(many.state)[0]) < 1e-10


def test_momentum_is_refused():
    run = trial("fedbert_split", 1, 4)
    run.world.local = LocalSpec(optimizer="adamw", lr=0.1, steps=1, batch_size=4)
    with pytest.raises(CompositionError, match=r"local\.optimizer = 'adamw' .*it counts on plain SGD"):
        run.rounds(1)
