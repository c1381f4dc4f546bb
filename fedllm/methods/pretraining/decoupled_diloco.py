"""Decoupled DiLoCo: a fragment is merged as soon as a quorum has sent it, in a way that keeps its change's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import RecipeError, Withheld
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, scale, sub, zeros_like
from fedllm.methods._coarse import WHOLE, coarse, fine, refuse_codes
from fedllm.methods._fragments import check_windows, cut, fragments
from fedllm.methods._late import refuse_rounds
from fedllm.methods._radial import Collected, mean_of, radial, tallied

SLOW: Mapping[str, Any] = {"knobs": {"fragments": 2, "delay": 1}, "lr": 3e-3, "speeds": (1.0, 5.0, 5.0, 5.0)}
RATES = {"knobs.outer_lr": (0.4, 0.7)}

@dataclass(frozen=True)
class DecoupledDiLoCo(Method):
    """Round t: fragment t mod F of whoever is quick enough; Delta_m weighs tokens_m^2 / steps_m since it last had it.

    As in streaming_diloco clients keep their own weights and those last merged, and a merged fragment lands `delay`
    steps into the next window. Who missed some is told just these, as long as they are no more than F.
    """

    by_arrival = True
    card = Card(
        title="Decoupled DiLoCo: quorums in the place of barriers",
        paper="Douillard et al., Decoupled DiLoCo, 2026, arXiv 2604.21428",
        topic="pre-training",
        sends="down: the steps of fragments merged since the learner's last answer in few bits (at first, or where "
              "more than F were missed, all trainables); up: the next one's change in few bits, tokens, steps, loss",
        needs="any model and space whose layers F divides; local.steps H / F of the quickest; learners that declare "
              "their speed and keep twice the trainables; not dp, secagg, he, codec or robust layers",
        claim=Claim("with one of four learners five times slower it reaches the loss in less virtual time than DiLoCo, "
                    "each at its best outer rate", rig="workers", metric="seconds", baseline="diloco", relative="ratio",
                    holds="<", threshold=1.0, options={**SLOW, "steps": 6}, against={"steps": 12}, grid=RATES,
                    unequal="what is measured is the time to a loss, and each works until it is there"),
        also={"bytes": Claim("a cycle of fragments takes at most 1.01 of streaming DiLoCo's bytes", rig="wire",
                             metric="cycle", baseline="streaming_diloco", relative="ratio", holds="<=", threshold=1.01,
                             kind="exact", options={"knobs": {"fragments": 2}}, against={"knobs": {"fragments": 2}},
                             seeds=3),
              "norm": Claim("after the same time the merge that keeps norms ends no higher than the mean, each at its "
                            "best outer rate", rig="workers", metric="fall", baseline="decoupled_diloco",
                            relative="difference", holds=">=", threshold=0.0, options={**SLOW, "steps": 6},
                            against={"knobs": {**SLOW["knobs"], "merge": "mean"}}, grid=RATES)},
        evidence="From a dossier. A learner makes its speed's share of a window's steps and then answers. Who is later "
                 "than quorum and grace is dropped, and its window does not count; the paper's learner would keep it. "
                 "Two runs on real sites are alike only where all answer in time.",
    )
    trial = Trial({"fragments": 2, "delay": 1}, local={"steps": 3, "optimizer": "adamw", "lr": 0.01},
                  far={"rounds": 4, "method.quorum": None}, rounding="4 bits, where a last one may decide")
    fragments: int = knob(2, "F, parts of the model that are merged one a round", ge=1)
    delay: int = knob(0, "tau, local steps that a merged fragment is under way; less than local.steps", ge=0)
    quorum: int | None = knob(1, "K, learners whose answers are enough; None: all", ge=1)
    grace: float = knob(0.5, "gamma: what of the slack until the fragment lands is waited for more of them", ge=0, lt=1)
    merge: Literal["radial", "mean"] = knob("radial", "mean of lengths times the mean direction, tensor by tensor "
                                            "(embeddings: the mean), or the mean", options=("radial", "mean"))
    alpha: float = knob(0.0, "share of the learner's own weights that stay where a fragment lands", ge=0, le=1)
    bits: int = knob(4, "bits of a number, up and down; 32: as they are", options=(4, 8, WHOLE))
    outer_lr: float = knob(0.4, "the server's rate", gt=0)
    outer_momentum: float = knob(0.9, "of the server's SGD with Nesterov's look ahead, a buffer a fragment", ge=0, lt=1)

    def check_layers(self, layers):
        refuse_rounds(self, layers)
        refuse_codes(self, layers, "method diloco")

    def check_clients(self, ids, cohort):
        if self.quorum is not None and cohort < self.quorum:
            raise RecipeError(f"method.quorum = {self.quorum} is not allowed with {cohort} clients a round (of "
                              f"{len(ids)}): no fragment could be merged; it must be <= {cohort}")

    def check_work(self, local, rounds):
        check_windows("decoupled_diloco", local, rounds, self.fragments, self.delay)

    def init(self, model) -> State:
        theta = model.initial()
        fragments(theta, self.fragments)
        tables = {f"{path}.weight" for path, m in model.net.named_modules() if isinstance(m, nn.Embedding)}
        return {"theta": theta, "goal": dict(theta), "b": zeros_like(theta), "version": 0, "holds": {}, "steps": {},
                "plain": sorted(tables & theta.keys()), "counts": {}, "pace": 0.0}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        v, parts, known = state["version"], fragments(state["theta"], self.fragments), state["steps"]
        now, quickest = parts[v % self.fragments], max(c.profile.speed for c in clients)
        told = {c.id: pack(version=v, share=c.profile.speed / quickest, **(
            {f"step{u}": known[str(u)] for u in range(state["holds"][c.id], v)}
            if v - state["holds"].get(c.id, -self.fragments - 1) <= self.fragments else {"theta": state["theta"]}))
            for c in clients}
        like, enough = cut(state["theta"], now), min(self.quorum or len(told), len(told))
        out = yield Ask(self.local, told, Collected(like, self.bits), quorum=enough, enough=enough,
                        grace=lambda seconds: self.slack(state["pace"], seconds))
        by = dict(zip(out.folded, out.value["each"], strict=True))
        by = {c: by[c] for c in told if c in by}  # in an order that does not hang on time
        counts, weights = tallied(state["counts"], by, v % self.fragments, self.fragments)
        trees = [tree for tree, _, _ in by.values()]
        g = radial(trees, weights, state["plain"]) if self.merge == "radial" else mean_of(trees, weights)
        b = add(scale(cut(state["b"], now), self.outer_momentum), g)  # b_p <- mu b_p + Delta_p
        goal = add(cut(state["goal"], now), add(g, b, self.outer_momentum), -self.outer_lr)
        step = goal if self.bits == WHOLE else coarse(sub(goal, like), self.bits)
        waits = enough < len(told) and self.grace * self.delay > 0  # where time decides nothing, the state holds none
        pace = min((out.seconds[c] / by[c][2] for c in by if waits and c in out.seconds), default=0.0)
        return {**state, "theta": state["theta"] | self.landed(step, like), "goal": state["goal"] | goal,
                "b": state["b"] | b, "version": v + 1, "holds": state["holds"] | dict.fromkeys(by, v), "pace": pace,
                "steps": {u: s for u, s in known.items() if int(u) > v - self.fragments} | {str(v): step},
                "counts": counts}

    @on_client(gives="codes?: whole, scales?: tensor, delta?: tensors, tokens: count, steps: count, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        now, known, landing = self.taken(msg, client)
        total = max(1, int(client.training.count(client.n) * msg["share"] + 1e-9))  # H_k = H v_k / max v
        early, fitted = min(self.delay, total - 1) if landing else 0, None
        if early:
            fitted = client.fit(now, steps=early, moments=client.memory.get("inner"))
            now = fitted.theta
        if landing:  # theta_p <- (1 - alpha) theta_p' + alpha theta_p of its own
            now = now | add(scale(cut(known, landing), 1 - self.alpha), cut(now, landing), self.alpha)
        last = client.fit(now, steps=total - early, moments=fitted.moments if fitted else client.memory.get("inner"))
        client.memory["inner"] = last.moments
        client.memory["held"] = {"version": msg["version"], "known": known, "now": last.theta}
        leaving = fragments(known, self.fragments)[msg["version"] % self.fragments]
        delta = sub(cut(known, leaving), cut(last.theta, leaving))  # Theta_p as merged - theta_p
        return pack(loss=last.loss, tokens=last.tokens + (fitted.tokens if fitted else 0), steps=total,
                    **({"delta": delta} if self.bits == WHOLE else coarse(delta, self.bits)))

    def taken(self, msg: Payload, client: Client) -> tuple[Tree, Tree, list[str]]:
        """Its own weights, those last merged as they now are, and the names of what has been merged since."""
        if whole := part(msg, "theta"):
            return whole, whole, []
        mine, first = client.memory.get("held"), min(int(k.partition("/")[0][4:]) for k in msg if k.startswith("step"))
        if mine is None or mine["version"] != first:
            raise Withheld(f"it holds nothing of version {first} and must be told all of the trainables")
        known, parts = mine["known"], fragments(mine["known"], self.fragments)
        for u in range(first, msg["version"]):
            known = known | self.landed(part(msg, f"step{u}"), cut(known, parts[u % self.fragments]))
        return mine["now"], known, [n for u in range(first, msg["version"]) for n in parts[u % self.fragments]]

    def landed(self, step: Payload, like: Tree) -> Tree:
        """Where a fragment stands after the server's step."""
        return dict(step) if self.bits == WHOLE else add(like, fine(step["codes"], step["scales"], like, self.bits))

    def slack(self, pace: float, seconds: Sequence[float]) -> float:
        """gamma (tau step_time - (time to quorum - the first answer)), from 0."""
        return self.grace * max(0.0, self.delay * pace - (max(seconds) - min(seconds)))
