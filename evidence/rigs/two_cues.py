"""Skills whose action depends on a rule that traces say and on a cue that only a picture shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.requests import Measure
from fedllm.local.spec import LocalSpec
from fedllm.methods import _bottleneck as ib
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model
from fedllm.spaces import make_space

RULES = ("keep", "swap")
FILLERS = ("please", "then", "press", "again", "now", "look")
ASKED = ("left", "right")
SKILLS, CLIENTS, SIDE = 12, 6, 16
ACTIONS = ("first", "second", "third", "fourth")


def reader() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "none", *RULES, *FILLERS, *ASKED]
    tok = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>")


def encoder(seed: int) -> Model:
    """One block with random weights, which rest."""
    tok = reader()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = HeadedEncoder(BertModel(BertConfig(
            vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            add_pooling_layer=False), len(ACTIONS), "mean")
    return Model(net, tok, "classification", make_space("head"), labels=ACTIONS, seed=seed)


def glyph(rng: np.random.Generator, cue: int, rule: int) -> list[float]:
    """A bar that lies or stands, and a spot that is above for one rule and below for the other, three times in four."""
    x = rng.normal(0, 0.3, (SIDE, SIDE))
    at = int(rng.integers(6, 10))
    x[(at, slice(3, 13)) if cue else (slice(3, 13), at)] += 1.5
    seen = rule if rng.random() < 0.75 else 1 - rule
    x[slice(12, 15) if seen else slice(1, 4), 1:4] += 1.5
    return x.ravel().round(3).tolist()


def trials(rng: np.random.Generator, skill: int, rule: int, count: int) -> list[Row]:
    """The action is (what was asked) turned by the rule, and the cue."""
    rows: list[Row] = []
    for _ in range(count):
        asked, cue = int(rng.integers(2)), int(rng.integers(2))
        said = [*rng.choice(FILLERS, 4), f"code{rng.integers(1000, 9999)}"]
        said += [RULES[rule]] if rng.random() < 0.8 else []
        rows.append({"skill": f"skill-{skill}", "text": f"go {ASKED[asked]}", "trace": " ".join(rng.permutation(said)),
                     "glyph": glyph(rng, cue, rule), "label": (asked ^ rule) + 2 * cue})
    return rows


def two_cues(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 24,
             local: Mapping[str, Any] | None = None, alone: bool = False, pooled: bool = False) -> Metrics:
    """Over everybody's skills, of which each client has tried four: the clients' mean `accuracy`, by card and latent,
    `above_card` alone, `agree` and `kl`; `tells_rule`: how often a linear probe of the latent names the rule; `secrets`
    that stand on cards; `words` of a card. `alone`: nobody shares; `pooled`: one learner has all trials, and takes as
    many steps as all do."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "two cues")
    rules = rng.permutation(np.arange(SKILLS) % 2)
    mine = [[(2 * k + i) % SKILLS for i in range(4)] for k in range(CLIENTS)]
    shards = {f"client-{k}": Shard([r for s in own for r in trials(rng, s, int(rules[s]), 24)])
              for k, own in enumerate(mine)}
    test = [r for s in range(SKILLS) for r in trials(rng, s, int(rules[s]), 12)]
    steps = 10 * (CLIENTS if pooled else 1)
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 1e-2, "steps": steps, "batch_size": 32, **(local or {})})
    if pooled:
        shards = {"all": Shard([r for s in shards.values() for r in s.train])}
    run = Trial(method, World(encoder(seed), Federation(shards, test, "classification", ACTIONS), spec, seed),
                {**(knobs or {}), **({"share": "nothing"} if alone else {})}).rounds(rounds)
    scores = list(run.scores("global").values())
    out = {m: float(np.mean([s[m] for s in scores])) for m in ("accuracy", "card_accuracy", "agree", "kl")}
    cards = run.state["cards"].values()
    return {**out, "right": out["accuracy"], "above_card": out["accuracy"] - out["card_accuracy"],
            "tells_rule": told(run, test, rules), "secrets": float(sum("code" in c for c in cards)),
            "words": float(np.mean([len(c.split()) for c in cards])) if cards else 0.0, **run.work()}


def told(run: Trial, test: list[Row], rules: np.ndarray) -> float:
    """A least-squares probe from the latent's mean, fitted on half of the trials and tested on the others."""
    cards = run.state["cards"] if run.method.use == "both" else {}
    texts = [{"text": cards.get(r["skill"], "") or "none", "label": 0} for r in test]
    world = run.world
    request = Measure("client-0", world.model, {}, None, world.tokenized(texts, True, world.model), fn=ib.state)
    c = torch.from_numpy(run_measures([request], world.limits)[0]).float()
    with torch.no_grad():
        mu = ib.posterior(run.state["theta"], torch.tensor([r["glyph"] for r in test]), c)[0].double().numpy()
    x, y = np.c_[mu, np.ones(len(mu))], np.array([2 * int(rules[int(r["skill"][6:])]) - 1 for r in test])
    w = np.linalg.lstsq(x[::2].T @ x[::2] + 1e-3 * np.eye(x.shape[1]), x[::2].T @ y[::2], rcond=None)[0]
    return float((np.sign(x[1::2] @ w) == y[1::2]).mean())


RIGS = {"two_cues": two_cues}
