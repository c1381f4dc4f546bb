"""Rigs of what a finished model gives away, and of paraphrases: `RIGS[name](audit, seed, **options)` gives metrics."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evidence.rigs.audit import bound_layers
from evidence.rigs.trials import Metrics, Trial
from fedllm.audits import membership as scores
from fedllm.audits.epsilon import one_run
from fedllm.core.layer import Layer
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.canaries import exposures
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.models.similar import minilm, near_copies
from fedllm.spaces import make_space

SYMBOLS, STEPS = 64, 24


def walks(rng: np.random.Generator, after: np.ndarray, count: int) -> list[Encoded]:
    """Sequences of 24 symbols in which each has four successors, the likelier ones first."""
    out = []
    for _ in range(count):
        ids = [int(rng.integers(SYMBOLS))]
        while len(ids) < STEPS:
            ids.append(int(after[ids[-1], min(3, rng.geometric(0.4) - 1)]))
        labels = np.array(ids)
        labels[0] = -100
        out.append(Encoded(np.array(ids, np.int32), labels, STEPS - 1))
    return out


def small_model(seed: int) -> Model:
    """Two blocks of width 48, every weight trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = GPT2LMHeadModel(GPT2Config(
            vocab_size=SYMBOLS, n_positions=32, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    return Model(net, None, "generation", make_space("full"), seed=seed)


CLIENTS, EPOCHS_A_ROUND = 4, 5


def trained(seed: int, model: Model, rows: list[Encoded], epochs: int, epsilon: float | None, draw: int) -> Tree:
    """FedAvg's model after so many epochs at four clients; at an epsilon of each row's where one is given."""
    shards = {f"client-{k}": Shard(rows[k::CLIENTS]) for k in range(CLIENTS)}  # type: ignore[arg-type]
    rounds = max(1, epochs // EPOCHS_A_ROUND)
    spec = LocalSpec(lr=3e-3, epochs=EPOCHS_A_ROUND, batch_size=10)
    fed = Federation(shards, [], "generation")
    made: list[Layer] = []
    if epsilon is not None:
        made = bound_layers(("dp_sgd",), CLIENTS, min(len(s.train) for s in shards.values()), spec, seed, rounds,
                            {"epsilon": epsilon, "delta": 1e-5, "clip_norm": 1.0})
    world = World(model, fed, spec, seed + draw, exact_match=False)
    run = Trial("fedavg", world, {}, layers=made).rounds(rounds)
    return run.method.served(run.state)[0]


def membership(audit: str, seed: int, *, epochs: int = 60, epsilon: float | None = None, rows: int = 400,
               shadows: int = 0) -> Metrics:
    """400 rows of one chain, of which coins put half into training: who tells which, and what epsilon that refutes.

    `auc` of the better of loss and min-k %, `exposure_gain` in bits of a row trained on over one that was not,
    `lira_auc` and `lira_gain` over the loss where there are shadows (each trained on a random half of the rows).
    """
    torch.set_num_threads(1)
    rng, model = numpy_stream(seed, "membership"), small_model(seed)
    after = rng.integers(0, SYMBOLS, (SYMBOLS, 4))
    all_, fresh = walks(rng, after, rows), walks(rng, after, 1000)
    inside = rng.random(rows) < 0.5
    theta = trained(seed, model, [r for r, c in zip(all_, inside, strict=True) if c], epochs, epsilon, 0)
    got, before = (scores.row_scores(model, t, None, all_, Limits()) for t in (theta, model.initial()))
    auc = {n: scores.auc(v[inside], v[~inside]) for n, v in got.items()}
    start = scores.auc(before["loss"][inside], before["loss"][~inside])
    exposed = exposures(-got["loss"], -scores.row_scores(model, theta, None, fresh, Limits())["loss"])
    low = one_run(got["loss"] - before["loss"], inside, 1e-5 if epsilon else 0.0)
    out = {"auc": max(auc["loss"], auc["min_k"]), "loss_auc": auc["loss"], "min_k_auc": auc["min_k"],
           "min_k_pp_auc": auc["min_k_pp"], "auc_before": start, "off_chance_before": abs(start - 0.5),
           "off_chance": abs(auc["loss"] - 0.5), "exposure": float(exposed[inside].mean()),
           "exposure_gain": float(exposed[inside].mean() - exposed[~inside].mean()), "epsilon_low": low["epsilon"],
           "right": low["right"] / max(1, low["guesses"]), "loss": float(-got["loss"][inside].mean()),
           "held_out_loss": float(-got["loss"][~inside].mean())}
    if shadows:
        out |= _shadowed(seed, model, all_, got["phi"], inside, epochs, epsilon, shadows)
        out["lira_gain"] = out["lira_auc"] - out["loss_auc"]
    return out


def _shadowed(seed: int, model: Model, rows: list[Encoded], target: np.ndarray, inside: np.ndarray, epochs: int,
              epsilon: float | None, shadows: int) -> Metrics:
    coins = numpy_stream(seed, "shadows").random((shadows, len(rows))) < 0.5
    phi = []
    for s, coin in enumerate(coins):
        theta = trained(seed, model, [r for r, c in zip(rows, coin, strict=True) if c], epochs, epsilon, s + 1)
        phi.append(scores.row_scores(model, theta, None, rows, Limits())["phi"])
    score = scores.lira(target, np.array(phi), coins)
    good = np.isfinite(score)  # a row that every shadow has, or none, says nothing
    return {"lira_auc": scores.auc(score[good & inside], score[good & ~inside]), "dropped": float((~good).sum())}


PAIRS = (
    ("The patient was admitted with severe chest pain last night.",
     "Yesterday evening somebody came to the hospital because their chest hurt badly."),
    ("Please transfer the remaining balance to my savings account.",
     "I would like what is left over to be moved into my savings."),
    ("The court dismissed the appeal because it was filed too late.",
     "Since the deadline had passed, the judges rejected the appeal."),
    ("Our shop is closed on Sundays and public holidays.",
     "On holidays and each Sunday we do not open the store."),
    ("The engine makes a loud noise when the car goes uphill.",
     "While climbing a slope, the vehicle's motor gets very noisy."),
    ("She has been allergic to peanuts since her childhood.",
     "Ever since she was a little girl, eating peanuts causes her an allergic reaction."),
    ("Heavy rain flooded the streets near the old harbor.",
     "The roads by the ancient port were under water after the downpour."),
    ("The meeting was moved from Monday to Thursday afternoon.",
     "Instead of on Monday, we will now meet on Thursday after lunch."))


def paraphrases(audit: str, seed: int) -> Metrics:
    """Eight private sentences, a paraphrase of each and eight other sentences: what embeddings and 5-grams find.

    `found` and `ngrams` are shares of paraphrases, `false` the share of the other sentences that embeddings flag.
    """
    private = [a for a, _ in PAIRS]
    others = ["The museum shows paintings of the last century.", "Bake the bread for forty minutes.",
              "Our team won the second match by three goals.", "The new bridge will open in spring.",
              "He plays the violin in a small orchestra.", "Water the plants twice a week in summer.",
              "The train to the airport leaves every hour.", "This novel tells the story of two sisters."]
    hits = near_copies([b for _, b in PAIRS], private, minilm, PARAPHRASE)
    good = sum(j == i for i, (j, _) in hits.items())
    share = np.mean([bool(_grams(a) & _grams(b)) for a, b in PAIRS])
    false = len(near_copies(others, private, minilm, PARAPHRASE)) / len(others)
    return {"found": good / len(PAIRS), "ngrams": float(share), "false": false,
            "gain": good / len(PAIRS) - float(share) - false}


PARAPHRASE = 0.5
"""Cosine from which MiniLM takes two sentences to say much the same."""


def _grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.lower().strip(".").split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


RIGS = {"membership": membership, "paraphrases": paraphrases}
