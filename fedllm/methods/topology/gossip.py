"""Gossip: no server model; each client trains its own and averages it with its neighbors'."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.form import aligned, within
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, scale, sub, zeros_like
from fedllm.local.terms import Linear
from fedllm.methods._graphs import GRAPHS, graph_of, joined, metropolis, mixed, need_connected
from fedllm.methods._plain_sgd import need_sgd
from fedllm.wire import _letters as letters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gossip(Method):
    """D-PSGD on a graph of clients, with gradient tracking as an option; the coordinator only relays sealed letters."""

    card = Card(
        title="Gossip: decentralized SGD and gradient tracking over a graph of clients",
        paper="Lian et al. (D-PSGD), NeurIPS 2017, arXiv 1705.09056; Liu et al. (K-GT), 2023, arXiv 2301.01313",
        topic="topology",
        sends="up: the own trainables, sealed once for all neighbors (tracking: the mean gradient too); down: each "
              "neighbor's letter; the relay reads nothing and keeps no model",
        needs="any model and space; clients that remember; tracking: plain SGD",
        claim=Claim("on a ring of eight clients under label skew their own models reach a lower mean loss on the IID "
                    "test than clients that train alone", rig="label_skew", metric="global_loss",
                    baseline="local_only", relative="difference", holds="<", threshold=0.0, wins=5),
        also={
            "fedavg": Claim("on an exponential graph the mean loss on the IID test is at most 10% above that of FedAvg",
                            rig="label_skew", metric="global_loss", baseline="fedavg", relative="ratio", holds="<=",
                            threshold=1.10, wins=4, options={"knobs": {"graph": "exponential"}}),
            "tracking": Claim("clients with other curvatures and minima, on a ring: with tracking the worst one comes "
                              "a billion times nearer the minimum of the mean than with D-PSGD, which stalls",
                              rig="peers", metric="worst", baseline="gossip", relative="ratio", holds="<=",
                              threshold=1e-9, wins=5, options={"knobs": {"tracking": True}}),
            "exponential": Claim("16 clients on an exponential graph stay at most half as far apart as on a ring",
                                 rig="peers", metric="apart", baseline="gossip", relative="ratio", holds="<=",
                                 threshold=0.5, options={"knobs": {"graph": "exponential"}, "clients": 16})},
        evidence="Clients count alike. W is Metropolis-Hastings; K-GT with eta_s = 1 and c_i = 0 at first; AES-GCM.",
    )
    trial = Trial(silent="who is whose neighbor follows from all who are asked")
    serves, reads_rates = False, True
    graph: Literal["ring", "torus", "exponential", "random", "complete"] = knob(
        "ring", "who is whose neighbor, over the round's clients in the data's order", options=GRAPHS)
    degree: int = knob(4, "neighbors of each client at most, where the graph is random", ge=2)
    redraw: bool = knob(True, "random: a new graph each round; false: the same in all")
    graph_seed: int = knob(0, "random: what it is drawn from", ge=0)
    edges: tuple = knob((), "a graph of one's own: pairs of client ids (empty: `graph`)")
    tracking: bool = knob(False, "correct each client's gradient by c_i, so that all head for the mean's minimum")
    keys: str | None = knob(None, "folder of identity keys, as of secagg; None: the relay must hand keys on unchanged")

    def init(self, model) -> State:
        return {"round": 0}

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if cohort < 2:
            raise CompositionError("gossip and a round of one client do not fit together; use local_only")
        if self.edges:
            return need_connected(ids, self.edges)
        graph_of(self.graph, list(ids[:cohort]), self.degree)

    def check_work(self, local, rounds) -> None:
        if self.tracking:
            need_sgd(local, "gossip with tracking", "z_i is no mean gradient otherwise")

    def check_layers(self, layers) -> None:
        letters.closed_to("gossip", layers)

    def round(self, state: State, clients):
        sid, ids = str(state["round"]), [c.id for c in clients]
        near = self.neighbors(ids, state["round"])
        met = yield Ask(self.greet, {c: {"sid": sid} for c in ids})
        links = {c: [d for d in near[c] if d in met] for c in met}
        keys = {c: [list(met[d]["key"]) for d in links[c]] for c in met}
        wrote = yield Ask(self.local, {c: {"sid": sid, "to": links[c], "keys": keys[c]} for c in met},
                          hidden={"Gossip": frozenset({"letter", "envelopes"})})
        w, msgs = metropolis(near), {}
        for c in wrote:
            heard = [d for d in links[c] if d in wrote]  # W_ij of a silent neighbor goes back to W_ii, at both ends
            msgs[c] = {"sid": sid, "from": heard, "weights": [w[c][d] for d in heard],
                       "keys": [list(met[d]["key"]) for d in heard],
                       "envelopes": [wrote[d]["envelopes"][links[d].index(c)] for d in heard],
                       **pack(letter={str(i): wrote[d]["letter"] for i, d in enumerate(heard)})}
        out = yield Ask(self.mix, msgs)
        for c, peer in [(c, msgs[c]["from"][int(i)]) for c, reply in out.items() for i in reply["broken"]]:
            log.warning("round %s: client '%s' cannot open the letter of '%s'", sid, c, peer)
        return {**state, "round": state["round"] + 1}

    def neighbors(self, ids: Sequence[str], t: int) -> dict[str, list[str]]:
        if self.edges:
            return joined(ids, ((a, b) for a, b in self.edges if a in ids and b in ids))
        return graph_of(self.graph, ids, self.degree, self.graph_seed, t if self.redraw else 0)

    @on_client(gives="key: blobs", fits=lambda self, msg, reply: letters.check_key(reply["key"]), sealed=True)
    def greet(self, msg, client):
        return {"key": letters.greet(client, msg["sid"], self.keys)}

    @on_client(gives="letter: whole, envelopes: blobs, loss?: number", sealed=True,
               fits=lambda self, msg, reply: aligned(reply, ("envelopes",), len(msg["to"])))
    def local(self, msg, client):
        theta = client.memory.get("theta") or client.model.initial()
        if not self.tracking:
            fitted = client.fit(theta)
            half = pack(theta=fitted.theta)
        else:
            self.check_work(client.training, 0)
            c = client.memory.get("c") or zeros_like(theta)
            fitted = client.fit(theta, terms=[Linear(c)])  # theta <- theta - eta (g_i(theta) + c_i)
            # z_i = (theta_t - theta) / (H eta), with the sum of the rates in place of H eta
            half = pack(theta=fitted.theta, z=scale(sub(theta, fitted.theta), 1 / fitted.lr_sum))
        client.memory["half"] = half
        to = dict(zip(msg["to"], msg["keys"], strict=True))
        letter, envelopes = letters.seal(client, msg["sid"], to, half, self.keys)
        return {"letter": letter, "envelopes": envelopes, "loss": fitted.loss}

    @on_client(gives="broken: numbers", fits=lambda self, msg, reply: within(reply["broken"], msg["from"]))
    def mix(self, msg, client):
        """theta_i = sum_j W_ij half_j, c_i <- c_i - z_i + sum_j W_ij z_j; a letter that does not open is silence."""
        mine, sealed, opened, broken = client.memory.pop("half"), part(msg, "letter"), [], []
        rows = zip(msg["from"], msg["weights"], msg["keys"], msg["envelopes"], strict=True)
        for i, (peer, w, key, envelope) in enumerate(rows):
            try:
                theirs = letters.unseal(client, msg["sid"], peer, key, sealed[str(i)], envelope, self.keys, like=mine)
                opened.append((w, theirs))
            except PayloadError as error:
                log.warning("%s", error)
                broken.append(i)
        letters.forget(client)
        mean = mixed(mine, opened)
        client.memory["theta"] = part(mean, "theta")
        if self.tracking:
            z = part(mine, "z")
            client.memory["c"] = add(sub(client.memory.get("c") or zeros_like(z), z), part(mean, "z"))
        return {"broken": broken}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: pack(on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(client.memory.get("theta") or client.model.initial(), on=msg["on"])
