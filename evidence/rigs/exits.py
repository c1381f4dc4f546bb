"""A rig for early exits: which of eight packages a docstring is of, by MiniLM's blocks, over six clients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from evidence.rigs.packages import SITES, documents
from fedllm.core.ask import Ask, on_client
from fedllm.core.client import SERVER
from fedllm.core.payload import pack, part, sub
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.inference.anytime_fl import AnytimeFL
from fedllm.methods.registry import make_method
from fedllm.models.exits import depth_of
from fedllm.models.load import load_model
from fedllm.spaces import make_space

CLIENTS = 6


@dataclass(frozen=True)
class Probe(AnytimeFL):
    """The same rounds and steps for a linear map of the last block's normalized states alone."""

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Any, client: Any) -> Any:
        theta, depth = part(msg, "theta"), depth_of(client.model)
        if f"states/{depth}" not in client.memory:
            client.memory[f"states/{depth}"] = self.seen(client, client.data, depth, theta["head"])
        x = F.layer_norm(client.memory[f"states/{depth}"][:, -1], theta["head"].shape[:1])
        y = torch.tensor([row["label"] for row in client.data])
        params = {n: theta[n].clone().requires_grad_() for n in ("head", "bias")}
        optimizer = client.training.optimizer_over(list(params.values()))
        for rows in client.batches(client.training.count(client.n)):
            optimizer.zero_grad()
            F.cross_entropy(x[rows] @ params["head"] + params["bias"], y[rows]).backward()
            optimizer.step()
        learned = {n: params[n].detach() if n in params else t for n, t in theta.items()}
        return pack(delta=sub(learned, theta), n=client.n, loss=0.0)


@functools.cache
def encoder() -> Any:
    """MiniLM with a head for eight packages, which nobody trains."""
    return load_model("minilm", "classification", make_space("head"), labels=tuple(SITES))


def exits(method: str, seed: int, *, per_client: int = 24, tests: int = 80, rounds: int = 5, lr: float = 0.01
          ) -> dict[str, float]:
    """Accuracy at `full` depth and of the `probe`; `early_accuracy` and `share_of_blocks` of answers that end where
    they are sure; `mixed`: the same after rounds with clients of 2, 4 and 6 blocks. With their differences, and the
    most that accuracy falls from one block to a later one (`falls`)."""
    rng = numpy_stream(seed, "exits")
    rows = [{"text": f"{d['query']} {d['text']}"[:300], "label": i} for i, site in enumerate(SITES)
            for d in (documents(site)[int(j)] for j in rng.permutation(len(documents(site)))[:30])]
    drawn = [rows[i] for i in rng.permutation(len(rows))]
    shards = {f"c{k}": Shard(drawn[k * per_client: (k + 1) * per_client]) for k in range(CLIENTS)}
    held = drawn[CLIENTS * per_client:][:tests]
    world = World(encoder(), Federation(shards, held, "classification", tuple(SITES)),
                  LocalSpec(optimizer="adamw", lr=lr, epochs=2, batch_size=8, max_length=64))
    memory: dict[str, Any] = {}
    deep = _after(make_method(method), world, rounds, memory)
    mixed = _after(make_method(method, depths=(2, 4, 6)), world, rounds, memory)
    probe = _after(Probe(), world, rounds, memory)["accuracy"]
    at = deep["at"]
    return {"full": deep["accuracy"], "probe": probe, "early_accuracy": deep["early_accuracy"],
            "share_of_blocks": deep["share_of_blocks"], "mixed": mixed["accuracy"],
            "falls": max(a - b for i, a in enumerate(at) for b in at[i:]), "first": at[0],
            "over_probe": deep["accuracy"] - probe, "early_over_full": deep["early_accuracy"] - deep["accuracy"],
            "mixed_over_deep": mixed["accuracy"] - deep["accuracy"]}


def _after(m: Any, world: World, rounds: int, memory: dict[str, Any]) -> Mapping[str, Any]:
    """The figures of the test after so many rounds; states that were worked out before are taken from `memory`."""
    engine = Vectorized((m,), world)
    engine.memory = copy.deepcopy(memory)
    state = m.init(world.model)
    for r in range(rounds):
        engine.begin(r)
        state = drive(m.round(state, world.infos()), engine)
        engine.commit()
    for client, kept in engine.memory.items():
        memory.setdefault(client, {}).update(kept)
        if (whole := memory[client].get(f"states/{depth_of(world.model)}")) is not None:
            memory[client] |= {f"states/{n}": whole[:, :n] for n in (2, 4)}  # of the same blocks

    def tested() -> Any:  # of the probe the adapter's output is still 0, so that its exits are its linear map
        out = yield Ask(m.curve, {SERVER: pack(theta=state["theta"], on="global")})
        return out[SERVER]

    return drive(tested(), engine)


RIGS = {"exits": exits}
