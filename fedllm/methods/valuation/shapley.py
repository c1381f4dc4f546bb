"""Shapley: what each client was worth, by models rebuilt from the round's own replies; nobody is asked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.rng import numpy_stream
from fedllm.methods._games import Game, exact, walk


@dataclass(frozen=True)
class Shapley(Method):
    """FedAvg, and beside it phi_k, the mean of v(S + k) - v(S) over the orders in which clients could have come."""

    card = Card(
        title="Shapley: what a client was worth (GTG-Shapley, leave-one-out)",
        paper="Liu et al., GTG-Shapley: Efficient and Accurate Participant Contribution Evaluation in Federated "
              "Learning, ACM TIST 2022, arXiv 2109.02053",
        topic="valuation",
        sends="as FedAvg, and nothing beside it; the server sees each client's change",
        needs="public rows at the server, whose loss is what counts; replies that it sees one by one",
        claim=Claim("of six clients the one whose labels are shuffled is worth less than any other", rig="worth",
                    metric="behind", holds=">", threshold=0.0),
        also={"like_exact": Claim("values of guided, truncated walks rank clients as all 2^N coalitions do: a rank "
                                  "correlation of 0.9 or more", rig="worth", metric="rank_correlation", holds=">=",
                                  threshold=0.9),
              "cheaper": Claim("with at most 0.8 of the evaluations", rig="worth", metric="evaluations_share",
                               holds="<=", threshold=0.8)},
        evidence="Notes on the paper and a port of it. v is minus the loss on the server's public rows: accuracy is "
                 "too coarse. Values reward likeness to those rows, and are sums over the rounds that a client was in.",
    )
    trial = Trial({"game": "exact"}, silent="what the others are worth depends on who was there")
    game: Literal["gtg", "exact", "leave_one_out"] = knob(
        "gtg", "walks that begin with each client in turn, all coalitions, or all against all but one",
        options=("gtg", "exact", "leave_one_out"))
    round_eps: float = knob(1e-3, "e_b: a round that changes v by no more is worth nothing to anybody", ge=0)
    walk_eps: float = knob(1e-3, "e_i: a walk ends where the rest of the clients could change v by less", ge=0)
    walks: int = knob(30, "walks at least", ge=1)
    tolerance: float = knob(0.05, "mean relative change of the last `window` estimates at which walks end", gt=0)
    window: int = knob(10, "estimates that are looked back on", ge=1)
    cap: float = knob(0.8, "evaluations at the most, of 2^N", gt=0, le=1)

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if cohort < 2:
            raise RecipeError("method 'shapley' with one client a round is not allowed: alone it is worth all there "
                              "is; it needs 2 or more")
        if self.game == "exact" and cohort > 8:
            raise RecipeError(f"method.game = 'exact' with {cohort} clients a round is not allowed (2^{cohort} models "
                              "each round); it must be 8 or fewer, or game = 'gtg'")

    def public_at(self):
        return ("server",)

    def init(self, model: Any) -> State:
        return {**super().init(model), "round": 0, "worth": {}, "rounds": {}, "evaluations": 0}

    def round(self, state: State, clients) -> Program:
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"]) for c in clients})
        deltas, n = {c: part(out[c], "delta") for c in out}, {c: float(out[c]["n"]) for c in out}
        players, known = sorted(deltas), dict[frozenset[str], float]()
        play = self.play(players, numpy_stream("shapley", state["round"]))
        try:
            s = next(play)
            while True:
                if s not in known:
                    theta = merged(state["theta"], deltas, n, s)
                    told = yield Ask(self.worth, {SERVER: pack(theta=theta)})
                    known[s] = float(told[SERVER]["v"])
                s = play.send(known[s])
        except StopIteration as end:
            phi = end.value
        worth = {c: state["worth"].get(c, 0.0) + phi[c] for c in players}
        return {"theta": merged(state["theta"], deltas, n, frozenset(players)), "round": state["round"] + 1,
                "worth": {**state["worth"], **worth}, "evaluations": state["evaluations"] + len(known),
                "rounds": {**state["rounds"], **{c: state["rounds"].get(c, 0) + 1 for c in players}}}

    @on_client(gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    @on_server
    def worth(self, msg, client):
        """v: minus the mean loss of these trainables on the public rows."""
        return {"v": -client.probe([part(msg, "theta")], on=client.public)[0].mean}

    def play(self, players: Sequence[str], rng: np.random.Generator) -> Game:
        """The game that the knobs say; nobody is worth anything in a round that changes next to nothing."""
        whole, none = frozenset(players), frozenset()
        gain = (yield whole) - (yield none)
        if abs(gain) <= self.round_eps:
            return dict.fromkeys(players, 0.0)
        if self.game == "leave_one_out":
            phi = {}
            for k in players:
                phi[k] = (yield whole) - (yield whole - {k})
            return phi
        return (yield from (exact(players) if self.game == "exact" else walk(
            players, rng, self.walks, self.walk_eps, self.tolerance, self.window, self.cap)))

    def report(self, state: State) -> Mapping[str, Any]:
        return {"worth": dict(state["worth"]), "rounds_taken_part": dict(state["rounds"]),
                "models_evaluated": state["evaluations"]}


def merged(theta: Tree, deltas: Mapping[str, Tree], n: Mapping[str, float], s: frozenset[str]) -> Tree:
    """theta + sum_{k in S} n_k / n_S delta_k, in the clients' order."""
    total = sum(n[k] for k in sorted(s))
    for k in sorted(s) if total else ():
        theta = add(theta, deltas[k], n[k] / total)
    return theta
