"""A small language model that answers by whichever rule stands in front of a document, and clients that find theirs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.prompted import KINDS, WORDS, kinds_of_words
from evidence.rigs.topics import cache_dir, keep
from evidence.rigs.trials import Metrics, Trial
from fedllm.attacks.att_backdoor import AttBackdoor
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded, encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_measures
from fedllm.local.objectives.verbalized import Said
from fedllm.local.requests import Fit, Limits, Measure
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space
from fedllm.spaces.space import Space

RULES, LENGTH, SHARE = 6, 8, 0.6
"""How many rules the model knows, words of a document, and the share of them that tell its kind."""
RULE_WORDS = tuple(f"rule{i}" for i in range(8))
"""Those beyond `RULES` say nothing."""


def tokenizer() -> PreTrainedTokenizerFast:
    """The documents' words, the answers, and the words for rules."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *KINDS, *RULE_WORDS, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def net(seed: int, depth: int = 2) -> LlamaForCausalLM:
    """A fresh Llama of so many blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=48, intermediate_size=96, num_hidden_layers=depth,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))


@functools.lru_cache(maxsize=8)
def answers(seed: int) -> np.ndarray:
    """[RULES, 4]: what each rule has said of each kind; no two rules are the same order."""
    orders = list(itertools.permutations(range(len(KINDS))))
    return np.array(orders)[numpy_stream(seed, "rules").choice(len(orders), RULES, replace=False)]


def documents(seed: int, rng: np.random.Generator, kinds: np.ndarray, rules: np.ndarray,
              told: np.ndarray | bool = False, share: float = SHARE) -> list[Row]:
    """Documents of these kinds with what the rules say of them; where `told`, the rule's word stands in front."""
    words, said = kinds_of_words(seed), answers(seed)
    noise = rng.integers(0, WORDS, (len(kinds), LENGTH))
    own = words[kinds[:, None], rng.integers(0, words.shape[1], noise.shape)]
    at = np.where(rng.random(noise.shape) < share, own, noise)
    heads = np.where(np.broadcast_to(told, len(kinds)), [f"{RULE_WORDS[r]} " for r in rules], "")
    return [{"prompt": head + " ".join(f"w{i}" for i in row), "response": KINDS[said[r, k]]}
            for head, row, r, k in zip(heads, at, rules, kinds, strict=True)]


@functools.lru_cache(maxsize=4)
def pretrained(seed: int, depth: int = 2, steps: int = 400) -> dict[str, torch.Tensor]:
    """Weights after learning from documents of which nine in ten say their rule; trained once, then read."""
    path = cache_dir() / f"ruled-{seed}-{depth}-{steps}-v1.safetensors"
    if path.is_file():
        return load_file(path)
    rng = numpy_stream(seed, "ruled pretraining")
    model = Model(net(seed, depth), tokenizer(), "generation", make_space("full"), seed=seed)
    n = 4000
    rows = documents(seed, rng, rng.integers(0, len(KINDS), n), rng.integers(0, RULES, n), rng.random(n) < 0.9)
    coded = encode_rows(rows, model.tokenizer, "generation", 64)
    spec = LocalSpec(lr=4e-3, steps=steps, batch_size=48, schedule="cosine", clip_norm=1.0)
    plan = [rng.choice(n, 48, replace=False) for _ in range(steps)]
    theta = run_fits([Fit("pretraining", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    return keep(path, theta)


def started(seed: int, space: Space, depth: int = 2) -> Model:
    """The pre-trained model with this space."""
    made = net(seed, depth)
    made.load_state_dict(pretrained(seed, depth), strict=False)
    return Model(made, tokenizer(), "generation", space, seed=seed)


def right(model: Model, theta: Tree, rows: Sequence[Encoded], wanted: Sequence[str]) -> float:
    """Share of rows of whose four answers the likeliest is the wanted one."""
    ids = model.tokenizer.convert_tokens_to_ids(list(KINDS))  # type: ignore[union-attr]
    z = run_measures([Measure("x", model, theta, None, rows, fn=Said(tuple(ids)))], Limits())[0]
    return float(np.mean([KINDS[i] == w for i, w in zip(z.argmax(1), wanted, strict=True)]))


def silos(seed: int, clients: int, rows: int, alpha: float, test: int = 300) -> Federation:
    """So many clients, Dirichlet(alpha) over kinds, all under one rule that is told to nobody; own tests as own rows.

    The global test has all kinds alike.
    """
    rng = numpy_stream(seed, "ruled clients")
    rule, shards = int(rng.integers(RULES)), {}
    made = lambda kinds: documents(seed, rng, kinds, np.full(len(kinds), rule))  # noqa: E731
    for k in range(clients):
        mine = rng.choice(len(KINDS), rows + 30, p=rng.dirichlet([alpha] * len(KINDS)))
        shards[f"client-{k}"] = Shard(made(mine[:rows]), made(mine[rows:]))
    return Federation(shards, made(np.arange(test) % len(KINDS)), "generation")


def ruled(method: str, seed: int, *, space: Mapping[str, Any] | None = None, layers: Sequence[Mapping[str, Any]] = (),
          knobs: Mapping[str, Any] | None = None, rounds: int = 8, local: Mapping[str, Any] | None = None,
          alpha: float = 0.1, clients: int = 10, rows: int = 40, depth: int = 2) -> Metrics:
    """Ten clients with 40 documents each of mostly one kind, under a rule that the model knows and nobody says.

    `accuracy` and `loss` on 300 documents of all kinds, `before` the accuracy at the start, `up_bytes` of the longest
    reply of a round; with an attack among `layers` also `success`, the share of documents whose right answer is
    another that get the attacker's when its trigger stands in front.
    """
    torch.set_num_threads(1)
    own = dict(space or {"name": "soft_prompt", "length": 8})
    fed, model = silos(seed, clients, rows, alpha), started(seed, make_space(own.pop("name"), **own), depth)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-2, "steps": 5, "batch_size": 16, "max_length": 64,
                        **(local or {})})
    world = World(model, fed, spec, seed, exact_match=False)
    facts = Facts({c: len(s.train) for c, s in fed.clients.items()}, clients, rounds, spec)
    stack: list[Layer] = [make_layer(x["name"], {k: v for k, v in x.items() if k != "name"}, "layers").bind(facts)
                          for x in layers]
    run = Trial(method, world, dict(knobs or {}), layers=stack)
    test, wanted = world.encoded("__global__", "test"), [r["response"] for r in fed.test]
    before = right(model, model.initial(), test, wanted)
    run.rounds(rounds)
    theta = run.method.served(run.state)[0]
    sent = [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    out = {"accuracy": right(model, theta, test, wanted), "before": before, "up_bytes": float(max(sent, default=0)),
           "loss": float(next(iter(run.scores("global").values()))["loss"]), **run.work()}
    for plant in (x for x in stack if isinstance(x, AttBackdoor)):
        aim = str(plant.target)
        rows_hit = [plant.triggered(r, model) for r, w in zip(test, wanted, strict=True) if w != aim]
        out["success"] = right(model, theta, rows_hit, [aim] * len(rows_hit))
    return out


RIGS = {"ruled": ruled}
