"""CreamFL: clients of pictures, of texts and of both teach one model by features of public pairs; no weights cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER, Client
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.local.objectives.contrast import OTHER, Contrast, features
from fedllm.local.objectives.paired import Paired
from fedllm.methods._modalities import has, kind_of, need_pairs, of_kind
from fedllm.models.pairs import MODALITIES


@dataclass(frozen=True)
class CreamFL(Method):
    """Down G_m, up z_im of the same public rows; the server's model is drawn to sum_i w_in z_in, with w_in the
    softmax over clients of how well z_in finds its own row among the other modality's."""

    card = Card(
        title="CreamFL: contrastive representation ensemble",
        paper="Yu et al., Multimodal Federated Learning via Contrastive Representation Ensemble, ICLR 2023, "
              "arXiv 2302.08888",
        topic="multimodality",
        sends="down: both modalities' features of the public pairs; up: a client's own of the modalities that it has; "
              "no weights, whatever a model's size",
        needs="data.task: pairs, model.name: pairs, space full; public pairs at the clients and at the server",
        claim=Claim("two clients of each kind: the server's model finds a picture's caption (recall at 1) more often "
                    "than one trained on the public pairs alone for as many steps", rig="glyphs", metric="r1",
                    baseline="creamfl", relative="difference", holds=">", threshold=0.0,
                    against={"knobs": {"kd": 0.0}}),
        also={"weights": Claim("and more often than under the plain mean of the same features", rig="glyphs",
                               metric="r1", baseline="creamfl", relative="difference", holds=">", threshold=0.0,
                               against={"knobs": {"weights": "uniform"}}),
              "depth": Claim("a client of six blocks sends as many bytes as one of a single block",
                             rig="glyphs_bytes", metric="deep_over_shallow", holds="<=", threshold=1.0, kind="exact")},
        evidence="Authors' code read by the dossier; there features are not normalized, here they are, so that the "
                 "temperature means the same everywhere. Retrieved is right what says the same words. Clients hold the "
                 "server's design with weights of their own.",
    )
    trial = Trial({"server_steps": 2, "contrast_steps": 1}, {"name": "full"}, task="pairs")
    metrics: ClassVar = {"r1": "max"}
    only_fits = False

    server_steps: int = knob(10, "steps of the server on public pairs, in each round", ge=1)
    contrast_steps: int = knob(5, "steps of a client on public rows, after those on its own", ge=1)
    kd: float = knob(0.3, "weight of the distance to what clients say", ge=0)
    interintra: float = knob(0.5, "weight of both contrasts", ge=0)
    temperature: float = knob(0.5, "of the contrasts and of the weights", gt=0)
    weights: Literal["contrastive", "uniform"] = knob("contrastive", "whose features count: by how well they match, or "
                                                      "all alike", options=("contrastive", "uniform"))

    def check(self, model: Any) -> None:
        need_pairs(model, "creamfl")

    def public_at(self):
        return ("clients", "server")

    def round(self, state: State, clients: Any) -> Program:
        [seen] = (yield Ask(self.show, {SERVER: pack(theta=state["theta"])}, quorum=1)).values()
        out = yield Ask(self.local, {c.id: dict(seen) for c in clients})
        said = {m: ensemble([out[c][m] for c in out if m in out[c]], seen[OTHER[m]], self.temperature,
                            self.weights == "uniform") for m in MODALITIES}
        told = pack(theta=state["theta"], **{m: z for m, z in said.items() if z is not None})
        [next_] = (yield Ask(self.teach, {SERVER: told}, quorum=1)).values()
        return {"theta": part(next_, "theta")}

    @on_server
    def show(self, msg: Payload, client: Client) -> Payload:
        return looked(client, part(msg, "theta"), MODALITIES)

    def of_the_public(self, msg: Payload, reply: Payload) -> None:
        for m in set(MODALITIES) & set(reply):
            need(reply[m].shape == msg[m].shape, f"'{m}' has the shape {tuple(reply[m].shape)}, allowed is "
                 f"{tuple(msg[m].shape)}")

    @on_client(gives="image?: tensor, text?: tensor, n: rows, loss?: number", fits=of_the_public)
    def local(self, msg: Payload, client: Client) -> Payload:
        mine = has(kind := kind_of(client))
        before = client.memory.get("theta") or of_kind(client.model.initial(), kind)
        rows, old = client.public, looked(client, before, mine)
        fitted = client.fit(before)
        goal = Contrast(mine, self.temperature, self.interintra, {m: msg[m] for m in MODALITIES})
        side = {**{m: list(msg[m]) for m in MODALITIES}, "place": list(range(len(rows))),
                **{f"old_{m}": list(old.get(m, msg[m])) for m in MODALITIES}}
        theta = client.fit(fitted.theta, on=rows, steps=self.contrast_steps, objective=goal, side=side).theta
        client.memory["theta"] = theta
        return {**looked(client, theta, mine), "n": client.n, "loss": fitted.loss}

    @on_server
    def teach(self, msg: Payload, client: Client) -> Payload:
        rows = client.public
        known = all(m in msg for m in MODALITIES)
        side = {m: list(msg[m]) if known else [torch.zeros(1)] * len(rows) for m in MODALITIES}
        goal = Paired(kd=self.kd if known else 0.0)
        return pack(theta=client.fit(part(msg, "theta"), on=rows, steps=self.server_steps, objective=goal,
                                     side={**side, "known": [float(known)] * len(rows)}).theta)

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        """Each client by its own model; the server by its."""
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"] if c.id == SERVER else None, on=on)
                                       for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        theta = part(msg, "theta") or client.memory.get("theta") or client.model.initial()
        got = client.score(theta, on=msg["on"])
        return {**got, **recall(client, theta, msg["on"])} if client.id == SERVER and got["n"] else got


def recall(client: Client, theta: Tree, on: str) -> dict[str, float]:
    """How often the nearest caption of a picture says what the picture's own does; nothing where rows lack either."""
    rows = client.encode(client.held_out(on))
    if not {"pixels", "words"} <= rows[0].parts.keys():
        return {}
    i, t = np.split(client.measure(theta, rows, features), 2, axis=1)
    found = (i @ t.T).argmax(1)
    return {"r1": float(np.mean([np.array_equal(rows[a].parts["words"], rows[b].parts["words"])
                                 for a, b in enumerate(found)]))}


def looked(client: Client, theta: Tree, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Features [N, d] of the public pairs, in their order."""
    i, t = np.split(client.measure(theta, client.public, features), 2, axis=1)
    both: Mapping[str, np.ndarray] = {"image": i, "text": t}
    return {m: torch.from_numpy(both[m].copy()) for m in modalities}


def ensemble(said: Sequence[Tensor], other: Tensor, temperature: float, uniform: bool) -> Tensor | None:
    """sum_i w_in z_in [N, d], with w_n the softmax over clients of log softmax_j(z_in . G_j / tau) at j = n."""
    if not said:
        return None
    if uniform:
        return torch.stack(list(said)).mean(0)
    fit = torch.stack([(z @ other.T / temperature).log_softmax(-1).diagonal() for z in said])  # [clients, N]
    return (fit.softmax(0)[..., None] * torch.stack(list(said))).sum(0)
