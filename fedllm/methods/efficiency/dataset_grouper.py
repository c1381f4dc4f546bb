"""Dataset Grouper's training recipe: FedAvg or FedSGD over a stream of groups, with Adam at the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Tree, add, pack, part, scale, sub, tree_map, zeros_like
from fedllm.core.reduce import Mean


@dataclass(frozen=True)
class DatasetGrouper(Star):
    """Every client takes the same number tau of steps (or of gradients at one point) on its group's rows."""

    card = Card(
        title="Dataset Grouper: group-structured data pipelines, FedAvg and FedSGD on groups",
        paper="Charles et al., Towards Federated Foundation Models: Scalable Dataset Pipelines for Group-Structured "
              "Learning, NeurIPS 2023 Datasets and Benchmarks, arXiv 2307.09619",
        topic="training efficiency",
        sends="down: the trainables; up: a pseudo-gradient of their size and the training loss",
        needs="any model and space; local.steps = tau; plain SGD at clients; best with data.source = grouped:FOLDER",
        claim=Claim("after one local epoch on each new group FedAvg's model has a lower loss there than FedSGD's, on "
                    "the same rows, batches and bytes", rig="groups", metric="tuned_loss", baseline="dataset_grouper",
                    relative="difference", holds="<", threshold=0.0, wins=4,
                    options={"knobs": {"algorithm": "fedavg"}}),
        also={"before": Claim("before that epoch FedSGD's has the lower loss", rig="groups", metric="loss",
                              baseline="dataset_grouper", relative="difference", holds=">", threshold=0.0, wins=4,
                              options={"knobs": {"algorithm": "fedavg"}})},
        evidence="The pipeline is `fedllm group` (data/grouper.py, grouped.py). Clients weigh alike, as in the "
                 "authors' code; the bias-corrected Adam is optax's.",
    )
    algorithm: Literal["fedavg", "fedsgd"] = knob("fedsgd", "tau steps, or the mean of tau gradients at one point",
                                                  options=("fedavg", "fedsgd"))
    server_lr: float = knob(1e-3, "eta_s of Adam", gt=0)
    beta1: float = knob(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = knob(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = knob(1e-8, "added to sqrt(v)", gt=0)
    tune_steps: int = knob(0, "steps that a client takes on its own rows before it is tested", ge=0)

    @property
    def only_fits(self) -> bool:  # type: ignore[override]
        """The gradients at one point are taken over rows that it reads itself."""
        return self.algorithm == "fedavg"

    def init(self, model) -> State:
        theta = model.initial()
        return {"theta": theta, "m": zeros_like(theta), "v": zeros_like(theta), "t": 0}

    @on_client(reduce=Mean("uniform"), gives="gradient: tree, loss?: number")
    def local(self, msg, client):
        theta, tau = part(msg, "theta"), client.training.count(client.n)
        if self.algorithm == "fedavg":
            fitted = client.fit(theta, steps=tau)
            return pack(gradient=sub(theta, fitted.theta), loss=fitted.loss)
        gradient: Tree = zeros_like(theta)
        losses, rows = [], client.data
        for batch in client.batches(tau):  # the very batches that `fit` would take
            fitted = client.fit(theta, steps=1, on=[rows[i] for i in batch])
            gradient = add(gradient, sub(theta, fitted.theta), 1 / tau)
            losses.append(fitted.loss)
        # tau times as long, so that both algorithms give Adam gradients of one size
        return pack(gradient=scale(gradient, tau), loss=sum(losses) / tau)

    def merge(self, state: State, out) -> State:
        g, t = part(out.value, "gradient"), state["t"] + 1  # g = mean_k (w - w_k), or tau eta mean_k mean_i g_ki
        m = tree_map(lambda m, g: self.beta1 * m + (1 - self.beta1) * g, state["m"], g)
        v = tree_map(lambda v, g: self.beta2 * v + (1 - self.beta2) * g * g, state["v"], g)
        a, b = 1 - self.beta1**t, 1 - self.beta2**t
        theta = tree_map(lambda x, m, v: x - self.server_lr * (m / a) / ((v / b).sqrt() + self.eps),
                         state["theta"], m, v)
        return {**state, "theta": theta, "m": m, "v": v, "t": t}

    def evaluate(self, state: State, clients, on: str):
        if not self.tune_steps:
            return (yield from super().evaluate(state, clients, on))
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on, tune=self.tune_steps) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        theta = part(msg, "theta")
        if msg.get("tune") and client.n:  # the server has no rows of its own to tune on
            theta = client.fit(theta, steps=msg["tune"]).theta
        return client.score(theta, base=part(msg, "base") or None, on=msg["on"])
