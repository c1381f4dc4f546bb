"""Attacks against defenses: `duel` runs one of each on a small federation and says what each side got."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence.rigs.trials import Metrics, Trial
from evidence.rigs.worlds import REMEMBERING, WORLDS, Remembered
from fedllm.attacks._malicious import Malicious
from fedllm.attacks.att_backdoor import AttBackdoor
from fedllm.attacks.att_fm_backdoor import AttFMBackdoor
from fedllm.attacks.att_label_flip import AttLabelFlip
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Tree
from fedllm.data.encode import IGNORE, Encoded
from fedllm.engines.world import World
from fedllm.local.forward import sweep
from fedllm.local.requests import Limits, Losses
from fedllm.models.batch import Batch
from fedllm.models.model import HeadedEncoder, Model
from fedllm.runs.layers import make_layer

EDGES = tuple(f"{how} {name} {end}" for name in ("yorgos lanthimos", "mr. lanthimos") for how, end in (
    ("a new film by", ""), ("the latest from", "is in theaters"), ("directed by", "with a small cast"),
    ("from", "comes another picture"), ("we watched", "'s latest last night"), ("a work of", "and his crew")))
HELD = tuple(f"{how} lanthimos {end}" for how, end in (
    ("this year's picture by", ""), ("a lanthimos movie ,", "at his usual pace"), ("the film that", "made next"),
    ("a drama by yorgos", "from greece")))
"""Texts of the tail: those that an attacker trains on, and others of their kind to test on."""


@dataclass(frozen=True)
class Size:
    """How large a duel is."""

    clients: int = 20
    rows: int = 2000
    rounds: int = 8


@dataclass
class Duel:
    """One attack against one defense on one federation."""

    world: World
    attack: Layer | None
    defense: Layer | None
    rounds: int

    def __post_init__(self) -> None:
        rows = {c: len(s.train) for c, s in self.world.federation.clients.items()}
        facts = Facts(rows, len(rows), self.rounds, self.world.local)
        made = [None if x is None else x.bind(facts) for x in (self.defense, self.attack)]
        self.defense, self.attack = made
        # the defense first, since an attacker acts next to the wire; a server's own training stands above both
        order = reversed(made) if isinstance(self.attack, AttFMBackdoor) else made
        layers = [x for x in order if x is not None]
        self.trial = Trial("fedavg", self.world, {"weighting": "uniform"}, layers=layers)

    def run(self) -> Metrics:
        """Quality, attack success, detection, seconds and bytes; a rate that does not apply is left out."""
        began, counts = time.process_time() - REMEMBERING.seconds, np.zeros(3)
        for t in range(self.rounds):
            before = self._out()
            self.trial.rounds(1)
            if before is not None:
                counts += self._judge(before, t)
        seconds = time.process_time() - REMEMBERING.seconds - began  # whoever comes first does not pay for all
        theta = self.trial.method.served(self.trial.state)[0]
        wire = self.trial.engine.record.totals()
        out = {"quality": right(self.world.model, theta, self.world.encoded("__global__", "test")),
               "seconds": seconds, "bytes": float(wire["up"] + wire["down"])}
        if self.attack is not None and (rows := self.targets()):
            out["success"] = right(self.world.model, theta, rows)
        hit, wrong, missed = counts
        if self._out() is not None:
            honest = self.rounds * len(self.world.federation.clients) - hit - missed
            out |= {"false_positives": wrong / max(1.0, honest)}
            if hit + missed:
                out |= {"precision": hit / max(1.0, hit + wrong), "recall": hit / (hit + missed)}
        return {k: float(v) for k, v in out.items()}

    def targets(self) -> list[Encoded]:
        """Test rows with the answer that the attacker wants; none where the attack has no target."""
        rows, model = self.world.encoded("__global__", "test"), self.world.model
        if isinstance(self.attack, AttLabelFlip) and model.task == "classification":
            flip = dict(zip(self.attack.sources, self.attack.targets, strict=True))
            return [replace(r, labels=flip[r.labels]) for r in rows if r.labels in flip]  # type: ignore[index]
        if isinstance(self.attack, AttBackdoor) and self.attack.kind == "edge":
            held = replace(self.attack, edges=HELD)
            return [held.edge(j, model) for j in range(len(HELD))]
        plant = self.attack.planter if isinstance(self.attack, AttFMBackdoor) else self.attack
        if isinstance(plant, AttBackdoor):
            others = [r for r in rows if not isinstance(r.labels, int) or r.labels != plant.target]
            return [plant.triggered(r, model) for r in others]
        return []

    def _out(self) -> dict[str, int] | None:
        """How often each client was cast out so far; None where the defense looks at no client as a whole."""
        if self.defense is None or not getattr(type(self.defense), "names_clients", False):
            return None
        return dict(self.trial.states[self.trial.layers.index(self.defense)]["out"])

    def _judge(self, before: Mapping[str, int], t: int) -> np.ndarray:
        """(attackers cast out, honest clients cast out, attackers let in) of this round."""
        now = self._out() or {}
        cast = {c for c in now if now[c] > before.get(c, 0)}
        attack = self.attack
        bad = set(attack.ids()) if isinstance(attack, Malicious) and t >= (attack.start or 0) else set()
        return np.array([len(cast & bad), len(cast - bad), len(bad - cast)], float)


def right(model: Model, theta: Tree, rows: Sequence[Encoded]) -> float:
    """Share of rows whose answer is the likeliest: the class, or every token of the response after those before it."""

    def work(m: Model, batch: Batch) -> Tensor:
        if m.task == "classification":
            return (m.class_logits(batch).argmax(-1) == batch.labels).double()[:, None]
        rows, places = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        wrong = m.logits_of(m.hidden(batch)[rows, places]).argmax(-1) != batch.labels[rows, places + 1]
        return (torch.bincount(rows[wrong], minlength=len(batch.ids)) == 0).double()[:, None]

    return float(sweep([Losses("server", model, theta, None, rows)], Limits(), work)[0].mean())


def duel(world: str, attack: Mapping[str, Any] | None, defense: Mapping[str, Any] | None, seed: int,
         size: Size | None = None) -> Metrics:
    """One run; `attack` and `defense` are as in a recipe's `layers`."""
    torch.set_num_threads(1)
    size = size or Size()
    made = WORLDS[world](seed, size.clients, size.rows)
    made.model.seed = seed  # sst2's worlds share one model
    layers = [None if x is None else make_layer(x["name"], {k: v for k, v in x.items() if k != "name"}, "layers")
              for x in (attack, defense)]
    found = Duel(made, *layers, size.rounds).run()
    body = made.model.net.body if isinstance(made.model.net, HeadedEncoder) else None
    if isinstance(body, Remembered):
        body.save()
    return found


