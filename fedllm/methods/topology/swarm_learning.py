"""Swarm learning: no server; the members elect who merges, any of them may die, and all check what was merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, Withheld
from fedllm.core.form import aligned, within
from fedllm.core.method import Card, Claim, Method, State, knob
from fedllm.core.payload import add, digest, pack, part, sub
from fedllm.methods._elections import WAYS, agreed, elected, held, one_of
from fedllm.wire import _letters as letters

log, SEALED = logging.getLogger(__name__), frozenset({"letter", "envelopes"})


@dataclass(frozen=True)
class SwarmLearning(Method):
    """Mergers are the first of the living by SHA-256(round, seed, id); the hash that most find is the merge's."""

    card = Card(
        title="Swarm learning: an elected, replaceable merger",
        paper="Warnat-Herresthal et al., Swarm Learning for decentralized and confidential clinical machine learning, "
              "Nature 594, 2021",
        topic="topology",
        sends="changes, sealed for the mergers; hashes and counts; what was merged, sealed for all, late ones too",
        needs="any model and space; clients that remember",
        claim=Claim("with all alive it is FedAvg (largest relative difference after 4 rounds)", rig="swarm",
                    metric="off_fedavg", holds="<=", threshold=1e-6, kind="exact"),
        also={"dies": Claim("where the merger of each second round dies no round is lost, and the loss is within 2 %",
                            rig="swarm", metric="dying_ratio", holds="<=", threshold=1.02, kind="exact"),
              "alone": Claim("under label skew its mean loss on the IID test is below that of training alone",
                             rig="label_skew", metric="global_loss", baseline="local_only", relative="difference",
                             holds="<", threshold=0.0, grid={"local.lr": (1e-3, 3e-3, 1e-2)})},
        evidence="From memory and a dossier; HPE's code is not open. A coordinator is the board; witnesses are ours.",
    )
    serves = False
    min_peers: int = knob(2, "members without whose changes no round is merged", ge=2)
    merge_by: Literal["mean", "median", "trimmed_mean"] = knob("mean", "how changes become one (trimmed: without a "
                                                               "fifth at either end)", options=WAYS)
    weights: Literal["count", "uniform"] = knob("count", "of the mean: rows, or alike", options=("count", "uniform"))
    witnesses: int = knob(1, "members beside the elected one that merge too; their hashes must agree", ge=0)
    heartbeat_timeout: float | None = knob(None, "seconds after which one is dead; None: clients.deadline", gt=0)
    seed: int = knob(0, "of the election", ge=0)
    keys: str | None = knob(None, "folder of identity keys, as of secagg; None: the relay is trusted with keys")

    repeats = 64  # a round asks again for whoever dies

    def init(self, model: Any) -> State:
        return {"round": 0, "merged": "", "merger": ""}

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if cohort < self.min_peers:
            raise CompositionError(f"method.min_peers = {self.min_peers} and rounds of {cohort} clients do not fit")

    def check_layers(self, layers):
        letters.closed_to("swarm_learning", layers)

    def ask(self, fn: Any, msgs: Mapping[str, Any]) -> Ask:
        return Ask(fn, msgs, quorum=0, deadline=self.heartbeat_timeout, hidden={"SwarmLearning": SEALED})

    def round(self, state: State, clients) -> Program:
        t, sid = state["round"], str(state["round"])
        met = yield self.ask(self.greet, {c.id: {"sid": sid} for c in clients})
        key = {c: list(met[c]["key"]) for c in met}
        fresh = [c for c in met if met[c]["holds"] == state["merged"]]  # the others missed a merge: they are healed
        order = elected(t, self.seed, fresh)
        while True:
            if not (now := order[: 1 + self.witnesses]):
                raise QuorumError(f"nobody is left to merge round {t + 1} of {len(met)} members")
            order, told = order[len(now) :], pack(sid=sid, to=now, keys=[key[c] for c in now])
            sent = yield self.ask(self.local, dict.fromkeys(fresh, told))
            if len(sent) < self.min_peers:
                raise QuorumError(f"{len(sent)} of {len(clients)} members sent a change in round {t + 1}, "
                                  f"min_peers is {self.min_peers}; nothing is merged")
            made = yield self.ask(self.merge, {m: self.mail(sid, i, sent, key) for i, m in enumerate(now)})
            best = agreed({m: made[m]["hash"] for m in made}, t)
            for m, r in ((m, r) for m, r in made.items() if r["hash"] != best or r["broken"]):
                log.warning("round %s: '%s' came to %s without %s of %s", sid, m, r["hash"], r["broken"], [*sent])
            for m in (m for m in made if made[m]["hash"] == best):
                out = yield self.ask(self.publish, {m: pack(sid=sid, to=list(met), keys=[key[c] for c in met])})
                told = {c: {"sid": sid, "of": m, "hash": best, "key": key[m], "letter": out[m]["letter"],
                            "envelope": out[m]["envelopes"][i]} for i, c in enumerate(met) if m in out}
                if told and (yield self.ask(self.accept, told)):
                    return {**state, "round": t + 1, "merged": best, "merger": m}
            log.warning("round %s: %s died while they merged, or lied; the next are elected", sid, now)

    def mail(self, sid: str, i: int, sent: Mapping[str, Any], key: Mapping[str, Any]) -> dict[str, Any]:
        return pack(sid=sid, members=list(sent), n=[sent[c]["n"] for c in sent], keys=[key[c] for c in sent],
                    envelopes=[sent[c]["envelopes"][i] for c in sent],
                    letter={str(j): sent[c]["letter"] for j, c in enumerate(sent)})

    @on_client(gives="key: blobs, holds: mark", sealed=True,
               fits=lambda self, msg, reply: letters.check_key(reply["key"]))
    def greet(self, msg, client):
        return {"key": letters.greet(client, msg["sid"], self.keys), "holds": client.memory.get("merged", "")}

    @on_client(gives="letter: whole, envelopes: blobs, n: rows, loss?: number", sealed=True,
               fits=lambda self, msg, reply: aligned(reply, ("envelopes",), len(msg["to"])))
    def local(self, msg, client):
        theta = held(client)
        if client.session.get("sid") != msg["sid"]:  # a second merger of the round gets the very same change
            fitted = client.fit(theta)
            client.session.update(sid=msg["sid"], delta=sub(fitted.theta, theta), loss=fitted.loss)
        letter, envelopes = letters.seal(client, msg["sid"], dict(zip(msg["to"], msg["keys"], strict=True)),
                                         pack(delta=client.session["delta"]), self.keys)
        return {"letter": letter, "envelopes": envelopes, "n": client.n, "loss": client.session["loss"]}

    @on_client(gives="hash: mark, broken: numbers", fits=lambda self, msg, re: within(re["broken"], msg["members"]))
    def merge(self, msg, client):
        theta, mail, mine, broken = held(client), part(msg, "letter"), [], []
        rows = zip(msg["members"], msg["keys"], msg["envelopes"], msg["n"], strict=True)
        for j, (c, key, envelope, n) in enumerate(rows):
            try:
                opened = letters.unseal(client, msg["sid"], c, key, mail[str(j)], envelope, self.keys,
                                        like=pack(delta=theta))
                mine.append((part(opened, "delta"), n if self.weights == "count" else 1.0))
            except PayloadError:
                broken.append(j)
        if len(mine) < self.min_peers:
            raise Withheld(f"{len(mine)} letters could be used, min_peers is {self.min_peers}")
        client.session["made"] = made = add(theta, one_of(*zip(*mine, strict=True), self.merge_by))
        return {"hash": digest(made), "broken": broken}

    @on_client(gives="letter: whole, envelopes: blobs", sealed=True)
    def publish(self, msg, client):
        letter, envelopes = letters.seal(client, msg["sid"], dict(zip(msg["to"], msg["keys"], strict=True)),
                                         pack(theta=client.session["made"]), self.keys)
        return {"letter": letter, "envelopes": envelopes}

    @on_client(gives="took: flag")
    def accept(self, msg, client):
        letter = letters.unseal(client, msg["sid"], msg["of"], msg["key"], msg["letter"], msg["envelope"], self.keys,
                                like=pack(theta=held(client)))
        if digest(theta := part(letter, "theta")) != msg["hash"]:
            raise Withheld(f"'{msg['of']}' sent other trainables than those that the mergers agreed on")
        letters.forget(client)
        client.memory.update(theta=theta, merged=msg["hash"])
        return {"took": True}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: {"on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(held(client), on=msg["on"])
