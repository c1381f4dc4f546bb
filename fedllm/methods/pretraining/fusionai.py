"""FusionAI: a model in pieces on machines that come and go, with a broker that schedules them and replaces the lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program
from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import add, pack, part
from fedllm.methods._pieces import Machine, Plan, costed, even, operations, ops_of, partition
from fedllm.methods._pipeline import Passing, Pipeline, told_of
from fedllm.models.segments import segments

KILLED = {"kill": (1, 5)}
EXACT: Any = {"rig": "pieces", "holds": "<=", "kind": "exact", "seeds": 3}
MOST = 1024  # micro-batches of a step


@dataclass(frozen=True)
class FusionAI(Pipeline):
    """A round is a step on a lot of public rows: `local.accumulate` micro-batches pass the pieces, forward and back.

    The broker relays and so keeps what crossed until the step counts: whoever takes a lost machine's piece over is told
    it, does the same again, and nothing of the step changes.
    """

    card = Card(
        title="FusionAI: training over consumer machines",
        paper="Tang et al., FusionAI: Decentralized Training and Deploying LLMs with Massive Consumer-Level GPUs, "
              "2023, arXiv 2309.01172",
        topic="pre-training",
        sends="down: token ids (first piece) and labels (last) of public rows, states and their gradients; to who is "
              "new its piece and the optimizer's state; up: states, gradients, each step the new piece and its state",
        needs="a language model, a space within its modules; public rows at the server; two machines more than "
              "backups; no clip_norm; no layer that hides or changes single answers",
        claim=Claim("on four machines whose speeds differ four times a step of the scheduled pieces takes at most "
                    "0.8 of the virtual time of pieces of equal counts", rig="pieces", metric="seconds",
                    baseline="fusionai", relative="ratio", holds="<=", threshold=0.8,
                    against={"knobs": {"schedule": "even"}}, unseen=5000),
        also={"whole": Claim("after three steps its weights are those of one process (largest relative difference)",
                             metric="off_whole", **EXACT, threshold=1e-6, unseen=5000),
              "killed": Claim("also where a machine is lost in the midst of the second step",
                              metric="off_whole", **EXACT, threshold=1e-6, unseen=5000, options=KILLED),
              "resent": Claim("and what is sent again is at most the piece with its optimizer's state and the step's "
                              "states and gradients", metric="resent", **EXACT, threshold=1.0, options=KILLED)},
        evidence="A dossier; no code was released. Tests send whole models: turn evaluate.clients off where none holds "
                 "one. The schedule takes 0.88 of equal counts' time here, not 0.8: micro-batches wait for each other.",
    )
    trial = Trial({"pieces": 2, "backups": 1}, {"name": "full"}, {"batch_size": 2, "accumulate": 2, "lr": 0.05},
                  silent="machines hold the pieces, and a spare one holds none")
    only_fits = False
    pieces: int | None = knob(None, "pieces at the most; None: as many as there are machines", ge=2)
    backups: int = knob(1, "machines that hold none, for who is lost", ge=0)
    hysteresis: float = knob(0.1, "share of a step's time that another schedule must save to be taken", ge=0, lt=1)
    schedule: Literal["quickest", "even"] = knob("quickest", "the slowest piece as quick as can be, or equal counts of "
                                                 "operations", options=("quickest", "even"))
    step_seconds: float = knob(1.0, "seconds of a micro-batch, forward and back through the whole model, at speed 1: "
                               "what a schedule weighs against lines", gt=0)
    repeats = property(lambda self: MOST)  # a machine is asked once for each micro-batch

    def public_at(self):
        return ("server",)

    def check(self, model: Any) -> None:
        segments(model, [0])
        if model.space.draws:
            raise CompositionError("space.dropout is drawn for a whole model, and machines of fusionai hold pieces; "
                                   "leave it out")

    def check_clients(self, ids, cohort):
        if cohort < 2 + self.backups:
            raise RecipeError(f"method.backups = {self.backups} is not allowed with {cohort} clients a round (of "
                              f"{len(ids)}): two machines hold pieces at least; allowed is {max(0, cohort - 2)} or "
                              "less, with two clients or more")

    def check_work(self, local, rounds):
        odd = {"clip_norm": local.clip_norm is not None, "packing": local.packing, "neftune": local.neftune is not None,
               "warmup": local.warmup > 0, "over_rounds": local.over_rounds.endswith("_steps")}
        if bad := next((k for k, is_odd in odd.items() if is_odd), None):
            raise RecipeError(f"local.{bad} = {getattr(local, bad)} is not allowed: a round of fusionai is one "
                              "step, of which no machine sees the whole; leave it out")
        if local.accumulate > MOST:
            raise RecipeError(f"local.accumulate = {local.accumulate} is not allowed; a step of fusionai has {MOST} "
                              "micro-batches at the most")

    def check_layers(self, layers):
        for layer in layers:
            if layer.algebra.kind in ("dp", "secagg", "he", "robust", "codec"):
                raise CompositionError(f"layer '{name_of(layer)}' changes or hides single answers, and method "
                                       "'fusionai' needs each as it is; leave it out")

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "moments": {}, "ops": operations(model), "plan": {}, "version": 0,
                "holds": {}, "lost": {}, "resent": 0}

    def planned(self, state: Any, clients: Sequence[ClientInfo], masks: Mapping[str, Tensor]) -> Plan:
        """Who holds what: as before, unless somebody is gone or another schedule is quicker by the hysteresis."""
        kinds = {k.partition("/")[0] for k in state["moments"] if k != "step"} if state["version"] else {"m", "v"}
        ops = ops_of(state["ops"], max(m.numel() for m in masks.values()), len(kinds))
        sound = [c for c in clients if c.id not in state["lost"]]
        some = sound if len(sound) >= 2 + self.backups else clients
        machines = {c.id: Machine(c.id, c.profile.speed / self.step_seconds, c.profile.memory_bytes,
                                  c.profile.latency, c.profile.bandwidth) for c in some}
        most = min(self.pieces or len(some), max(2, len(some) - self.backups))
        if self.schedule == "even":
            return even(ops, list(machines.values()), len(masks), most)
        plan = partition(ops, list(machines.values()), len(masks), most)
        if not state["plan"] or not set(state["plan"]["machines"]) <= machines.keys():
            return plan
        old = costed(ops, machines, len(masks), state["plan"]["machines"], state["plan"]["cuts"])
        return old if plan.total(len(masks)) > (1 - self.hysteresis) * old.total(len(masks)) else plan

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        [drawn] = (yield Ask(self.draw, {SERVER: {}}, quorum=1)).values()
        v, theta, moments = state["version"], dict(state["theta"]), dict(state["moments"])
        plan = self.planned(state, clients, part(drawn, "mask"))
        names, bare, whole = told_of(state, plan.cuts)
        last = len(names) - 1
        kept = [state["holds"].get(c) == [*plan.cuts, p] for p, c in enumerate(plan.machines)]
        spare = sorted((c.id for c in clients if c.id not in plan.machines), key=lambda c: state["lost"].get(c, 0))
        run = Passing(list(plan.machines), spare, [b if k else w for k, b, w in zip(kept, bare, whole, strict=True)],
                      whole, part(drawn, "mask"), part(drawn, "labels"), part(drawn, "count"))
        run.x[0] = part(drawn, "ids")
        yield from self.through(run)
        total, targets = {}, max(1.0, sum(run.counts.values()))
        if tied := sorted(names[0] & names[last]):  # each end has a part of their gradient
            ends = yield from self.reach(run, {p: (self.tied, {"names": tied}) for p in (0, last)},
                                         {p: {n: theta[n] for n in tied} for p in (0, last)})
            total = add(part(ends[0], "slopes"), part(ends[last], "slopes"))
        done = yield from self.reach(
            run, {p: (self.step, pack(slopes=total if p in (0, last) else {}, total=targets)) for p in range(last + 1)},
            {p: {n: theta[n] for n in mine} for p, mine in enumerate(names)})
        for said in done.values():
            theta |= part(said, "theta")
            moments |= {**part(said, "moments"), "step": torch.tensor(v + 1)}
        lost = {**state["lost"], **{c: state["lost"].get(c, 0) + 1 for c in run.lost}}
        return {**state, "theta": theta, "moments": moments, "version": v + 1, "lost": lost,
                "resent": state["resent"] + run.resent, "plan": {"machines": run.holders, "cuts": list(plan.cuts)},
                "holds": {c: [*plan.cuts, p] for p, c in enumerate(run.holders)}}

    def report(self, state: State):
        return {"plan": dict(state["plan"]), "machines_lost": dict(state["lost"]), "bytes_sent_again": state["resent"]}
