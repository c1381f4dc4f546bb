"""Rigs on which attacks by the server and audits are measured: `RIGS[name](attack, seed, **options)` gives metrics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evidence.rigs.privacy import TOKENS, tiny_encoder
from evidence.rigs.trials import Metrics, Trial
from fedllm.audits.att_attribute import Attribute
from fedllm.audits.att_decepticons import Decepticons, Forging, pairs
from fedllm.audits.att_film import FILM
from fedllm.audits.att_gradient_inversion import Inversion, bigrams, double_backward
from fedllm.audits.recovered import compare, guess, rouge_l
from fedllm.audits.view import ServerView
from fedllm.core.errors import QuorumError
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Tree, add, part
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space

WORDS, PLACES = 500, 64


def small_gpt(seed: int, activation: str = "gelu_new", untied: bool = False) -> GPT2LMHeadModel:
    """Three blocks of width 96 over 500 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=WORDS, n_positions=PLACES, n_embd=96, n_layer=3, n_head=4, n_inner=384,
            activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            tie_word_embeddings=not untied, bos_token_id=0, eos_token_id=0))


def zipf_rows(rng: np.random.Generator, count: int, length: int, words: int = WORDS) -> list[Encoded]:
    """Rows of a language whose words are as unequal as real ones: p(w) ~ 1 / (rank + 2)."""
    p = 1 / (np.arange(1, words) + 2.0)
    ids = rng.choice(np.arange(1, words), (count, length), p=p / p.sum()).astype(np.int32)
    labels = ids.astype(np.int64)
    labels[:, 0] = -100
    return [Encoded(i, y, length - 1) for i, y in zip(ids, labels, strict=True)]


DP = {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}


def bound_layers(names: Sequence[str], clients: int, rows: int, local: LocalSpec, seed: int, rounds: int = 1,
                 dp: Mapping[str, Any] = DP) -> list[Layer]:
    """Layers by name, as a run of so many rounds would have them."""
    facts = Facts({f"client-{k}": rows for k in range(clients)}, clients, rounds, local)
    knobs = {n: {**dp, "seed": seed} if n.startswith("dp_") else {} for n in names}
    return [make_layer(n, knobs[n], f"layers.{i}").bind(facts) for i, n in enumerate(names)]


def one_round(world: World, layers: Sequence[Layer], below: Sequence[Layer] = ()) -> ServerView:
    """A round of FedAvg, and what the server got to see of it: nothing where the clients would not answer."""
    view = ServerView(layers)
    with contextlib.suppress(QuorumError):
        Trial("fedavg", world, {}, layers=[view, *layers, *below]).rounds(1)
    return view


def change(view: ServerView, client: str) -> Tree:
    """The change that this client's weights went through, as the server sees it: under sums, everybody's mean."""
    return part(view.value or {} if view.sums else view.each.get(client, {}), "delta")


def decepticons(attack: str, seed: int, *, layers: Sequence[str] = (), clients: int = 1, rows: int = 1,
                length: int = 32, forged: bool = True, activation: str = "gelu_new",
                knobs: Mapping[str, Any] | None = None) -> Metrics:
    """A forged GPT-2 goes out, every client takes one step of SGD, and the server reads what comes back.

    `pairs` is the share of client 0's (place, token) pairs that were found, `recall`, `precision` and `rouge_l` of its
    tokens, and `guess_*` the same of the commonest public tokens. `own` divides `pairs` by how many clients it may
    have been.
    """
    torch.set_num_threads(1)
    rng, net = numpy_stream(seed, "decepticons rows"), small_gpt(seed, activation)
    data = {f"client-{k}": zipf_rows(rng, rows, length) for k in range(clients)}
    how = Decepticons(**{"seed": seed, **(knobs or {})})
    weights = how.forge(net)
    local = LocalSpec(optimizer="sgd", lr=1.0, steps=1, batch_size=rows)
    model = Model(net, None, "generation", make_space("full"), seed=seed)
    fed = Federation({c: Shard(r) for c, r in data.items()}, [], "generation")  # type: ignore[arg-type]
    world = World(model, fed, local, seed, exact_match=False)
    made = bound_layers(layers, clients, rows, local, seed)
    view = one_round(world, made, [Forging(weights)] if forged else [])
    seen = change(view, "client-0")
    at_once = rows * clients if view.sums else rows
    found = how.read(net, weights if forged else model.initial(), {n: -t for n, t in seen.items()}, at_once) if (
        seen) else []
    real = [e.ids.tolist() for e in data["client-0"]]
    texts = [[row[p] for p in sorted(row)] for row in found]
    got = compare(texts, real)
    public = [e.ids.tolist() for e in zipf_rows(numpy_stream(seed, "public"), 200, length)]
    blind = compare(guess(public, [length] * rows), real)
    hits = pairs(found, real)
    return {"pairs": hits, "own": hits / (clients if view.sums else 1), "recall": got.recall,
            "precision": got.precision, "rouge_l": got.rouge_l, "guess_recall": blind.recall,
            "guess_rouge_l": blind.rouge_l, "found": float(got.found)}


