"""Three clients with rows of one kind, and a small model from scratch: how soon FedAvg gets to a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.audits.membership import auc, row_scores
from fedllm.core.client import SERVER
from fedllm.core.layer import Layer
from fedllm.core.payload import Tree, part
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.job import Job
from fedllm.engines.world import World
from fedllm.gate.made import again, read
from fedllm.local.forward import run_losses
from fedllm.local.requests import Losses
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS
from fedllm.models.model import Model
from fedllm.privacy.responsible_gate import ResponsibleGate
from fedllm.spaces import make_space

WORDS, TEMPLATE = 40, "[q] {prompt} [a] {response} [e] "
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[q]", "[a]", "[e]"]
KNOBS = {"template": TEMPLATE, "n_syn": 40, "generator_steps": 60, "warm_steps": 60, "max_new_tokens": 12,
         "license": "CC0-1.0"}


def small(seed: int) -> Model:
    """Two blocks of width 32 with fresh weights, over one token a word."""
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    reader = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                     unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=48, bos_token_id=1, eos_token_id=2))
    return Model(net, reader, "generation", make_space("full"), seed=seed)


def rows(rng: np.random.Generator, after: np.ndarray, count: int) -> list[dict[str, str]]:
    """Three words of a walk, and the next four, in which each word is mostly followed by one other."""
    out = []
    for _ in range(count):
        ids = [int(rng.integers(WORDS))]
        while len(ids) < 7:
            ids.append(int(after[ids[-1], int(rng.random() > 0.8)]))
        said = [f"w{i}" for i in ids]
        out.append({"prompt": " ".join(said[:3]) + " ", "response": " ".join(said[3:])})
    return out


class Broken(Layer):
    """A generator that answers each prompt with another one's response."""

    def client(self, fn: Callable, msg: Mapping[str, Any], client: Any, call: Callable) -> Any:
        reply = dict(call(msg))
        if "rows" in reply:
            told = [read(t) for t in reply["rows"]]
            order = client.rng("broken").permutation(len(told))
            reply["rows"] = [again({**row, "response": told[j][0]["response"]}, origin)
                             for (row, origin), j in zip(told, order, strict=True)]
        return reply


def warm_start(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 14,
               broken: bool = False, gate: bool = False, local: Mapping[str, Any] | None = None) -> Metrics:
    """`rounds` until the loss on the global test is at most 1.2 (`rounds` + 1: never), `best` the lowest loss.

    `auc`: how well what the server learned before the first round tells clients' rows from fresh ones (0.5: not).
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "warm start")
    after = rng.integers(0, WORDS, (WORDS, 2))
    shards = {f"client-{k}": Shard(rows(rng, after, 40)) for k in range(3)}
    fed = Federation(shards, rows(rng, after, 120), "generation")
    model = small(seed)
    spec = LocalSpec(**{"lr": 1e-2, "steps": 5, "batch_size": 16, "max_length": 32, **(local or {})})
    world = World(model, fed, spec, seed, exact_match=False)
    layers = [*([Broken()] if broken else []), *([ResponsibleGate(encoder="off", copies="blank")] if gate else [])]
    told = {k: v for k, v in {**KNOBS, **(knobs or {})}.items() if k in METHODS[method].knobs()}
    run = Trial(method, world, told, Watched, layers=layers)

    def loss(theta: Any) -> float:
        return run_losses([Losses("x", model, theta, None, world.encoded(SERVER, "test"))], world.limits)[0].mean

    losses = [loss(run.rounds(1).state["theta"]) for _ in range(rounds)]
    there = [t for t, x in enumerate(losses, 1) if x <= TARGET]
    out: Metrics = {"rounds": float(there[0] if there else rounds + 1), "best": min(losses)}
    if gate:
        out["auc"] = _told_apart(run, world, model)
        out["rows"] = float(run.state["rows"])
    return {**out, **run.work()}


TARGET = 1.2
"""A loss that FedAvg gets to on the way, and not in its first round."""


class Watched(Vectorized):
    """Keeps the weights that the server learned before the first round."""

    start: Tree

    def work(self, job: Job, submit: Any) -> Any:
        reply = super().work(job, submit)
        if job.fold.ask.phase.endswith("warmed"):
            self.start = part(reply, "theta")
        return reply


def _told_apart(run: Trial, world: World, model: Model) -> float:
    theta = run.engine.start
    mine = [e for c in world.federation.clients for e in world.encoded(c, "train")]
    inside, outside = (row_scores(model, theta, None, some, world.limits)["loss"]
                       for some in (mine, world.encoded(SERVER, "test")))
    return float(auc(inside, outside))


RIGS = {"warm_start": warm_start}