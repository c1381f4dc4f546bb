"""MetePFL: one transformer learned by filling in, then prompts alone, which a graph of clients smooths for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, Withheld
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.core.reduce import Mean
from fedllm.local.objectives.impute import Impute, spans
from fedllm.local.terms import Proximal
from fedllm.methods._similar import similarity, smoothed
from fedllm.models.series import ENCODER, PROMPT


@dataclass(frozen=True)
class MetePFL(Method):
    """First the encoder (FedAvg of masked imputation), then own prompts P_i, pulled to p_i* and to the global one."""

    card = Card(
        title="MetePFL: prompt federated learning for weather forecasting",
        paper="Chen, Long, Shen, Jiang, Prompt Federated Learning for Weather Forecasting, IJCAI 2023, "
              "arXiv 2301.09152",
        topic="prompt learning: applications",
        sends="first the encoder's weights either way; then up a client's prompts and head, H (V + 4) numbers, and "
              "down its own smoothed ones and the global ones",
        needs="data.task: forecast, model.name: series, space full",
        claim=Claim("twelve stations of three climates: prompts smoothed over the graph of similar prompts err less "
                    "(MAE) than one mean prompt for all", rig="stations", metric="mae", baseline="metepfl",
                    relative="ratio", holds="<", threshold=1.0,
                    against={"knobs": {"graph": "mean", "self_weight": 0.0}}),
        also={
            "alone": Claim("and less than prompts that each station trains alone", rig="stations", metric="mae",
                           baseline="metepfl", relative="ratio", holds="<", threshold=1.0,
                           against={"knobs": {"graph": "none", "pull_own": 0.0, "pull_shared": 0.0}}),
            "persistence": Claim("it errs less than persistence", rig="stations", metric="over_persistence",
                                 holds="<", threshold=1.0),
            "linear_ar": Claim("a linear AR that each station fits to its own past errs less still: what lasts at "
                               "these stations is an AR(2)", rig="stations", metric="over_linear_ar", holds=">",
                               threshold=1.0),
            "bytes": Claim("a round of prompts sends less than 1/100 of what a round of an encoder of width 128 and "
                           "depth 4 does", rig="stations_bytes", metric="of_encoder", holds="<", threshold=0.01,
                           kind="exact")},
        evidence="Authors' code read by the dossier: there no gradient reaches a prompt (predictions pass through "
                 "numpy), so the equations are followed. The graph is a softmax of -d/median of the distances of "
                 "prompts, where theirs is learned; the spatial stage makes one pass for the target; the head mixes "
                 "the forecast with the last value, step by step.",
    )
    trial = Trial({"pretrain_rounds": 1}, {"name": "full"}, task="forecast")
    only_fits = False

    pretrain_rounds: int = knob(20, "rounds of masked imputation, before which no prompt is trained", ge=1)
    pull_own: float = knob(0.1, "1/lambda, pull of the squared distance to the client's smoothed prompts", ge=0)
    pull_shared: float = knob(0.1, "1/tau, pull of the squared distance to the global prompts", ge=0)
    graph: Literal["similarity", "mean", "none"] = knob(
        "similarity", "A: softmax of -d_ij / median d between prompts; 1/N everywhere; or the identity",
        options=("similarity", "mean", "none"))
    sharpness: float = knob(4.0, "how much more near prompts count (graph similarity)", gt=0)
    hops: int = knob(2, "times that A is applied after the first", ge=0)
    self_weight: float = knob(0.2, "share of a client's own prompts in its smoothed ones", ge=0, le=1)
    mask_ratio: float = knob(0.15, "share of readings that are masked", gt=0, lt=1)
    mask_length: float = knob(3.0, "mean length of a mask, in steps", ge=1)

    def check(self, model: Any) -> None:
        names = set(model.initial()) if model.task == "forecast" else set()
        if not {n.split(".")[0] for n in names} >= {"encoder", "prompt"}:
            raise CompositionError(f"method 'metepfl' trains the encoder and the prompts of a forecaster, which "
                                   f"data.task = {model.task!r} with space '{model.space.stem}' has not; use "
                                   "data.task = 'forecast', model.name = 'series', space = 'full'")

    def init(self, model: Any) -> State:
        theta = model.initial()
        return {"round": 0, "own": {}, "holds": [], **{
            name: {n: t for n, t in theta.items() if n.startswith(head)}
            for name, head in (("encoder", ENCODER), ("prompt", PROMPT))}}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return {**state["encoder"], **state["prompt"]}, None

    def round(self, state: State, clients: Any) -> Program:
        if state["round"] < self.pretrain_rounds:
            out = yield Ask(self.fill, {c.id: pack(encoder=state["encoder"], prompt=state["prompt"]) for c in clients})
            return {**state, "round": state["round"] + 1, "encoder": part(out.value, "encoder")}
        told = {c.id: pack(own=state["own"].get(c.id, state["prompt"]), shared=state["prompt"],
                           encoder=None if c.id in state["holds"] else state["encoder"]) for c in clients}
        out = yield Ask(self.learn, told)
        got = {c: part(out[c], "prompt") for c in out}
        own = dict(zip(got, smoothed(list(got.values()), self.weights, self.hops, self.self_weight), strict=True))
        mean = {n: torch.stack([p[n] for p in own.values()]).mean(0) for n in state["prompt"]} if own else {}
        return {**state, "round": state["round"] + 1, "own": {**state["own"], **own}, "prompt": mean or state["prompt"],
                "holds": sorted({*state["holds"]} - {c.id for c in clients} | {*got})}

    def weights(self, flat: Tensor) -> Tensor:
        """A [N, N] of flat prompts [N, D], whose rows sum to 1."""
        if self.graph == "similarity":
            return similarity(flat, self.sharpness)
        n = len(flat)
        return (torch.eye(n) if self.graph == "none" else torch.full((n, n), 1 / n)).to(flat)

    @on_client(reduce=Mean(), gives="encoder: some, n: rows, loss?: number")
    def fill(self, msg: Payload, client: Client) -> Payload:
        rng, rows = client.rng("metepfl"), client.tokens
        steps, variables = len(rows[0].ids), rows[0].parts["past"].shape[1]
        masks = list(spans(rng, len(rows), steps, variables, self.mask_ratio, self.mask_length))
        fitted = client.fit({**part(msg, "encoder"), **part(msg, "prompt")}, objective=Impute(), side={"mask": masks},
                            freeze=(f"{PROMPT}*",))
        return pack(encoder={n: t for n, t in fitted.theta.items() if n.startswith(ENCODER)}, n=client.n,
                    loss=fitted.loss)

    @on_client(gives="prompt: some, n: rows, loss?: number")
    def learn(self, msg: Payload, client: Client) -> Payload:
        """MSE + 1/lambda |P - p*|^2 + 1/tau |P - p|^2, over the prompts alone."""
        own, shared = part(msg, "own"), part(msg, "shared")
        if encoder := part(msg, "encoder"):
            client.memory["encoder"] = encoder
        if "encoder" not in client.memory:
            raise Withheld("it lost the encoder that it was told; it is told it again in the next round that asks it")
        pulls = [Proximal(2 * w, p) for w, p in ((self.pull_own, own), (self.pull_shared, shared)) if w]
        fitted = client.fit({**client.memory["encoder"], **own}, terms=pulls, freeze=(f"{ENCODER}*",))
        return pack(prompt={n: t for n, t in fitted.theta.items() if n.startswith(PROMPT)}, n=client.n,
                    loss=fitted.loss)

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        """Each client by its own smoothed prompts; the server by the global ones."""
        return (yield Ask(self.score, {c.id: pack(theta={
            **state["encoder"], **state["own"].get(c.id, state["prompt"])}, on=on) for c in clients}))
