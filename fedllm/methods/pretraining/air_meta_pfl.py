"""Over-the-air meta-learning: a start that newcomers adapt in a few steps, from updates that the air adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, norm, pack, part, scale, sub
from fedllm.core.reduce import Sum
from fedllm.core.rng import torch_stream
from fedllm.methods._plain_sgd import need_sgd


class OnAir(Sum):
    """What a receiver hears: the sum of all that is sent at once, and never one sender's part."""

    ragged: ClassVar[bool] = False

    def lift(self, reply: Payload) -> Payload:
        return reply

    def done(self, total: Payload) -> Payload:
        return total


@dataclass(frozen=True)
class AirMetaPFL(Star):
    """phi = theta - alpha grad L(theta; S); g = grad L(phi; Q); the k largest of memory + g go on air, the rest stays.

    theta <- theta - eta (sum_k s_k + z) / active. First order: the Hessian of the inner steps is left out.
    """

    card = Card(
        title="Over-the-air federated meta-learning with personalized fine-tuning",
        paper="Wen, Xing and Simeone, Pre-Training and Personalized Fine-Tuning via Over-the-Air Federated "
              "Meta-Learning, 2024, arXiv 2406.11569",
        topic="pre-training",
        sends="down: the trainables; up: the largest `keep` of the meta-gradient's entries, all clients at once; in a "
              "simulation as a tensor of the trainables' size with zeros, added up before anybody reads it",
        needs="any model and space; plain SGD at clients (local.lr is alpha, local.steps the inner steps); clients "
              "with two rows or more, that remember",
        claim=Claim("after five steps on their own rows newcomers' loss is below that from FedAvg's model, which took "
                    "as many rounds and steps", rig="newcomers", metric="adapted_loss", baseline="fedavg",
                    relative="difference", holds="<", threshold=0.0, grid={"local.lr": (0.03, 0.1, 0.3)},
                    unequal="a meta-gradient over the query rows is taken beside the inner steps"),
        evidence="From the abstract and a dossier; the scaling is reconstructed: channels are inverted, a sender in a "
                 "fade below `gain_threshold` is silent, and the noise is set against the summed signal.",
    )
    trial = Trial({"outer_lr": 0.5}, local={"steps": 2}, far={"local.optimizer": "sgd"})
    only_fits = False
    outer_lr: float = knob(1.0, "eta of the server", gt=0)
    query: float = knob(0.5, "share of a client's rows that its meta-gradient is taken on", gt=0, lt=1)
    keep: float = knob(0.1, "share of the entries that is sent; the rest waits in the client's memory", gt=0, le=1)
    snr_db: float | None = knob(None, "of the summed signal, in dB; None: no noise", ge=-10, le=60)
    fading: Literal["none", "rayleigh"] = knob("none", "gains of the channels", options=("none", "rayleigh"))
    gain_threshold: float = knob(0.1, "gain below which a client does not send in a round", ge=0)
    power: float | None = knob(None, "largest norm that a client transmits; None: unbounded", gt=0)
    adapt_steps: int = knob(5, "steps that a client takes on its own rows before it is tested", ge=0)
    seed: int = knob(0, "of the receiver's noise", ge=0)

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "round": 0}

    def check_work(self, local, rounds) -> None:
        need_sgd(local, "air_meta_pfl", "its gradient is one after such steps")

    def check_rows(self, labels, rows) -> None:
        if few := [c for c, mine in rows.items() if len(mine) < 2]:
            raise DataError(f"air_meta_pfl steps on some rows and takes a gradient on others; client '{few[0]}' has "
                            f"{len(rows[few[0]])}; leave it out, or give it two rows or more")

    @on_client(reduce=OnAir(), gives="signal: tree, active: count, loss?: number")
    def local(self, msg, client):
        self.check_work(client.training, 0)
        if client.n < 2:
            raise CompositionError(f"air_meta_pfl steps on some rows and takes a gradient on others; client "
                                   f"'{client.id}' has {client.n}; leave it out, or give it two rows or more")
        theta, rng = part(msg, "theta"), client.rng("air_meta_pfl")
        order = rng.permutation(client.n)
        cut = min(client.n - 1, max(1, round(self.query * client.n)))
        rows = client.tokens
        phi = client.fit(theta, on=[rows[i] for i in order[cut:]], steps=client.training.count(client.n))
        g = client.gradient(phi.theta, [int(i) for i in order[:cut]])
        gain = 1.0 if self.fading == "none" else float(abs(rng.normal() + 1j * rng.normal()) / 2**0.5)
        u = add(client.memory["rest"], g) if "rest" in client.memory else g
        s, active = self.largest(u), float(gain >= self.gain_threshold or self.fading == "none")
        # the channel is inverted: what is transmitted is s / h, and at most `power` long
        fits = 1.0 if self.power is None or not norm(s) else min(1.0, gain * self.power / norm(s))
        s = scale(s, fits * active)
        client.memory["rest"] = sub(u, s)
        return pack(signal=s, active=active, loss=phi.loss)

    def largest(self, u: Tree) -> Tree:
        """u with all but its k largest entries (of all trainables together) at 0."""
        flat = torch.cat([t.flatten() for t in u.values()])
        k = max(1, round(self.keep * len(flat)))
        kept = torch.zeros_like(flat).index_fill(0, flat.abs().topk(k).indices, 1.0) * flat
        return {n: x.view_as(t) for (n, t), x in zip(u.items(), kept.split([t.numel() for t in u.values()]),
                                                     strict=True)}

    def merge(self, state: State, out: Any) -> State:
        y, active = part(out.value, "signal"), out.value["active"]
        new = {**state, "round": state["round"] + 1}
        if not active:  # all in a fade: nothing was heard
            return new
        if self.snr_db is not None:
            rng, size = torch_stream("air", self.seed, state["round"]), sum(t.numel() for t in y.values())
            sigma = norm(y) / size**0.5 * 10 ** (-self.snr_db / 20)
            y = add(y, {n: torch.randn(t.shape, generator=rng, dtype=torch.float64) for n, t in y.items()}, sigma)
        return {**new, "theta": add(state["theta"], y, -self.outer_lr / active)}

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        msg = pack(theta=state["theta"], on=on)
        return (yield Ask(self.score, {c.id: msg for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        theta = part(msg, "theta")
        if self.adapt_steps and client.n:  # the server has no rows of its own to adapt to
            theta = client.fit(theta, steps=self.adapt_steps).theta
        return client.score(theta, on=msg["on"])
