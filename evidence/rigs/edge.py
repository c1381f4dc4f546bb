"""Rigs of methods for the edge: what depends on the order of frames alone, many tasks on one device, bytes, joules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from evidence.rigs.topics import CLASSES, VOCAB, pretrained, topic_federation
from evidence.rigs.trials import Metrics, Scripted, Trial
from fedllm.core.payload import digest
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_losses
from fedllm.local.requests import Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.load import load_model
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space

STEPS = 8
"""Steps of a piece of work: reach, grasp, lift, ..."""
ORDERS = 4
LOOKS = 4
"""Ways in which a step looks: as many token ids."""
FRAMES = 16
TIMED = ("cefhri",)
"""Methods whose adapters look along time; others get a plain adapter with at least as many parameters."""


def clips(rng: np.random.Generator, after: np.ndarray, labels: np.ndarray, noise: float) -> list[Encoded]:
    """One recording a label: the steps go round in the order of the label, from any step on, twice; a frame shows any
    step instead with probability `noise`. Every class shows every step equally often, so only the order tells."""
    out = []
    for y in labels:
        steps = [int(rng.integers(STEPS))]
        while len(steps) < FRAMES:
            steps.append(int(after[y, steps[-1]]))
        shown = np.where(rng.random(FRAMES) < noise, rng.integers(0, STEPS, FRAMES), steps)
        out.append(Encoded((shown * LOOKS + rng.integers(0, LOOKS, FRAMES)).astype(np.int32), int(y), 1))
    return out


@functools.lru_cache(maxsize=4)
def order_federation(seed: int, clients: int = 8, alpha: float = 0.5, rows: int = 60, noise: float = 0.1) -> Federation:
    """Eight workplaces of 60 recordings with Dirichlet(0.5) over four orders of the same steps; 400 to test."""
    rng = numpy_stream(seed, "frame order")
    after = np.empty((ORDERS, STEPS), int)  # one cycle through all steps each
    for y in range(ORDERS):
        cycle = rng.permutation(STEPS)
        after[y, cycle] = np.roll(cycle, -1)
    shards = {}
    for k in range(clients):
        mix = rng.dirichlet([alpha] * ORDERS)
        shards[f"client-{k}"] = Shard(clips(rng, after, rng.choice(ORDERS, rows, p=mix), noise),  # type: ignore[arg-type]
                                      clips(rng, after, rng.choice(ORDERS, 20, p=mix), noise))  # type: ignore[arg-type]
    test = clips(rng, after, rng.integers(0, ORDERS, 400), noise)
    return Federation(shards, test, "classification", tuple(f"order-{y}" for y in range(ORDERS)))  # type: ignore[arg-type]


def frozen_encoder(seed: int, blind: bool) -> HeadedEncoder:
    """A frozen random BERT of two blocks; a blind one cannot tell positions: its position embeddings are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = BertModel(BertConfig(
            vocab_size=STEPS * LOOKS, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=FRAMES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0),
            add_pooling_layer=False)
        torch.nn.init.normal_(body.embeddings.word_embeddings.weight)
        where = torch.nn.init.zeros_ if blind else torch.nn.init.normal_
        where(body.embeddings.position_embeddings.weight)
        return HeadedEncoder(body, ORDERS, "mean")


def frame_order(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 20, size: int = 24,
                blind: bool = False, local: Mapping[str, Any] | None = None) -> Metrics:
    """Accuracy on recordings whose label is the order of their steps and nothing else; a blind encoder leaves it to
    the adapters alone to see it.

    Both adapters have the same number of parameters up to one more unit of the plain one's bottleneck.
    """
    torch.set_num_threads(1)
    fed = order_federation(seed)
    timed = make_space("st_adapter", size=size, kernel=(3, 1, 1))
    space = timed if method in TIMED else make_space("adapter", size=size + 1)
    model = Model(frozen_encoder(seed, blind), None, "classification", space, labels=fed.labels, seed=seed)
    spec = LocalSpec(**{"lr": 1e-2, "steps": 20, "batch_size": 16, **(local or {})})
    run = Trial(method, World(model, fed, spec, seed), dict(knobs or {})).rounds(rounds)
    scores = run.scores("global").values()
    return {"accuracy": float(np.mean([s["accuracy"] for s in scores])),
            "loss": float(np.mean([s["loss"] for s in scores])),
            "trained": float(sum(t.numel() for t in model.initial().values())), **run.work()}


