"""Small encoders at clients, and large ones at the server that know half of what labels hang on, or all of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from evidence.rigs.topics import CLASSES, LENGTH, VOCAB, WORDS, backbone, cache_dir, encoder, keep, topics
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.objectives.distill import teacher_logits
from fedllm.local.objectives.two_views import states
from fedllm.local.requests import Limits, Measure
from fedllm.local.spec import LocalSpec
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

SHARE, SIDES = 0.3, 3
Draw = Callable[[np.random.Generator, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(rng, topics' words, rows) -> (ids [rows, length], labels)."""


def two_sided(side: int | None) -> Draw:
    """Documents with a topic of the first three and one of the last three; the label is the pair, or one `side`."""

    def draw(rng: np.random.Generator, words: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = rng.integers(0, SIDES, n), rng.integers(0, SIDES, n)
        u = rng.random((n, LENGTH))
        pick = lambda k: words[k[:, None], rng.integers(0, WORDS, (n, LENGTH))]  # noqa: E731
        noise = rng.integers(20, VOCAB, (n, LENGTH))
        ids = np.where(u < SHARE, pick(a), np.where(u < 2 * SHARE, pick(SIDES + b), noise)).astype(np.int32)
        return ids, SIDES * a + b if side is None else (a, b)[side]

    return draw


def of_topics(mix: np.ndarray) -> Draw:
    """Documents of one topic each, topics in this mix."""

    def draw(rng: np.random.Generator, words: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.choice(len(mix), n, p=mix)
        own = words[y[:, None], rng.integers(0, WORDS, (n, LENGTH))]
        noise = rng.integers(20, VOCAB, (n, LENGTH))
        return np.where(rng.random((n, LENGTH)) < SHARE, own, noise).astype(np.int32), y

    return draw


def rows(draw: Draw, rng: np.random.Generator, words: np.ndarray, n: int) -> list[Encoded]:
    """So many tokenized rows."""
    return [Encoded(ids, int(y), 1) for ids, y in zip(*draw(rng, words, n), strict=True)]


def net(seed: int, labels: int, blocks: int) -> HeadedEncoder:
    """A fresh encoder of so many blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = HeadedEncoder(encoder(), labels, "mean")
    made.body.encoder.layer = made.body.encoder.layer[:blocks]
    made.body.config.num_hidden_layers = blocks
    return made


@functools.lru_cache(maxsize=8)
def schooled(seed: int, what: str, labels: int, steps: int = 150) -> dict[str, torch.Tensor]:
    """A large encoder's weights, pre-trained on other topics, after learning from new documents; trained once, then
    read from the cache."""
    path = cache_dir() / f"big-{what}-{seed}-{steps}-v2.safetensors"
    if path.is_file():
        return load_file(path)
    draw = {"first": two_sided(0), "second": two_sided(1)}.get(what) or of_topics(np.full(labels, 1 / labels))
    made, rng, words = net(seed + 1, labels, 2), numpy_stream(seed, "school", what), world_words(seed)
    made.body.load_state_dict(backbone(seed, 700))
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    for _ in range(steps):
        ids, y = draw(rng, words, 32)
        x = torch.from_numpy(ids).long()
        z = made.classifier(made.pool(made.body(input_ids=x).last_hidden_state, torch.ones_like(x, dtype=torch.bool)))
        loss = F.cross_entropy(z, torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return keep(path, made.state_dict())


def world_words(seed: int) -> np.ndarray:
    """The words of eight topics."""
    return topics(numpy_stream(seed, "big teachers"), 8)


def taught(seed: int, what: str, labels: int) -> Model:
    """A large encoder that was schooled in this."""
    made, known = net(seed + 1, labels, 2), schooled(seed, what, labels)
    made.load_state_dict(known)
    model = Model(made, None, "classification", make_space("head"), labels=CLASSES[:labels], seed=seed)
    model.start = {n: t for n, t in known.items() if n.startswith("classifier.")}  # a model's head begins anew
    return model


def spec_of(local: Mapping[str, Any] | None, steps: int) -> LocalSpec:
    """AdamW, batches of 16."""
    return LocalSpec(**{"optimizer": "adamw", "lr": 2e-3, "steps": steps, "batch_size": 16, **(local or {})})


def views(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 4,
          local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 36 documents of nine labels, each a pair of topics; two teachers that know one side of the pair
    each; 240 public documents without labels. `accuracy` of the shared model of one block on 360."""
    torch.set_num_threads(1)
    rng, words, draw = numpy_stream(seed, "views"), world_words(seed), two_sided(None)
    names = tuple(f"pair-{i}" for i in range(9))
    fed = Federation({f"client-{k}": Shard(rows(draw, rng, words, 36)) for k in range(4)},  # type: ignore[arg-type]
                     rows(draw, rng, words, 360), "classification", names, rows(draw, rng, words, 240))  # type: ignore[arg-type]
    student = Model(net(seed, 9, 1), None, "classification", make_space("full"), labels=names, seed=seed)
    teachers = {n: taught(seed, n, SIDES) for n in ("first", "second")}
    ours = {"teachers": ("first", "second"), "pretrain_steps": 80} if method == "multi_fm_kd" else {}
    run = Trial(method, World(student, fed, spec_of(local, 15), seed, models=Shelf({
        n: (lambda m=m: m) for n, m in teachers.items()})), {**ours, **(knobs or {})}).rounds(rounds)
    return {"accuracy": float(next(iter(run.scores("global").values()))["accuracy"]), **run.work()}


def tailed(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
           local: Mapping[str, Any] | None = None) -> Metrics:
    """Eight clients with 60 documents of eight topics, 50 times as many of the first as of the last, skewed by
    Dirichlet(0.5); 160 public documents of all alike, whose labels nobody reads. `accuracy` of the shared model on 480
    of all alike, `tail` on those of the three rarest topics."""
    torch.set_num_threads(1)
    rng, words = numpy_stream(seed, "tailed"), world_words(seed)
    mix, even = 50.0 ** -(np.arange(8) / 7), np.full(8, 1 / 8)
    shards = {}
    for k in range(8):
        own = mix * rng.dirichlet([0.5] * 8)
        shards[f"client-{k}"] = Shard(rows(of_topics(own / own.sum()), rng, words, 60))  # type: ignore[arg-type]
    test = rows(of_topics(even), rng, words, 480)
    fed = Federation(shards, test, "classification", CLASSES, rows(of_topics(even), rng, words, 160))  # type: ignore[arg-type]
    student = Model(net(seed, 8, 1), None, "classification", make_space("full"), labels=CLASSES, seed=seed)
    big = taught(seed, "topics", 8)
    ours = {"align_steps": 15, "stages": "2,3"} if method == "mllm_fl" else {}
    run = Trial(method, World(student, fed, spec_of(local, 15), seed, models=Shelf({"teacher": lambda: big})),
                {**ours, **(knobs or {})}).rounds(rounds)
    theta = run.method.served(run.state)[0]
    z = run_measures([Measure("x", student, theta, None, test, fn=teacher_logits)], Limits())[0]
    y = np.array([int(r.labels) for r in test])
    right = z.argmax(1) == y
    return {"accuracy": float(right.mean()), "tail": float(right[y >= 5].mean()), **run.work()}


def few_labels(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
               local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 5 labelled documents of each of eight topics and 200 without labels, which FedAvg does not
    have. `accuracy` of the shared model of one block on 400; `spread`: the features' deviation by 1 / sqrt(d)."""
    torch.set_num_threads(1)
    rng, words, even = numpy_stream(seed, "few labels"), world_words(seed), np.full(8, 1 / 8)
    ours, shards = method == "fedaffect", {}
    for k in range(4):
        known = [r for y in range(8) for r in rows(of_topics(np.eye(8)[y]), rng, words, 5)]
        rest = rows(of_topics(even), rng, words, 200)
        shards[f"client-{k}"] = Shard([*known, *(rest if ours else [])])  # type: ignore[arg-type]
    test = rows(of_topics(even), rng, words, 400)
    fed = Federation(shards, test, "classification", CLASSES)  # type: ignore[arg-type]
    student = Model(net(seed, 8, 1), None, "classification", make_space("full"), labels=CLASSES, seed=seed)
    told = {"u_steps": 20, "l_steps": 12, "freeze_encoder": False, **(knobs or {})} if ours else dict(knobs or {})
    run = Trial(method, World(student, fed, spec_of(local, 12), seed), told).rounds(rounds)
    theta = run.method.served(run.state)[0]
    r = torch.from_numpy(run_measures([Measure("x", student, theta, None, test, fn=states)], Limits())[0])
    spread = float(F.normalize(r, dim=1).std(0).mean()) * r.shape[1] ** 0.5
    return {"accuracy": float(next(iter(run.scores("global").values()))["accuracy"]), "spread": spread, **run.work()}


RIGS = {"views": views, "tailed": tailed, "few_labels": few_labels}