def reading(attack: str, seed: int, *, variant: str = "cos", layers: Sequence[str] = (), clients: int = 1,
            rows: int = 1, length: int = 8, steps: int = 200, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Gradient inversion on client 0's rows (8 tokens each) after one step of SGD on all weights of a small encoder.

    Of a sum the attacker looks for the rows of all clients at once. The word embeddings' rows, which name the tokens
    without any search, are hidden from the attacker. `over_guess` is its recall over that of the commonest public
    tokens; `less_than_one` how much less than of one row alone, and `order_gain` how much more ROUGE-L than
    Inverting Gradients.
    """
    torch.set_num_threads(1)
    options = {"layers": layers, "clients": clients, "length": length, "steps": steps, "knobs": knobs or {}}
    out = _read(seed, variant, rows, **options)
    if rows > 1 and variant == "cos":
        out["less_than_one"] = _read(seed, variant, 1, **options)["recall"] - out["recall"]
    if variant == "lamp":
        out["order_gain"] = out["rouge_l"] - _read(seed, "cos", rows, **options)["rouge_l"]
    return out


def _read(seed: int, variant: str, rows: int, layers: Sequence[str], clients: int, length: int, steps: int,
          knobs: Mapping[str, Any]) -> Metrics:
    rng = numpy_stream(seed, "reading")
    data = {f"client-{k}": labelled(rng, rows, length) for k in range(clients)}
    plain = tiny_encoder(seed)
    model = Model(copy.deepcopy(plain), None, "classification", make_space("full"), labels=("a", "b"), seed=seed)
    local = LocalSpec(optimizer="sgd", lr=1.0, steps=1, batch_size=rows)
    world = World(model, Federation({c: Shard(r) for c, r in data.items()}, [], "classification", ("a", "b")),  # type: ignore[arg-type]
                  local, seed)
    view = one_round(world, bound_layers(layers, clients, rows, local, seed))
    moved, start = change(view, "client-0"), model.initial()
    at_once = [e for held in data.values() for e in held] if view.sums else data["client-0"]  # all whom the sum shows
    real, public = at_once, labelled(numpy_stream(seed, "public"), 200, length)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(start[name])
    double_backward(plain.body)
    seen = {n: (-t, torch.ones_like(t, dtype=torch.bool)) for n, t in moved.items() if "word_embeddings" not in n}
    prior = bigrams([e.ids.tolist() for e in public], TOKENS)
    how = Inversion.variant(variant, **{"steps": steps, "seed": seed, **knobs})
    known = [int(e.labels) for e in real] if len(real) > 1 else None  # type: ignore[arg-type]
    found = how.recover_rows(plain.eval(), seen, length, len(real), known, prior)
    return against_guess(found, [e.ids.tolist() for e in real], [e.ids.tolist() for e in public])


def against_guess(found: Sequence[Sequence[int]], real: Sequence[Sequence[int]], public: Sequence[Sequence[int]]
                  ) -> Metrics:
    """`precision`, `recall`, `rouge_l` and the same of a guess from public text."""
    got, blind = compare(found, real), compare(guess(public, [len(r) for r in real]), real)
    return {"recall": got.recall, "precision": got.precision, "rouge_l": got.rouge_l, "guess_recall": blind.recall,
            "guess_precision": blind.precision, "guess_rouge_l": blind.rouge_l,
            "over_guess": got.recall - blind.recall}


def labelled(rng: np.random.Generator, count: int, length: int) -> list[Encoded]:
    """Rows of unequal words that follow one another in pairs, for the two classes of the small encoder."""
    out = zipf_rows(rng, count, length, TOKENS)
    for e in out:  # half of the words call for the next one: orders are not all alike
        for i in range(1, length):
            if rng.random() < 0.5:
                e.ids[i] = e.ids[i - 1] % (TOKENS - 1) + 1
    return [Encoded(e.ids, int(rng.integers(2)), 1) for e in out]


def film(attack: str, seed: int, *, rows: int = 8, length: int = 24, tied: bool = False, overfit: bool = False,
         space: str = "full", layers: Sequence[str] = (), clients: int = 1) -> Metrics:
    """FILM on client 0's batch: the bag by its errors, precision and recall, and the text where it is one row.

    With `overfit` the client trains on its row until it knows it; else it takes one step of SGD.
    """
    torch.set_num_threads(1)
    net, rng = small_gpt(seed, untied=not tied), numpy_stream(seed, "film")
    data = {f"client-{k}": zipf_rows(rng, rows, length) for k in range(clients)}
    local = LocalSpec(lr=3e-3, steps=120, batch_size=rows) if overfit else LocalSpec(
        optimizer="sgd", lr=1.0, steps=1, batch_size=rows)
    knobs = {"rank": 4, "targets": ("c_attn",)} if space == "lora" else {}
    model = Model(net, None, "generation", make_space(space, **knobs), seed=seed)
    world = World(model, Federation({c: Shard(r) for c, r in data.items()}, [], "generation"), local, seed,  # type: ignore[arg-type]
                  exact_match=False)
    view = one_round(world, bound_layers(layers, clients, rows, local, seed))
    moved, how = change(view, "client-0"), FILM()
    bag = how.bag(moved["transformer.wte.weight"], tied) if "transformer.wte.weight" in moved else []
    real = sorted({int(t) for e in data["client-0"] for t in e.ids[:-1]})  # the last token is a label, never an input
    out = against_guess([bag] if bag else [], [real], [sorted(set(e.ids.tolist())) for e in zipf_rows(
        numpy_stream(seed, "public"), 200, length)])
    out |= {"bag_errors": float(len(set(bag) ^ set(real))), "keys": float(len(moved))}
    if rows == 1 and bag:
        theta = add(model.initial(), moved)
        said = how.write(model, theta, None, bag, length)
        out["rouge_l"] = rouge_l(said, data["client-0"][0].ids.tolist())
    return out


def attribute(attack: str, seed: int, *, rows: int = 20, length: int = 8, layers: Sequence[str] = (), clients: int = 1,
              knobs: Mapping[str, Any] | None = None) -> Metrics:
    """20 records of eight tokens, one of which is one of two values: read off the change after an epoch of SGD.

    `over_majority` is the accuracy over that of always naming the commoner value, `over_l2` over that of matching by
    the squared distance.
    """
    torch.set_num_threads(1)
    rng, values, slot = numpy_stream(seed, "attribute"), (7, 8), length // 2
    data = {f"client-{k}": labelled(rng, rows, length) for k in range(clients)}
    for records in data.values():
        for e in records:
            e.ids[slot] = values[int(rng.random() < 0.45)]
    plain = tiny_encoder(seed)
    model = Model(copy.deepcopy(plain), None, "classification", make_space("full"), labels=("a", "b"), seed=seed)
    local = LocalSpec(optimizer="sgd", lr=1e-3, epochs=1, batch_size=5)
    world = World(model, Federation({c: Shard(r) for c, r in data.items()}, [], "classification", ("a", "b")),  # type: ignore[arg-type]
                  local, seed)
    view = one_round(world, bound_layers(layers, clients, rows, local, seed))
    moved, start = change(view, "client-0"), model.initial()
    with torch.no_grad():  # halfway: there the mean gradient is that of the epoch to the second order
        for name, p in plain.named_parameters():
            p.copy_(start[name] + moved[name] / 2)
    seen = {n: -t / (local.lr * local.count(rows)) for n, t in moved.items()}
    ids = torch.tensor(np.stack([e.ids for e in data["client-0"]])).long()
    real = ids[:, slot].tolist()
    labels = [int(e.labels) for e in data["client-0"]]  # type: ignore[arg-type]
    right = {}
    for loss in ("cos", "l2") if not layers else ("cos",):
        how = Attribute(**{"loss": loss, "seed": seed, **(knobs or {})})
        found = how.recover(plain.eval(), seen, ids, [slot] * rows, values, labels)
        right[loss] = float(np.mean([a == b for a, b in zip(found, real, strict=True)]))
    most = max(real.count(v) for v in values) / rows
    return {"accuracy": right["cos"], "majority": most, "over_majority": right["cos"] - most,
            **({"l2": right["l2"], "over_l2": right["cos"] - right["l2"]} if "l2" in right else {})}


RIGS = {"decepticons": decepticons, "reading": reading, "film": film, "attribute": attribute}