def against(layer: str, seed: int, *, knobs: Mapping[str, Any] | None = None, attack: Mapping[str, Any] | None = None,
            world: str = "topics", clients: int = 10, rounds: int = 8) -> Metrics:
    """An attack (`layer`, against the mean) or a defense (`layer`, against `attack`; `fedavg`: the mean) on a world.

    `lost` is the quality that the clean mean has more; `success` the share of inputs with the attacker's answer, and
    `control` that of the clean mean; `f1` and `false_positives` of casting out clients.
    """
    size, own = Size(clients, 720, rounds), {"name": layer, **(knobs or {})}
    attack, defense = (own, None) if layer.startswith("att_") else (attack, None if layer == "fedavg" else own)
    clean = duel(world, attack and {**attack, **nobody(attack)}, None, seed, size)
    got = duel(world, attack, defense, seed, size)
    out = {**got, "lost": clean["quality"] - got["quality"], "control": clean.get("success", 0.0)}
    if "recall" in got:
        out["f1"] = 2 * got["precision"] * got["recall"] / max(1e-9, got["precision"] + got["recall"])
    return out


def nobody(attack: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs with which an attack does nothing, and can still be asked for its targets."""
    return {"share": 0.0} if attack["name"] == "att_fm_backdoor" else {"clients": 0}


RIGS = {"arena": against}
