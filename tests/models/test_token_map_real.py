"""Two real tokenizers meet: SmolLM2's and the embedded model's, on the office's rows."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.core.client import Profile
from fedllm.core.program import drive
from fedllm.data.load import load_federation
from fedllm.data.section import DataSpec
from fedllm.engines.in_process import InProcess
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.load import load_tokenizer
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.models.token_map import ENDS, Words, by_span, by_warping, surfaces
from fedllm.spaces import make_space


def tiny(name: str, seed: int) -> Model:
    """A model of random weights that reads as this one does."""
    tok = load_tokenizer(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tok.eos_token_id))
    return Model(net, tok, "generation", make_space("lora", rank=2), seed=seed, name=name)


@pytest.fixture(scope="module")
def both() -> tuple[Model, Model]:
    return tiny("smollm2", 0), tiny("embedded", 1)


@pytest.mark.slow
def test_texts_are_matched_word_by_word(both):
    large, small = both
    a, b = surfaces(large), surfaces(small)
    assert a != b and ENDS in a and ENDS in b
    text = " The invoice of the office was paid on 12 May, said Anna."
    said = [[s[i] for i in m.tokenizer(text, add_special_tokens=False)["input_ids"]]
            for m, s in ((large, a), (small, b))]
    assert "".join(said[0]) == "".join(said[1]) == text  # what they write is the text, byte for byte
    pairs = by_span(*said)
    met = [(said[0][i], said[1][j]) for i, j in enumerate(pairs) if j >= 0]
    assert len(met) >= 5 and all(x.strip() == y.strip() for x, y in met)
    dtw = [(i, j) for i, j in enumerate(by_warping(*said)) if j >= 0]
    assert len(dtw) >= 5 and sum(pairs[i] == j for i, j in dtw) >= 0.7 * len(dtw)  # a guess, where letters are sure
    over = Words(a, b)
    for x, y in met:
        assert b[int(over.of(torch.tensor([a.index(x)]).numpy())[0])].strip() == y.strip()


@pytest.mark.slow
def test_fedmkt_between_the_two(both):
    """Clients of the small tokenizer, a server of the large one: everything that crosses is in the server's words."""
    large, small = both
    fed = load_federation(DataSpec(source="office", office={"clients": 2, "rows": 12, "public_rows": 10,
                                                            "test_rows": 4, "client_test_rows": 2}), 0)
    world = World(large, fed, LocalSpec(steps=2, batch_size=4, max_length=96), exact_match=False,
                  profiles={c: Profile(model="small") for c in fed.clients}, held=Shelf({"small": lambda: small}))
    method = make_method("fedmkt", top_k=8, alignment=8, digest_steps=2, teach_steps=2)
    engine = InProcess((method,), world)
    start = method.init(large)
    state = drive(method.round(start, world.infos()), engine)
    engine.commit()
    assert any(not torch.equal(state["theta"][n], start["theta"][n]) for n in start["theta"])
    assert all("theta" in engine.memory[c] for c in fed.clients)
