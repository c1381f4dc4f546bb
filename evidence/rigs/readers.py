"""A server's model that reads words and clients' that read pieces of them, on documents of kinds that each lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.prompted import KINDS, WORDS, documents, kinds_of_words, started
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import Profile
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.client import server_info
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

STEPS, DIGEST, PUBLIC, EACH = 12, 8, 48, 100


def pieces() -> PreTrainedTokenizerFast:
    """Words w10 to w79 are one token as at the server, w0 to w9 two; so is `white`."""
    names = ["<pad>", "<eos>", "[UNK]", "w", *(f"##{i}" for i in range(10)), "##ite", "wh",
             *(f"w{i}" for i in reversed(range(10, WORDS))), *reversed(KINDS[:-1])]
    made = Tokenizer(WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="[UNK]")


def small(seed: int) -> Model:
    """One block of width 32, from random weights, all of it trained."""
    tok = pieces()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    return Model(net, tok, "generation", make_space("full"), seed=seed)


def written(seed: int, rng: np.random.Generator, kinds: np.ndarray) -> list[Row]:
    """Documents of these kinds."""
    return documents(rng, kinds_of_words(seed), kinds)


def readers(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 5, public: bool = False,
            local: Mapping[str, Any] | None = None) -> Metrics:
    """Two clients with 100 documents of two kinds each, 48 public ones of all four, whose kind everybody knows.

    `loss` is the clients' mean on 200 documents of all kinds, `server_loss` that of the server's model, which knows a
    few words of each kind. A method that reads no public rows trains on its own for as many steps, with `public` on
    both.
    """
    torch.set_num_threads(1)
    rng, ours = numpy_stream(seed, "readers"), method == "fedmkt"
    shared = written(seed, rng, np.arange(PUBLIC) % len(KINDS))
    shards = {f"client-{k}": Shard([*written(seed, rng, rng.integers(2 * k, 2 * k + 2, EACH)),
                                    *(shared if public else [])]) for k in range(2)}
    test = written(seed, rng, np.arange(200) % len(KINDS))
    held = small(seed)
    world = World(started(seed, 4, make_space("lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj"))),
                  Federation(shards, test, "generation", public=shared),
                  LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": STEPS + (0 if ours else DIGEST),
                               "batch_size": 16, "max_length": 64, **(local or {})}),
                  seed, {c: Profile(model="small") for c in shards}, exact_match=False,
                  held=Shelf({"small": lambda: held}))
    told = {"digest_steps": DIGEST, "teach_steps": DIGEST, "top_k": 16, "kd_alpha": 0.5, **(knobs or {})}
    run = Trial(method, world, told if ours else dict(knobs or {})).rounds(rounds)
    out = {"loss": float(np.mean([s["loss"] for s in run.scores("global").values()])),
           "work_steps": float(run.t * (STEPS + DIGEST)), "work_rows_a_step": 16.0}
    if ours:
        run.engine.begin(run.t)
        own = drive(run.method.evaluate(run.state, [server_info()], "global"), run.engine)
        out["server_loss"] = float(next(iter(own.values()))["loss"])
    return out


RIGS = {"readers": readers}
