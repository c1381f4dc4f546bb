"""Things of which six owners each hold a part: what one joint answer is worth beside the owners' own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.layer import Layer
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.requests import Measure
from fedllm.local.spec import LocalSpec
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model
from fedllm.spaces import make_space

OWNERS, KINDS, FACTS, LEVELS, WORDS = 6, 4, 6, 6, 12
"""Of a thing: owners, classes, hidden numbers; of a part: readings of so many levels, and words."""
NAMES = tuple(f"site-{k}" for k in range(OWNERS))
PAIRS = {False: tuple(f"site-{k} site-{k + 1}" for k in (0, 2, 4)), True: ("site-1 site-2",)}
"""Owners that read nearly the same; where the class is whether two agree, these two."""


@functools.cache
def reader() -> PreTrainedTokenizerFast:
    """Words `0a0` to `5c5`: whose reading, which, and its level."""
    words = ["<pad>", "<unk>", *(f"{k}{r}{level}" for k in range(OWNERS) for r in "abc" for level in range(LEVELS))]
    tok = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>")


def encoder(seed: int) -> Model:
    """One block with random weights, under which each owner trains a hidden layer of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = BertModel(BertConfig(
            vocab_size=len(reader()), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=OWNERS * WORDS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            add_pooling_layer=False)
        net = HeadedEncoder(body, KINDS, "mean")
    return Model(net, reader(), "classification", make_space("mlp_head", size=24), labels=tuple("wxyz"), seed=seed)


def parted(seed: int, things: int, coupled: bool) -> dict[str, list[Row]]:
    """Each owner's part of things: twelve words on three readings of six hidden numbers.

    The class is a linear one of the numbers, and two owners of a pair read nearly the same. `coupled`: owners read
    numbers apart, label by the signs of their own first two readings, and the first has the class: whether the first
    signs of two others agree.
    """
    rng = numpy_stream(seed, "parts")
    facts = rng.normal(0, 1, (things, FACTS))
    y = (facts @ rng.normal(0, 1, (FACTS, KINDS))).argmax(1)
    pairs, own = rng.normal(0, 1, (OWNERS // 2, FACTS, 3)), [y] * OWNERS
    maps = [pairs[k // 2] + 0.3 * rng.normal(0, 1, (FACTS, 3)) for k in range(OWNERS)]
    read = [facts @ (m / np.linalg.norm(m, axis=0)) for m in maps]  # [things, 3] each
    if coupled:
        read = list(rng.normal(0, 1, (OWNERS, things, 3)))
        signs = [(x > 0).astype(int) for x in read]
        own = [s[:, 0] + 2 * s[:, 1] for s in signs]
        own[0] = (signs[1] == signs[2])[:, 0].astype(int)
    rows: dict[str, list[Row]] = {}
    for k, (name, x, labels) in enumerate(zip(NAMES, read, own, strict=True)):
        at = rng.integers(0, 3, (things, WORDS))
        level = np.clip(np.round(1.5 * (np.take_along_axis(x, at, 1) + rng.normal(0, 0.5, at.shape)) + 2.5), 0,
                        LEVELS - 1).astype(int)
        said = [" ".join(f"{k}{'abc'[a]}{v}" for a, v in zip(*one, strict=True)) for one in zip(at, level, strict=True)]
        rows[name] = [{"id": f"t{i}", "label": int(c), "text": t} for i, (c, t) in enumerate(zip(labels, said,
                                                                                               strict=True))]
    return rows


class Told(Layer):
    """How many numbers of a thing an owner's reply holds, at the most."""

    most = 0.0

    def client(self, fn, msg, client, call):
        reply = call(msg)
        if fn.__name__ == "show":
            held = sum(v.numel() for v in reply.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
            self.most = max(self.most, held / len(msg["ids"]))
        return reply


def parts(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, lost: int = 0, coupled: bool = False,
          train: int = 256, tests: int = 256, rounds: int = 3, local: Mapping[str, Any] | None = None,
          alone: bool = False, pooled: bool = False) -> Metrics:
    """`accuracy` of joint answers, `best` of the owners' own and `over_best`; `permuted`: the most that a logit moves
    where one owner's neurons and its map change places; `numbers_beside` d that leave of a thing. `lost`: so many
    owners lack their part of each thing of the test, of those that hold no labels. `right` is the joint answers', or
    `alone` the owners' own on the mean, or `pooled` that of one owner with all parts."""
    torch.set_num_threads(1)
    rows, rng = parted(seed, train + tests, coupled), numpy_stream(seed, "lost")
    gone = [set(rng.choice(NAMES[1:], lost, replace=False)) for _ in range(tests)]
    fed = Federation({c: Shard(mine[:train], [r for r, g in zip(mine[train:], gone, strict=True) if c not in g])
                      for c, mine in rows.items()}, (), "classification", tuple("wxyz"))
    told = dict(knobs or {})
    told |= {"edges": PAIRS[coupled]} if told.get("graph") == "given" else {}
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": 60, "batch_size": 32, **(local or {})})
    ear = Told()
    run = Trial(method, World(encoder(seed), fed, spec, seed), told, layers=(ear,)).rounds(rounds)
    joint = next(iter(run.scores("local").values()))
    own = [_alone(run, c, rows[c][train:]) for c in NAMES]
    right = np.mean(own) if alone else joint["accuracy"]
    if pooled:
        whole = [{**one[0], "text": " ".join(r["text"] for r in one)} for one in zip(*rows.values(), strict=True)]
        fed = Federation({"all": Shard(whole[:train], whole[train:])}, (), "classification", tuple("wxyz"))
        one = Trial("fedavg", World(encoder(seed), fed, spec, seed), {}).rounds(rounds)
        right = one.scores("local")["all"]["accuracy"]
    return {"right": float(right), "accuracy": float(joint["accuracy"]), "best": max(own),
            "over_best": float(joint["accuracy"]) - max(own), "permuted": _permuted(run),
            "numbers_beside": ear.most - run.state["d"], **run.work()}


def _alone(run: Trial, client: str, tests: Any) -> float:
    """How often an owner's own head is right by its own part, of which it lacks none."""
    model, world = run.world.model, run.world
    theta = run.engine.memory[client]["theta"]
    rows = world.tokenized(tests, True, model)
    z = run_measures([Measure(client, model, theta, None, rows, fn=lambda m, b: m.class_logits(b))], world.limits)[0]
    return float((z.argmax(1) == np.array([r["label"] for r in tests])).mean())


def _permuted(run: Trial) -> float:
    """By how much logits differ where owner 1's neurons, and the columns of its map, are in another order."""
    net, how = run.state["net"], run.method.wiring(run.state["owners"])
    if "A/site-1" not in net:
        return 0.0
    draw = torch_stream(run.world.seed, "permuted")
    h, has = torch.randn(OWNERS, 8, run.state["d"], generator=draw), torch.ones(OWNERS, 8, dtype=torch.bool)
    order = torch.randperm(run.state["d"], generator=draw)
    moved = h.clone()
    moved[1] = h[1][:, order]
    other = {**net, "A/site-1": net["A/site-1"][:, order]}
    return float((how.logits(net, h, has) - how.logits(other, moved, has)).abs().max())


RIGS = {"parts": parts}
