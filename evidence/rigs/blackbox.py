"""Rigs for forward gradients and black-box search: equal forward passes, and a trained encoder on shifted topics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.topics import CLASSES, documents, encoder, teach, topics
from evidence.rigs.trials import Metrics, Trial
from evidence.rigs.zeroth import softmax_world, tested
from fedllm.core.client import SERVER
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import IGNORE, Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.estimate import Policy
from fedllm.local.forward import run_losses
from fedllm.local.requests import Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def pacing(method: str, seed: int, *, forwards: int = 3000, threshold: float = 1.5) -> Metrics:
    """FwdLLM on 256 weights with and without pacing, each until so many perturbations are spent, at its best rate.

    `gain` is by how much the loss ends lower with pacing; `growth` the mean number of perturbations of the last third
    of the committed steps over that of the first; `forced` the share of steps committed above the threshold.
    """
    torch.set_num_threads(1)
    paced, loss, rate = tuned(method, seed, forwards, {"threshold": threshold, "perturbations": 8})
    _, other, bare_rate = tuned(method, seed, forwards, {"most": 0, "perturbations": 1, "threshold": 1e9})
    asked = paced.state["asked"]
    third = max(1, len(asked) // 3)
    return {"loss": loss, "unpaced": other, "gain": other - loss, "rate": rate, "unpaced_rate": bare_rate,
            "growth": float(np.mean(asked[-third:]) / np.mean(asked[:third])), "steps": float(len(asked)),
            "forced": paced.state["forced"] / len(asked)}


def tuned(method: str, seed: int, forwards: int, knobs: Mapping[str, Any]) -> tuple[Trial, float, float]:
    """The run of the lowest loss, that loss and its rate; rates are tried upward until the loss has risen twice."""
    ends: list[tuple[float, float, Trial]] = []
    for lr in RATES:
        run = spent_on(method, seed, forwards, {**knobs, "lr": lr})
        ends.append((float(np.nan_to_num(tested(run)["loss"], nan=np.inf)), lr, run))
        if len(ends) > 2 and ends[-3][0] < ends[-2][0] < ends[-1][0]:
            break
    loss, lr, run = min(ends, key=lambda end: end[0])
    return run, loss, lr


def spent_on(method: str, seed: int, forwards: int, knobs: Mapping[str, Any]) -> Trial:
    """Rounds until the perturbations are spent."""
    run = Trial(method, softmax_world(seed), dict(knobs))
    while sum(run.state["asked"]) < forwards:
        run.rounds(1)
    return run


@functools.lru_cache(maxsize=2)
def trained(seed: int, steps: int = 300) -> tuple[HeadedEncoder, np.ndarray]:
    """An encoder and a head that know eight topics, and the topics' words."""
    rng = numpy_stream(seed, "black box")
    words = topics(rng, len(CLASSES))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = HeadedEncoder(encoder(), len(CLASSES), "mean")
    teach(net, rng, words, steps)
    return net, words


def scattered(rng: np.random.Generator, words: np.ndarray, labels: np.ndarray) -> list[Encoded]:
    """Documents of which a fifth of all positions hold words of the first topic instead."""
    made = documents(rng, words, labels, 0.3)
    hit = [(rng.random(len(row.ids)) < 0.2, rng.choice(words[0], len(row.ids))) for row in made]
    return [replace(row, ids=np.where(at, word, row.ids).astype(np.int32))
            for row, (at, word) in zip(made, hit, strict=True)]


def black_box_world(seed: int, alpha: float | None, clients: int = 8, rows: int = 24) -> World:
    """The topics with a weaker signal, and words of the first one scattered over all; the head is the trained one.

    The model takes many documents for ones of the first topic, which a prompt can mend.
    """
    net, words = trained(seed)
    head = {n: t.clone() for n, t in net.classifier.state_dict().items()}
    rng = numpy_stream(seed, "shifted topics")
    even = np.full((clients, len(CLASSES)), 1 / len(CLASSES))
    mix = rng.dirichlet([alpha] * len(CLASSES), clients) if alpha else even
    shards = {f"client-{k}": Shard(scattered(rng, words, rng.choice(len(CLASSES), rows, p=mix[k])))  # type: ignore[arg-type]
              for k in range(clients)}
    test = scattered(rng, words, np.arange(800) % len(CLASSES))
    model = Model(net, None, "classification", make_space("soft_prompt", length=6), labels=CLASSES, seed=seed)
    net.classifier.load_state_dict(head)  # a model starts its head afresh
    return World(model, Federation(shards, test, "classification", CLASSES), LocalSpec(), seed)  # type: ignore[arg-type]


def black_box(method: str, seed: int, *, alpha: float | None = 0.5, rounds: int = 10,
              knobs: Mapping[str, Any] | None = None) -> Metrics:
    """FedBPT on eight clients of 24 rows: `accuracy` on a balanced test; `gain` over the plain loss as fitness, and
    `over_start` over the first prompt."""
    torch.set_num_threads(1)
    how = {"intrinsic_dim": 20, "local_iter": 4, **(knobs or {})}
    world = black_box_world(seed, alpha)
    start = tested(Trial(method, world, how))["accuracy"]
    ends = {p: tested(Trial(method, world, {**how, "perturb": p}).rounds(rounds))["accuracy"] for p in (True, False)}
    return {"accuracy": ends[True], "plain": ends[False], "gain": ends[True] - ends[False], "start": start,
            "over_start": ends[True] - start}


