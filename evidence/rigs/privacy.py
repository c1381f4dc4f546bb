"""Rigs on which privacy layers are measured: `RIGS[name](layer, seed, **options)` gives metrics by name."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from evidence.rigs.trials import Metrics, Trial
from fedllm.audits.att_gradient_inversion import Inversion, bag_recall, double_backward, tokens_of_rows
from fedllm.core.ask import Ask, on_client
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Payload, Tree
from fedllm.core.program import Fold, drive, serve
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import HeadedEncoder, Model
from fedllm.privacy.accountant import noise_for
from fedllm.privacy.fedml_he import mask_of, unpack
from fedllm.runs.layers import make_layer
from fedllm.runs.tape import Taped
from fedllm.spaces import make_space
from fedllm.wire import codec


def prefix_noise(layer: str, seed: int, *, rounds: int = 256, epsilon: float = 4.0, delta: float = 1e-6,
                 size: int = 2000, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Root mean square of the noise in the running sums of all rounds, each client in one of them.

    `over_independent` is that over what independent noise of the same epsilon leaves: z sqrt(t) after t rounds.
    """
    facts = Facts({f"c{i}": 1 for i in range(rounds)}, rounds, rounds)
    made: Any = make_layer(layer, {"epsilon": epsilon, "delta": delta, "clip_norm": 1.0, **(knobs or {})}, layer)
    made = made.bind(facts)
    clients, states, total, squares = _People(seed, rounds, size, zero=True), [made.init()], torch.zeros(size), 0.0
    engine = Wire((_Ship(), made), clients)
    for _ in range(rounds):
        value = drive(_Ship().round(clients), engine, [made], states)
        total = total + value["delta/x"] * value["n"]
        squares += float(total.pow(2).mean())
    rmse = math.sqrt(squares / rounds)
    independent = noise_for(epsilon, delta, 1) * math.sqrt((rounds + 1) / 2)
    return {"rmse": rmse, "independent": independent, "over_independent": rmse / independent}


def sums(layer: str, seed: int, *, clients: int = 10, size: int = 4000, dropped: float = 0.0,
         knobs: Mapping[str, Any] | None = None) -> Metrics:
    """One mean of random vectors through a layer: `error` is the largest against the plain mean of those who stayed,
    `quanta` that in units of what the layer declares for a mean, `bytes_per_value` of all replies, `seconds` of
    a client.
    """
    made: Any = make_layer(layer, dict(knobs or {}), layer)
    made = made.bind(Facts({f"c{i}": 1 for i in range(clients)}, clients, 1))
    people = _People(seed, clients, size)
    gone = set(numpy_stream(seed, "dropped").choice(sorted(people), round(dropped * clients), replace=False).tolist())
    engine = Wire((_Ship(), made), people, gone)
    out = drive(_Ship().round(people), engine, [made])
    stay = [c for c in people if c not in gone]
    weights = torch.tensor([people[c].n for c in stay], dtype=torch.float64)
    exact = (torch.stack([people[c].x.double() for c in stay]) * weights[:, None]).sum(0) / weights.sum()
    error = float((out["delta/x"].double() - exact).abs().max())
    quantum = 2.0 ** -made.fraction(clients) if layer.startswith("secagg") else 2.0**-20
    allowed = len(stay) * quantum / 2 / float(weights.sum())
    allowed += 2**-23 * float(exact.abs().max())  # the plain fp32 mean is off by as much
    return {"error": error, "quanta": error / allowed, "bytes_per_value": engine.bytes / len(stay) / size,
            "seconds": engine.seconds / len(stay), "answered": float(len(stay))}


TOKENS, LENGTH = 200, 8