def minilm_bytes(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None,
                 space: Mapping[str, Any] | None = None) -> Metrics:
    """What a client of MiniLM sends up in a round, encoded, over what full fine-tuning by FedAvg sends (`up_share`)."""
    torch.set_num_threads(1)
    sent = {}
    for name, which in ((method, dict(space or {"name": "st_adapter", "size": 64})), ("fedavg", {"name": "full"})):
        model = load_model("minilm", "classification", make_space(which.pop("name"), **which), labels=("a", "b"),
                           seed=seed)
        row = {"text": "the quick brown fox", "label": 0, "category": "one"}
        fed = Federation({"client-0": Shard([row])}, [], "classification", ("a", "b"))
        run = Trial(name, World(model, fed, LocalSpec(), seed), dict(knobs or {}) if name == method else {}, Scripted)
        run.rounds(2)
        sent[name] = sum(e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["round"] == 1
                         and e["direction"] == "up")
    share = sent[method] / sent["fedavg"]
    return {"up": float(sent[method]), "up_share": share, "ratio": 1 / share}


def words(documents: Sequence[Any], task: str) -> list[dict[str, Any]]:
    """Documents as text of a task's client."""
    return [{"text": " ".join(f"w{i}" for i in e.ids), "label": e.labels, "category": task} for e in documents]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`w17` is token 17."""
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w0")


def two_tasks(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 10,
              spaces: Mapping[str, str] | None = None, local: Mapping[str, Any] | None = None,
              together: bool = False) -> Metrics:
    """Ten rounds of four clients with topics of task A, then ten of four others with those of task B, on one encoder.

    `together`: in each of the twenty rounds two clients of either task take part, by turns: as much work, and nothing
    to forget. `accuracy` is the mean over both tasks at the end, `least` the lesser.

    `spaces` gives a method another space than LoRA. `forgotten` is the accuracy on A lost by B, `changed` the largest
    change of a test row's loss, `backbone_changed` whether any frozen weight differs at the end.
    """
    torch.set_num_threads(1)
    kind, shards, tests = (spaces or {}).get(method, "lora"), {}, {}
    for j, task in enumerate("AB"):
        fed = topic_federation(1000 * j + seed, clients=4, alpha=1.0)
        shards |= {f"{task}-{k}": Shard(words(s.train, task)) for k, s in enumerate(fed.clients.values())}
        tests[task] = words(fed.test, task)
    more = {"rank": 8, "alpha": 16.0, "targets": "all-linear"} if kind == "lora" else {}
    model = Model(pretrained(seed), word_tokenizer(), "classification", make_space(kind, **more), labels=CLASSES,
                  seed=seed)
    lr = 3e-3 if kind == "full" else 1e-2  # each at a rate that suits it
    spec = LocalSpec(**{"lr": lr, "steps": 10, "batch_size": 16, **(local or {})})
    run = Trial(method, World(model, Federation(shards, [], "classification", CLASSES), spec, seed), dict(knobs or {}))
    before, seen = backbone_of(model), {}
    everybody = run.world.infos()
    for half, task in enumerate("AB"):
        for t in range(rounds):
            pair = (t + half * rounds) % 2  # clients 0 and 1, or 2 and 3, of either task
            run.rounds(1, [c for c in everybody if (int(c.id[2:]) // 2 == pair if together else c.id[0] == task)])
        for on, rows in tests.items():
            theta = run.method.modules(run.state).get(on) or run.method.served(run.state)[0]
            if on <= task:
                seen[on + task] = run_losses([Losses(on, model, theta, None, run.world.tokenized(rows))], Limits())[0]
    accuracy = {at: float(got.correct.mean()) for at, got in seen.items()}
    both = (accuracy["AB"], accuracy["BB"])
    return {"accuracy": float(np.mean(both)), "least": min(both), "work_rounds": float(run.t),
            "work_steps": float((spec.steps or 0) * run.t * 4), "accuracy_a": accuracy["AA"],
            "accuracy_b": accuracy["BB"], "forgotten": accuracy["AA"] - accuracy["AB"],
            "changed": float(np.abs(seen["AA"].total - seen["AB"].total).max()),
            "backbone_changed": float(backbone_of(model) != before)}


def backbone_of(model: Model) -> str:
    """The hash of all weights that the model's net holds."""
    return digest(dict(model.net.named_parameters()))


RIGS: dict[str, Callable[..., Metrics]] = {
    "frame_order": frame_order, "minilm_bytes": minilm_bytes, "two_tasks": two_tasks}