ARMS: Mapping[str, Mapping[str, Any]] = {
    "policy": {"candidates": 64}, "spsa": {"lr": 1.0, "c": 0.1}, "bayes": {"batch": None, "intrinsic_dim": 10}}
"""What each estimator is run with, found on seed 100."""


def black_prompt(method: str, seed: int, *, estimator: str = "policy", rounds: int = 20,
                 knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients of 48 rows with label skew: `accuracy` of the prompt on a balanced test, and `over_none`, how much
    more that is than the model's without a prompt. `calls` and `most`: asked, and what the rounds allow."""
    torch.set_num_threads(1)
    world = black_box_world(seed, 0.5, clients=4, rows=48)
    run = Trial(method, world, {"estimator": estimator, **ARMS[estimator], **(knobs or {})})
    [bare] = run_losses([Losses("test", world.model, {}, None, world.encoded(SERVER, "test"))], world.limits)
    ended = tested(run.rounds(rounds))
    none = float(bare.correct.sum() / bare.count.sum())
    return {"accuracy": ended["accuracy"], "none": none, "over_none": ended["accuracy"] - none, "loss": ended["loss"],
            "calls": float(run.state["queries"]["calls"]),
            "most": float(rounds * sum(run.method.calls(c.n) for c in world.infos()))}


def noisy_box(method: str, seed: int, *, queries: int = 1200, noise: float = 0.1) -> Metrics:
    """The mean of one N(0, 1) a place for the token that stands there (six places, 20 tokens), asked with noise.

    `policy`: true value of the prompt that the policy ends with; `below_random`: how much lower than that of the random
    prompt that was measured as the lowest; `optimum`: the lowest there is.
    """
    rng = numpy_stream(seed, "noisy box")
    table, how = rng.normal(size=(6, 20)), Policy(6, 20, steps=queries // 20, samples=20)

    def value(picks: np.ndarray) -> np.ndarray:
        return table[np.arange(6), picks].mean(-1)

    def ask(picks: np.ndarray) -> np.ndarray:
        return value(picks) + noise * rng.normal(size=len(picks))

    found = float(value(how.best(how.search(how.start(), ask, rng, 0, {}))))  # type: ignore[arg-type]
    drawn = rng.integers(0, 20, (queries, 6))
    luck = float(value(drawn[ask(drawn).argmin()]))
    return {"policy": found, "random": luck, "below_random": luck - found, "optimum": float(table.min(1).mean())}


def chained(rng: np.random.Generator, after: np.ndarray, rows: int) -> list[Encoded]:
    """Sequences of 16 tokens, each one of the four that this grammar has after the last."""
    ids = [rng.integers(0, len(after), rows)]
    for _ in range(15):
        ids.append(after[ids[-1], np.minimum(3, rng.geometric(0.6, rows) - 1)])
    rows_ = np.stack(ids, 1).astype(np.int32)
    return [Encoded(row, np.concatenate([[IGNORE], row[1:]]).astype(np.int64), 15) for row in rows_]


@functools.lru_cache(maxsize=2)
def grammarian(seed: int, steps: int = 600) -> tuple[LlamaForCausalLM, np.ndarray]:
    """A Llama of four blocks and width 64 that has learned four grammars, and their tables [4, 64, 4]."""
    rng = numpy_stream(seed, "grammars")
    after = rng.integers(0, 64, (4, 64, 4))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        ids = torch.from_numpy(np.stack([r.ids for g in after for r in chained(rng, g, 8)])).long()
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return net, after


def grammar_prompt(method: str, seed: int, *, rounds: int = 10, tuning: int = 2,
                   knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients with 48 rows of one of four grammars and a prompt of six tokens: `gain`, by how much the loss on
    unseen rows ends below the untuned prompt's; `personal_gain`, by how much `tuning` rounds alone lower it further."""
    torch.set_num_threads(1)
    net, after = grammarian(seed)
    rng = numpy_stream(seed, "grammar rows")
    shards = {f"client-{k}": Shard(chained(rng, after[0], 48)) for k in range(4)}  # type: ignore[arg-type]
    model = Model(net, None, "generation", make_space("soft_prompt", length=6), seed=seed)
    test = chained(rng, after[0], 200)
    world = World(model, Federation(shards, test, "generation"), LocalSpec(), seed, exact_match=False)  # type: ignore[arg-type]
    run = Trial(method, world, {"tune_after": rounds, **(knobs or {})})

    def loss() -> float:
        return float(np.mean([s["loss"] for s in run.scores("global").values()]))

    [bare] = run_losses([Losses("test", model, {}, None, world.encoded(SERVER, "test"))], world.limits)
    start, found = loss(), (run.rounds(rounds), loss())[1]
    own = (run.rounds(tuning), loss())[1]
    return {"loss": found, "start": start, "none": bare.mean, "gain": start - found, "personal_gain": found - own}


RIGS: dict[str, Callable[..., Metrics]] = {
    "pacing": pacing, "black_box": black_box, "black_prompt": black_prompt, 
    "grammar_prompt": grammar_prompt}
