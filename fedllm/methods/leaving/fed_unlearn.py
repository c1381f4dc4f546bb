"""Unlearning: a client leaves a federation that learned from it, and the shared model is made as if it never had."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, norm, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.ascent import Ascent

NEAR = {"options": {"knobs": {"grade": "eraser"}}, "against": {"knobs": {"grade": "none"}}}


@dataclass(frozen=True)
class FedUnlearn(Star):
    """FedAvg with everybody up to round `at`; from there on one of three ways to take one client out of it."""

    card = Card(
        title="Federated unlearning of a client: retraining, FedEraser, bounded ascent",
        paper="Liu et al., FedEraser: Enabling Efficient Data Removal from Federated Learning Models, IWQoS 2021, "
              "arXiv 2012.13891; Zhang et al., Oblivionis, AAAI 2026, arXiv 2508.08875",
        topic="leaving",
        sends="as FedAvg; ascent: once more down to and up from the client that leaves. Norms of old updates stay "
              "where they were made",
        needs="clients that remember (eraser); the client that leaves, once more (ascent)",
        claim=Claim("by calibration at half the steps the loss on the rows of the client that left is nearer to "
                    "retraining's than after going on without it", rig="leaving", metric="loss_off",
                    baseline="fed_unlearn", relative="difference", holds="<", threshold=0.0, **NEAR),
        also={"ascent": Claim("and so it is by bounded ascent", rig="leaving", metric="loss_off",
                              baseline="fed_unlearn", relative="difference", holds="<", threshold=0.0,
                              options={"knobs": {"grade": "ascent"}}, against={"knobs": {"grade": "none"}}),
              "kept": Claim("calibration's accuracy for those who stay is at most 2 points below retraining's",
                            rig="leaving", metric="accuracy_off", holds=">=", threshold=-0.02,
                            options={"knobs": {"grade": "eraser"}}),
              "canaries": Claim("by bounded ascent the exposure of its canaries is nearer to retraining's than "
                                "after going on without it", rig="leaving", metric="exposure_off",
                                baseline="fed_unlearn", relative="difference", holds="<", threshold=0.0,
                                options={"knobs": {"grade": "ascent"}, "canaries": 32},
                                against={"knobs": {"grade": "none"}}),
              "canaries_kept": Claim("and so it is by calibration", rig="leaving", metric="exposure_off",
                                     baseline="fed_unlearn", relative="difference", holds="<", threshold=0.0,
                                     options={"knobs": {"grade": "eraser"}, "canaries": 32},
                                     against={"knobs": {"grade": "none"}}),
              "members": Claim("and an attacker who tells the client's rows from fresh ones by their loss has an AUC "
                               "within 0.05 of retraining's", rig="leaving", metric="auc_off", holds="<=",
                               threshold=0.05, options={"knobs": {"grade": "eraser"}})},
        evidence="Oblivionis's code and a port of FedEraser read by the dossier; the port takes lengths from the wrong "
                 "pair of models and works on the mean. Here each client keeps the norms of its own updates, so the "
                 "server sees sums alone. `fedllm replay --without` takes a client out of any run that kept its "
                 "replies. What copies of a model that were handed out know cannot be recalled.",
    )
    trial = Trial({"forget": "c1", "at": 1, "grade": "ascent"}, silent="who leaves is one of those who answer",
                  far={"method.forget": "site-b"})

    forget: str = knob("", "the client that leaves, by its id")
    at: int = knob(10, "rounds with it; from this one on it is taken out", ge=1)
    grade: Literal["retrain", "eraser", "ascent", "none"] = knob(
        "retrain", "begin again without it where it first answered (exact), with fewer steps and the lengths of old "
        "updates, or let it descend backwards and the rest go on; none: the rest just go on",
        options=("retrain", "eraser", "ascent", "none"))
    ratio: float = knob(0.5, "eraser: share of a round's steps that calibrate one kept round", gt=0, le=1)
    every: int = knob(1, "eraser: one round in so many is kept", ge=1)
    lengths: Literal["tensor", "whole"] = knob("tensor", "eraser: the old length of each tensor, or of all together",
                                               options=("tensor", "whole"))
    bound: float = knob(3.0, "ascent: loss per target beyond which a row of the client's is left alone; ln C, what a "
                             "model that knows nothing of C classes has, is a good one", gt=0)

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if self.forget not in ids:
            raise RecipeError(f"method.forget = {self.forget!r} is not allowed; it must be a client of the federation: "
                              f"{', '.join(list(ids)[:8])}{', ..' if len(ids) > 8 else ''}")
        if len(ids) < 2:
            raise RecipeError(f"method.forget = {self.forget!r} is the only client; nobody would be left, and "
                              "what is without it is the starting model")

    def init(self, model: Any) -> State:
        theta = model.initial()
        return {"theta": theta, "start": theta, "clean": 0, "round": 0, "seen": []}

    def round(self, state: State, clients) -> Program:
        t, rest = state["round"], [c for c in clients if c.id != self.forget]
        if t < self.at:
            keep = t % self.every == 0
            out = yield Ask(self.local, {c.id: pack(theta=state["theta"], keep=t if keep else -1) for c in clients})
            seen, clean = {*state["seen"], *out.answered}, state
            if self.forget not in seen:  # nothing hangs on it yet: what stands now need not be come to again
                clean = {"start": self.merge(state, out)["theta"], "clean": t + 1}
            return {**self.merge(state, out), "seen": sorted(seen), "start": clean["start"], "clean": clean["clean"]}
        if t == self.at:
            if self.forget not in state["seen"]:
                raise CompositionError(f"method.forget = {self.forget!r} never answered in rounds 0 to {self.at - 1}: "
                                       f"there is nothing of it to remove; those who did: {', '.join(state['seen'])}")
            state = yield from self.removed(state)
        if not rest:  # the one who left was drawn alone
            return {**state, "round": t + 1}
        kept = -(-state["clean"] // self.every) + t - self.at  # of the kept rounds the one that is gone through again
        replay = kept * self.every
        old = replay if self.grade == "eraser" and replay < self.at else -1
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"], keep=-1, old=old) for c in rest})
        return self.merge(state, out)

    def removed(self, state: State) -> Program:
        """What the others begin with."""
        if self.grade in ("retrain", "eraser"):
            return {**state, "theta": state["start"]}
        if self.grade == "ascent":
            out = yield Ask(self.unlearn, {self.forget: pack(theta=state["theta"])})
            return {**state, "theta": add(state["theta"], part(out.value, "delta"))}
        return state

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta, norms = part(msg, "theta"), client.memory.get("norms", {})
        old = norms.get(str(msg.get("old", -1)))
        count = client.training.count(client.n)
        fitted = client.fit(theta, steps=max(1, math.ceil(self.ratio * count))) if old else client.fit(theta)
        delta = sub(fitted.theta, theta)
        if old:  # ||U_k|| V_k / ||V_k||: the way is new, its length what it was
            whole = math.hypot(*old.values()) / max(norm(delta), 1e-12)
            delta = {n: v * (whole if self.lengths == "whole" else old[n] / max(float(v.norm()), 1e-12))
                     for n, v in delta.items()}
        if msg["keep"] >= 0:
            client.memory["norms"] = {**norms, str(msg["keep"]): {n: float(v.norm()) for n, v in delta.items()}}
        return pack(delta=delta, n=client.n, loss=fitted.loss)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def unlearn(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta, objective=Ascent(self.bound))
        client.memory.clear()
        return pack(delta=sub(fitted.theta, theta), n=client.n)

    def merge(self, state: State, out: Replies) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta")), "round": state["round"] + 1}

    def report(self, state: State) -> Mapping[str, Any]:
        return {"left": self.forget, "grade": self.grade, "in_rounds": [0, self.at - 1],
                "rounds_before_it_answered": state["clean"], "rounds_without": max(0, state["round"] - self.at)}
