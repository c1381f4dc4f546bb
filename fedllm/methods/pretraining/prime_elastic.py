"""Elastic DiLoCo, as INTELLECT-1's prime and torchft do it: a quorum, a vote on each outer step, and live healing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError, RecipeError, Withheld
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, digest, non_finite, pack, part, scale, sub, zeros_like
from fedllm.methods._coarse import WHOLE, MeanOfCoarse, coarse, fine

BITS = {"none": WHOLE, "int8": 8}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class PrimeElastic(Method):
    """A round is a window: members work and their changes are reduced; each makes the outer step and says what it came
    to. All say the same, or nobody's step counts and the window is made again from the last commit.

    Who is not at the last commit is healed meanwhile with what a member holds, makes the same step, and works in the
    next window.
    """

    card = Card(
        title="INTELLECT-1's elastic outer loop",
        paper="Prime Intellect Team, INTELLECT-1 Technical Report, 2024, arXiv 2412.01152; torchft (its protocol)",
        topic="pre-training",
        sends="down: the reduced change in 8 bits (to who joins: all trainables and the outer momentum); up: the "
              "change in 8 bits, the training loss, a vote; from one member, where somebody joins, what it holds",
        needs="any model and space; local.steps H; workers that keep twice the trainables; not dp, secagg, he, codec "
              "or robust layers, since every single answer counts",
        claim=Claim("with a worker that leaves after two of ten windows and comes back after five, it ends no more "
                    "than 0.1 above DiLoCo with all four all along, each at its best inner rate", rig="elastic",
                    metric="fall", baseline="diloco", relative="difference", holds=">=", threshold=-0.1, grid=RATES,
                    options={"away": (2, 5)}, against={"away": (0, 0)},
                    unequal="three of the forty windows of work are lost with the worker"),
        also={"healing": Claim("who joins is healed in less than the time of one outer step", rig="elastic",
                               metric="healing", holds="<", threshold=1.0, kind="exact", options={"away": (2, 5)},
                               seeds=3)},
        evidence="torchft's protocol and prime's 8-bit ring from a dossier; a star stands for the ring, so that a "
                 "sum is rounded once at each client and once at the server. Inner moments never leave a worker: who "
                 "heals begins them afresh, and a window that does not count takes them back.",
    )
    trial = Trial({"min_replicas": 2, "quantize": "none"}, local={"steps": 2, "optimizer": "adamw", "lr": 0.01})
    min_replicas: int = knob(1, "workers without which no window counts", ge=1)
    quantize: Literal["int8", "none"] = knob("int8", "changes in 8 bits, or as they are", options=("int8", "none"))
    outer_lr: float = knob(0.7, "the rate of the outer SGD", gt=0)
    outer_momentum: float = knob(0.9, "of the outer SGD, with Nesterov's look ahead", ge=0, lt=1)
    max_missed: int = knob(3, "windows that a worker's vote may undo before it is asked no more", ge=1)

    def check_clients(self, ids, cohort):
        if cohort < self.min_replicas:
            raise RecipeError(f"method.min_replicas = {self.min_replicas} is not allowed with {cohort} clients a round "
                              f"(of {len(ids)}): no window could count; it must be <= {cohort}")

    def check_layers(self, layers):
        for layer in layers:
            if layer.algebra.kind in ("dp", "secagg", "he", "robust", "codec"):
                raise CompositionError(f"layer '{name_of(layer)}' changes or hides single answers, and "
                                       "method 'prime_elastic' counts each vote, so they do not fit together; use "
                                       "method diloco")

    def init(self, model) -> State:
        theta = model.initial()
        return {"theta": theta, "b": zeros_like(theta), "version": 0, "holds": {}, "missed": {}, "undone": 0}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        v, theta, b = state["version"], state["theta"], state["b"]
        ids = [c.id for c in clients if state["missed"].get(c.id, 0) < self.max_missed]
        members = [c for c in ids if state["holds"].get(c) == v]
        whole = {} if members else {"theta": theta, "b": b}  # the start, or nobody is left who holds it
        members = members or ids
        joining = [c for c in ids if c not in members]
        give = Ask(self.give, {members[v % len(members)]: pack(version=v)} if joining else {}, quorum=0)
        work = Ask(self.local, {c: pack(version=v, **whole) for c in members}, quorum=self.min_replicas,
                   reduce=MeanOfCoarse("uniform", theta, BITS[self.quantize]))
        gave, out = yield [give, work]
        g = part(out.value, "delta")
        told = {"step": g} if self.quantize == "none" else coarse(g, 8)
        live = next((m for m in gave.values() if mark(part(m, "theta"), part(m, "b")) == mark(theta, b)), None)
        held = {n: part(live, n) for n in ("theta", "b")} if live else {"theta": theta, "b": b}
        voted, healed = yield [
            Ask(self.vote, {c: pack(version=v, **told) for c in out.answered}, quorum=0),
            Ask(self.heal, {c: pack(version=v, **told, **held) for c in joining}, quorum=0)]
        theta, b = self.outer(theta, b, told)
        same = [c for asked in (voted, healed) for c, r in asked.items() if r["yes"] and r["mark"] == mark(theta, b)]
        against = [c for c in out.answered if c not in same]
        missed = state["missed"] | {c: state["missed"].get(c, 0) + 1 for c in against}
        holds = {c: at for c, at in state["holds"].items() if c not in ids}
        if against:  # all or none: who voted for it stands where it stood
            return {**state, "holds": holds | dict.fromkeys(same, v), "missed": missed, "undone": state["undone"] + 1}
        return {**state, "theta": theta, "b": b, "version": v + 1, "holds": holds | dict.fromkeys(same, v + 1)}

    def outer(self, theta: Tree, b: Tree, told: Payload) -> tuple[Tree, Tree]:
        """One step of SGD with Nesterov momentum, of single operations that every machine rounds alike."""
        g = fine(told["codes"], told["scales"], theta, 8) if "codes" in told else told.get("step") or part(told, "step")
        b = add(scale(b, self.outer_momentum), g)
        return sub(theta, scale(add(g, scale(b, self.outer_momentum)), self.outer_lr)), b

    @on_client(gives="codes?: whole, scales?: tensor, delta?: tensors, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        told = {n: part(msg, n) for n in ("theta", "b")}
        mine = {"version": msg["version"], **told} if told["theta"] else holding(client, msg["version"])
        fitted = client.fit(mine["theta"], moments=mine.get("inner"))
        client.memory.update(synced=mine, tried={"inner": fitted.moments})
        delta = sub(mine["theta"], fitted.theta)
        return pack(loss=fitted.loss, **({"delta": delta} if self.quantize == "none" else coarse(delta, 8)))

    @on_client(gives="yes: flag, mark: integer")
    def vote(self, msg: Payload, client: Client) -> Payload:
        return self.stepped(client, holding(client, msg["version"]), client.memory["tried"], msg)

    @on_client(gives="yes: flag, mark: integer")
    def heal(self, msg: Payload, client: Client) -> Payload:
        mine = {"version": msg["version"], "theta": part(msg, "theta"), "b": part(msg, "b")}
        client.memory["synced"] = mine
        return self.stepped(client, mine, {}, msg)

    @on_client(gives="theta: tensors, b: tensors")
    def give(self, msg: Payload, client: Client) -> Payload:
        mine = holding(client, msg["version"])
        return pack(theta=mine["theta"], b=mine["b"])

    def stepped(self, client: Client, mine: Mapping[str, Any], inner: Mapping[str, Any], told: Payload) -> Payload:
        """What the outer step comes to here; it counts when a later message is of that version."""
        theta, b = self.outer(mine["theta"], mine["b"], told)
        client.memory["next"] = {"version": mine["version"] + 1, "theta": theta, "b": b, **inner}
        return {"yes": non_finite(theta) is None, "mark": mark(theta, b)}

    def report(self, state):
        return {"windows": {"committed": state["version"], "undone": state["undone"]}, "missed": dict(state["missed"])}


def holding(client: Client, version: int) -> Mapping[str, Any]:
    """What the client holds of this commit; Withheld where it is at another."""
    for name in ("next", "synced"):
        if (mine := client.memory.get(name)) and mine["version"] == version:
            return mine
    raise Withheld(f"it does not hold commit {version} and must be healed")


def mark(theta: Tree, b: Tree) -> int:
    """60 bits of a digest of both."""
    return int(digest({"theta": theta, "b": b})[:15], 16)
