"""Send a tiny data set in the place of an update: inputs on which a few steps lead where the client's training did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, pack, part, sub
from fedllm.core.rng import seed_of
from fedllm.local.unrolled import replayed, told_by_inputs

SMALL = {"rig": "tiny_uploads", "kind": "level"}


@dataclass(frozen=True)
class FedSynthUpload(Method):
    """Up go M texts as embeddings, their soft labels and a step size; the server takes the same `inner_steps` from the
    same weights, for each client, and averages where they end.

    The inputs are fitted to the update, not to rows; that is no promise about rows.
    """

    card = Card(
        title="Federated learning via synthetic data",
        paper="Goetz, Tewari, Federated Learning via Synthetic Data, 2020, arXiv 2008.04489",
        topic="LLMs for federated learning: synthesis",
        sends="down: theta; up: n_syn texts of `length` embeddings, as many rows of label logits, a step size",
        needs="a classification model that reads embeddings; a server that replays each client's steps",
        claim=Claim("with 8 inputs the replayed change has a cosine of at least 0.85 to the client's own",
                    metric="cosine", holds=">=", threshold=0.85, **SMALL),
        also={"bytes": Claim("they are sent in less than 0.3 of the update's bytes", metric="bytes_share", holds="<=",
                             threshold=0.3, **{**SMALL, "kind": "exact"}),
              "replay": Claim("the server's replay ends where the client's did (the largest difference)",
                              metric="replay_gap", holds="<=", threshold=1e-6, **{**SMALL, "kind": "exact"}),
              "accuracy": Claim("after three rounds it is at most 5 points less accurate than FedAvg",
                                baseline="fedavg", rig="tiny_uploads", metric="accuracy", relative="difference",
                                holds=">=", threshold=-0.05, options={"rounds": 3}),
              "apart": Claim("of the inputs at least 95 % are further from any row than rows are from each other (the "
                             "median, of mean embeddings)", metric="apart", holds=">=", threshold=0.95, **SMALL)},
        evidence="Written from a dossier. The update is matched; the paper's other goal, the loss of the end on real "
                 "rows, is not here. Second derivatives need the plain kernel of attention.",
    )
    trial = Trial({"n_syn": 1, "length": 2, "inner_steps": 1, "outer_steps": 1}, task="classification",
                  rounding="a descent through a descent")
    only_fits = False
    n_syn: int = knob(8, "synthetic texts", ge=1, le=4096)
    length: int = knob(8, "embeddings of each", ge=1)
    inner_steps: int = knob(3, "steps that a replay takes", ge=1, le=20)
    outer_steps: int = knob(80, "steps in which the texts are fitted", ge=1)
    lr: float = knob(5e-2, "Adam's rate for the texts", gt=0)

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'fed_synth_upload' replays steps on soft labels and data.task is "
                                   f"{model.task!r}, so they do not fit together; data.task = 'classification' works")

    def round(self, state: State, clients: Any) -> Program:
        w = state["theta"]
        out = yield Ask(self.local, {c.id: pack(theta=w) for c in clients})
        told = list(out.values())
        packed = {f"{key}/{i}": r[key] for i, r in enumerate(told) for key in ("x", "y", "a")}
        end = yield Ask(self.replay, {SERVER: {**pack(theta=w), **packed, "n": [float(r["n"]) for r in told]}})
        return {**state, "theta": part(end[SERVER], "theta")}

    def fits(self, msg: Payload, reply: Payload) -> None:
        x, y, a = (reply[k] for k in ("x", "y", "a"))
        need(x.dim() == 3 and tuple(x.shape[:2]) == (self.n_syn, self.length), f"'x' has shape {tuple(x.shape)}")
        need(y.dim() == 2 and len(y) == self.n_syn, f"'y' has shape {tuple(y.shape)}")
        need(a.numel() == 1 and float(a) < 5, f"'a' = {a!r:.40} is no logarithm of a step size")

    @on_client(gives="x: tensor, y: tensor, a: tensor, n: rows, loss?: number, cosine: number", fits=fits)
    def local(self, msg: Payload, client: Any) -> Payload:
        w = part(msg, "theta")
        fitted = client.fit(w)
        shape = (self.n_syn, self.length, client.model.net.get_input_embeddings().weight.shape[1])
        draw = torch.Generator().manual_seed(seed_of(int(client.rng("inputs").integers(2**31)), "inputs"))
        tokens = self.n_syn * self.length * self.inner_steps * self.outer_steps
        client.book(tokens=2 * tokens, steps=2.0 * self.inner_steps * self.outer_steps)
        x, y, a, near = told_by_inputs(client.model, w, sub(fitted.theta, w), shape, len(client.model.labels),
                                       self.inner_steps, self.outer_steps, self.lr, draw)
        return {"x": x, "y": y, "a": a, "n": float(client.n), "loss": fitted.loss, "cosine": near}

    @on_server
    def replay(self, msg: Payload, client: Any) -> Payload:
        w = part(msg, "theta")
        total, mean = sum(msg["n"]), {n: torch.zeros_like(t) for n, t in w.items()}
        x, y, a = (part(msg, k) for k in ("x", "y", "a"))
        for i, n in enumerate(msg["n"]):
            end = replayed(client.model, w, x[str(i)], y[str(i)], a[str(i)], self.inner_steps)
            mean = {k: m + n / total * (end[k] - w[k]) for k, m in mean.items()}
        return pack(theta={k: t + mean[k] for k, t in w.items()})