def tiny_encoder(seed: int) -> HeadedEncoder:
    """Two blocks of width 64; weights are three times the usual, or a fresh network has hardly a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = BertModel(BertConfig(
            vocab_size=TOKENS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="eager"), add_pooling_layer=False)
        net = HeadedEncoder(body, 2, "mean")
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1 and "embeddings" not in name:
                p.mul_(3)
    return net


def inversion(layer: str, seed: int, *, knobs: Mapping[str, Any] | None = None, steps: int = 200,
              clients: int = 3) -> Metrics:
    """What the server reads of client 0's only row (8 tokens), from its reply after one step of SGD on all weights.

    `recall` is of the gradient matching, which does not look at the word embeddings' rows; `rows_recall` of just
    looking at which of these are not zero. With `fedml_he` both are measured for a random mask of the same size too.
    """
    torch.set_num_threads(1)
    first = _inverted(layer, seed, dict(knobs or {}), steps, clients)
    if layer != "fedml_he":
        return first
    other = _inverted(layer, seed, {**(knobs or {}), "mask": "random"}, steps, clients)
    return {**first, "random_recall": other["recall"], "random_rows_recall": other["rows_recall"],
            "less_than_random": other["recall"] - first["recall"]}


def _inverted(layer: str, seed: int, knobs: dict[str, Any], steps: int, clients: int) -> Metrics:
    rng = numpy_stream(seed, "inversion rows")
    rows = [Encoded(rng.choice(np.arange(1, TOKENS), LENGTH, replace=False).astype(np.int32), int(rng.integers(2)), 1)
            for _ in range(clients)]
    plain = tiny_encoder(seed)  # the attacker's own copy
    model = Model(copy.deepcopy(plain), None, "classification", make_space("full"), labels=("a", "b"), seed=seed)
    theta = model.initial()
    fed = Federation({f"c{i}": Shard([r]) for i, r in enumerate(rows)}, [], "classification", ("a", "b"))  # type: ignore[list-item]
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=LR, steps=1, batch_size=1), seed)
    made = [make_layer(layer, knobs, layer)] if layer != "fedavg" else []
    view = View()
    trial = Trial("fedavg", world, {}, layers=[*made, view])
    began = time.perf_counter()
    trial.rounds(1)
    seconds = time.perf_counter() - began
    reply = next(r for r in view.replies if "plain" in r or "delta/classifier.bias" in r)
    masks = unpack(trial.states[0]["map"]) if made else {}
    seen = gradient_of(reply, theta, masks)
    words = next(n for n in seen if n.endswith("word_embeddings.weight"))
    by_rows = tokens_of_rows(*seen.pop(words))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(theta[name])
    double_backward(plain.body)
    found = Inversion(steps=steps, seed=seed).recover(plain.eval(), seen, LENGTH)
    real = rows[0].ids.tolist()
    wrong = len(set(by_rows) - set(real))
    return {"recall": bag_recall(found, real), "rows_recall": bag_recall(by_rows, real), "rows_wrong": float(wrong),
            "bytes": float(codec.size(reply)), "values": float(sum(t.numel() for t in theta.values())),
            "round_seconds": seconds}


LR = 1.0


def gradient_of(reply: Payload, like: Tree, masks: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(gradient, seen) of each trainable from one client's reply: all of it, or the plain part beside ciphertexts."""
    if "plain" not in reply:
        return {n: (-reply[f"delta/{n}"] / LR, torch.ones_like(t, dtype=torch.bool)) for n, t in like.items()}
    plain, out = reply["plain"], {}
    for key, _, *shape in reply["tensors"]:
        hidden = mask_of(masks, key, tuple(shape))
        g, n = torch.zeros(tuple(shape)), int((~hidden).sum())
        g[~hidden], plain = -plain[:n] / LR, plain[n:]
        out[key.partition("/")[2]] = (g, ~hidden)
    return out


class View(Layer):
    """The server's own view: every single reply as it came in."""

    def __init__(self) -> None:
        self.replies: list[Payload] = []

    def _keep(self, reply: Payload) -> int:
        self.replies.append(dict(reply))
        return 0

    def server(self, ask: Ask, state: Any) -> Any:
        if ask.reducer is None:
            return (yield ask)
        return (yield replace(ask, reduce=Taped(ask.reducer, self._keep)))  # type: ignore[arg-type]


class _Ship:
    """Every client sends a vector of its own, weighed by its rows."""

    def round(self, clients: Sequence[str] | Mapping[str, Any]) -> Any:
        return (yield Ask(self.local, {c: {} for c in clients})).value

    @on_client(reduce=Mean())
    def local(self, msg: Payload, client: Any) -> Payload:
        return {"delta/x": client.x, "n": client.n}


@dataclass
class _Person:
    id: str
    x: Tensor
    n: int
    memory: dict[str, Any] = field(default_factory=dict)


class _People(dict[str, _Person]):
    def __init__(self, seed: int, count: int, size: int, zero: bool = False) -> None:
        super().__init__()
        rng = torch_stream(seed, "people")
        for i in range(count):
            x = torch.zeros(size) if zero else torch.randn(size, generator=rng)
            self[f"c{i}"] = _Person(f"c{i}", x, i % 7 + 1)


class Wire:
    """The smallest engine: every function is called in turn, and what it sends is counted."""

    def __init__(self, stack: Sequence[Any], clients: Mapping[str, Any], gone: Sequence[str] | set[str] = ()) -> None:
        self.stack, self.clients, self.gone = tuple(stack), clients, set(gone)
        self.bytes, self.seconds = 0, 0.0

    def send(self, asks: Sequence[Ask]) -> Any:
        folds = [Fold(ask) for ask in asks]
        for fold in folds:
            for cid, msg in fold.ask.msgs.items():
                if cid in self.gone and fold.ask.phase.endswith(".local"):
                    fold.miss(cid, "silent")
                    continue
                began = time.process_time()
                reply = serve(self.stack, fold.ask.phase, msg, self.clients[cid])
                self.seconds += time.process_time() - began
                self.bytes += codec.size(reply)
                fold.take(cid, reply)
        return [fold.done() for fold in folds]


RIGS = {"prefix_noise": prefix_noise, "layer_sums": sums, "inversion": inversion}
