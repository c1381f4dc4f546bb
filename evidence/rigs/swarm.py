"""Members without a server, some of whom die while they merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from evidence.rigs.topology import gap, topic_trial
from evidence.rigs.trials import Metrics
from fedllm.core.errors import Withheld
from fedllm.core.layer import Layer


class Dying(Layer):
    """Whoever is asked first to merge, in every second round, dies while it does."""

    def __init__(self) -> None:
        self.dead: dict[int, str] = {}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if fn.__name__ in ("merge", "publish") and client.round % 2 and self.dead.setdefault(
                client.round, client.id) == client.id:
            raise Withheld("killed by the rig")
        return call(msg)


def swarm(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 4) -> Metrics:
    """Eight members with label skew. `off_fedavg`: the largest relative difference of the first member's weights from
    FedAvg's; `dying_ratio`: the mean loss on the IID test where mergers die, over that where none does."""
    torch.set_num_threads(1)
    plain, avg = topic_trial(method, seed, knobs=knobs).rounds(rounds), topic_trial("fedavg", seed).rounds(rounds)
    ill = topic_trial(method, seed, knobs=knobs, layers=(Dying(),)).rounds(rounds)
    assert ill.state["round"] == rounds

    def loss(run: Any) -> float:
        each = [s["loss"] for s in run.scores("global").values()]
        return sum(each) / len(each)

    theta = next(iter(plain.engine.memory.values()))["theta"]
    return {"off_fedavg": gap(theta, avg.state["theta"]), "dying_ratio": loss(ill) / loss(plain)}


RIGS: dict[str, Callable[..., Metrics]] = {"swarm": swarm}
