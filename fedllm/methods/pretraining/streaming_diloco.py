"""Streaming DiLoCo: one fragment of the model at a time, in few bits, on its way while clients train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, scale, sub, zeros_like
from fedllm.methods._coarse import WHOLE, MeanOfCoarse, coarse, fine, refuse_codes
from fedllm.methods._fragments import check_windows, cut, fragments
from fedllm.methods._held import behind, counted, held

STREAM = {"local": {"optimizer": "adamw", "steps": 6}, "rounds": 20, "sizes": (32,),
          "knobs": {"fragments": 2, "delay": 1, "outer_lr": 0.7}}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class StreamingDiLoCo(Method):
    """A round is `local.steps` steps and the synchronization of one of F fragments, so that H = F local.steps.

    Round t: at its start the last fragment's step is under way, and lands after `delay` steps; at its end fragment
    t mod F leaves. Clients keep their own weights and the ones last synchronized, and are told steps alone.
    """

    card = Card(
        title="Streaming DiLoCo with overlapping communication",
        paper="Douillard et al., Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch, "
              "2025, arXiv 2501.18512",
        topic="pre-training",
        sends="down: the last fragment's step in few bits (at first, or after a missed round, all trainables); up: the "
              "next fragment's change in few bits, the training loss",
        needs="any model and space whose layers F divides, and rounds that F divides; local.steps H / F; clients that "
              "come every round and keep twice the trainables; not dp, secagg, he, codec or robust layers (bits: 32: "
              "those too)",
        claim=Claim("with two fragments of 4 bits, each a step late, it ends no more than 0.03 above DiLoCo on the "
                    "same steps, each at its best inner rate", rig="tiny_lm", metric="fall", baseline="diloco",
                    relative="difference", holds=">=", threshold=-0.03, options=STREAM, grid=RATES,
                    against={"local": {"optimizer": "adamw", "steps": 12}, "rounds": 10},
                    unequal="20 rounds of 6 steps with a fragment each are 10 rounds of 12 steps with the whole model"),
        also={"peak": Claim("a client's largest message up is at most 0.08 of DiLoCo's (half the model, 4 bits of 32)",
                            rig="wire", metric="peak_up", baseline="diloco", relative="ratio", holds="<=",
                            threshold=0.08, kind="exact", options={"knobs": {"fragments": 2}}, seeds=3),
              "bytes": Claim("up and down together a cycle takes at most 0.15 of DiLoCo's bytes", rig="wire",
                             metric="cycle", baseline="diloco", relative="ratio", holds="<=", threshold=0.15,
                             kind="exact", options={"knobs": {"fragments": 2}}, seeds=3)},
        evidence="torchft's names and rules from a dossier. Integers of 4 bits with a scale for 128 values stand for "
                 "the paper's 4-bit floats (E3M0); what the server sends is coarse too, and what its rounding left out "
                 "goes with the fragment's next step.",
    )
    trial = Trial({"fragments": 2, "delay": 1, "alpha": 0.25}, local={"steps": 3, "optimizer": "adamw", "lr": 0.01},
                  far={"rounds": 4}, rounding="rounds changes to 4 bits, where a last bit may decide")
    fragments: int = knob(2, "F, parts of the model that go one a round", ge=1)
    delay: int = knob(0, "tau, local steps that a fragment's step is under way; less than local.steps", ge=0)
    alpha: float = knob(0.0, "share of the client's own weights that stay where a step lands", ge=0, le=1)
    bits: int = knob(4, "bits of a number, up and down; 32: as they are", options=(4, 8, WHOLE))
    outer_lr: float = knob(0.4, "the server's rate", gt=0)
    outer_momentum: float = knob(0.9, "of the server's SGD with Nesterov's look ahead, a buffer a fragment", ge=0, lt=1)

    def check_layers(self, layers):
        if self.bits != WHOLE:
            refuse_codes(self, layers, "method.bits: 32, or method diloco")

    def check_work(self, local, rounds):
        check_windows("streaming_diloco", local, rounds, self.fragments, self.delay)

    def init(self, model) -> State:
        theta = model.initial()
        fragments(theta, self.fragments)
        # theta: what every client knows; goal: where the outer optimizer is, which no rounding has touched
        return {"theta": theta, "goal": dict(theta), "b": zeros_like(theta), "version": 0, "holds": {}, "step": {}}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        v, parts = state["version"], fragments(state["theta"], self.fragments)
        now = parts[v % self.fragments]
        told = {c.id: pack(version=v, **({"step": state["step"]} if behind(state, c.id) else
                                         {"theta": state["theta"]})) for c in clients}
        like = cut(state["theta"], now)
        out = yield Ask(self.local, told, reduce=MeanOfCoarse("uniform", like, self.bits))
        g, b = part(out.value, "delta"), cut(state["b"], now)
        b = add(scale(b, self.outer_momentum), g)  # b_p <- mu b_p + Delta_p
        goal = add(cut(state["goal"], now), add(g, b, self.outer_momentum), -self.outer_lr)
        step = goal if self.bits == WHOLE else coarse(sub(goal, like), self.bits)
        theta = goal if self.bits == WHOLE else add(like, fine(step["codes"], step["scales"], like, self.bits))
        return {"theta": state["theta"] | theta, "goal": state["goal"] | goal, "b": state["b"] | b, "step": step,
                **counted(state, list(told), out.answered)}

    @on_client(gives="codes?: whole, scales?: tensor, delta?: tensors, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        v, whole = msg["version"], part(msg, "theta")
        if whole:
            now = known = whole
            landing: list[str] = []
        else:
            mine = held(client, v)
            parts = fragments(mine["known"], self.fragments)
            now, landing = mine["now"], parts[(v - 1) % self.fragments]
            known = mine["known"] | self.landed(part(msg, "step"), cut(mine["known"], landing))
        fitted, early = None, self.delay if landing else 0
        if early:
            fitted = client.fit(now, steps=early, moments=client.memory.get("inner"))
            now = fitted.theta
        if landing:  # theta_p <- (1 - alpha) theta_p' + alpha theta_p of its own
            now = now | add(scale(cut(known, landing), 1 - self.alpha), cut(now, landing), self.alpha)
        last = client.fit(now, steps=client.training.count(client.n) - early,
                          moments=fitted.moments if fitted else client.memory.get("inner"))
        client.memory["inner"] = last.moments
        client.memory["held"] = {"version": v, "known": known, "now": last.theta}
        leaving = fragments(known, self.fragments)[v % self.fragments]
        delta = sub(cut(known, leaving), cut(last.theta, leaving))  # Delta_p = theta_p as synchronized - theta_p
        return pack(loss=last.loss, **({"delta": delta} if self.bits == WHOLE else coarse(delta, self.bits)))

    def landed(self, step: Payload, like: Tree) -> Tree:
        """Where a fragment stands after the server's step."""
        return dict(step) if self.bits == WHOLE else add(like, fine(step["codes"], step["scales"], like, self.bits))
