"""Small experiments on models that are cut: part at the clients, part at the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.topology import gap
from evidence.rigs.trials import Metrics, Trial, _chain, _tiny_llama
from fedllm.core.layer import Layer
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import method_class
from fedllm.models.model import Model
from fedllm.spaces import make_space

EVERY = 64
"""Rows of a client: a batch of so many is all of them."""


class Listening(Layer):
    """A server that keeps the states which clients send, and what tokens they stand for."""

    def __init__(self) -> None:
        self.heard: list[tuple[torch.Tensor, torch.Tensor]] = []

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        reply = call(msg)
        if "e" in reply:
            self.heard.append((reply["e"], client.session["batch"].ids))
        return reply


def split_lm(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
             steps: int = 10, local: Mapping[str, Any] | None = None) -> Metrics:
    """A 2-layer Llama from scratch on sequences of a Markov chain, four clients, whole models, plain SGD.

    `loss` is that on the global test. Of a model that is cut also: `off_unsplit`, by how much 3 rounds of one step on
    all rows differ from FedAvg's, and `recovered`, the share of tokens that are the row of the embedding nearest to
    what a client sends.
    """
    torch.set_num_threads(1)
    cut = "cut" in method_class(method).knobs()

    def trial(name: str, steps: int, batch: int, **more: Any) -> Trial:
        model = Model(_tiny_llama(32, seed), None, "generation", make_space("full"), seed=seed)
        spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.1, "steps": steps, "batch_size": batch, **(local or {})})
        own = {"steps": steps, **(knobs or {})} if name == method and cut else {}
        return Trial(name, World(model, _chain(seed), spec, seed, exact_match=False), own, **more)

    run = trial(method, steps, 8).rounds(rounds)
    found = {"loss": float(np.mean([s["loss"] for s in run.scores("global").values()])), **run.work()}
    if cut:
        ear = Listening()
        mine = trial(method, 1, EVERY, layers=(ear,)).rounds(3)
        theirs = trial("fedavg", 1, EVERY).rounds(3)
        found["off_unsplit"] = gap(mine.method.served(mine.state)[0], theirs.state["theta"])
        words = mine.world.model.words
        hits = [(torch.cdist(e.flatten(0, 1), words).argmin(1) == ids.flatten()).double().mean() for e, ids in
                ear.heard[:4]]
        found["recovered"] = float(torch.stack(hits).mean())
    return found


RIGS: dict[str, Callable[..., Metrics]] = {"split_lm": split_lm}
