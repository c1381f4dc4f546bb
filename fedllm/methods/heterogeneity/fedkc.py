"""FedKC: clients tell means of clusters of their documents, and agree with what others say near their own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.form import aligned, need, shaped
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.local.objectives.composed import Composed
from fedllm.models.batch import Batch
from fedllm.models.model import Model

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}
CODES = {"shift": 0.5, "rows": 120}


def seen(model: Model, batch: Batch) -> torch.Tensor:
    """For `client.measure`: a row's pooled state and its class logits [N, d + C]."""
    r = model.net.pool(model.hidden(batch), batch.mask)
    return torch.cat([r, model.net.classifier(r).to(r)], 1)


@dataclass(frozen=True)
class FedKC(Star):
    """FedAvg, and before it an exchange: centroids of pooled states with the mean prediction of their rows."""

    card = Card(
        title="FedKC: federated knowledge composition",
        paper="Wang et al., FedKC: Federated Knowledge Composition for Multilingual Natural Language Understanding, "
              "WWW 2022",
        topic="heterogeneity",
        sends="as FedAvg; beside it up: `n_clusters` centroids (d numbers), what is predicted there (C) and how many "
              "rows each stands for; down: all other clients'",
        needs="task classification on an encoder whose pooled states all share",
        claim=Claim("what clients have learned apart disagrees less than after FedAvg's local training, on the same "
                    "steps", rig="disagreement", metric="divergence", baseline="fedavg", relative="difference",
                    holds="<", threshold=0.0, options=CODES),
        also={"accuracy": Claim("and costs at most one point of the clients' accuracy", rig="shift", metric="accuracy",
                                baseline="fedavg", relative="difference", holds=">=", threshold=-0.01, options=CODES,
                                grid=LR)},
        evidence="Abstract; the consistency term is the dossier's reading of `similar predictions on similar data`. "
                 "Clusters of fewer than `least` rows are never sent: a singleton's centroid is the document.",
    )
    only_fits = False
    trial = Trial({"n_clusters": 2, "least": 2}, task="classification",
                  rounding="a row on the edge of two clusters may fall into either")

    n_clusters: int = knob(10, "M: clusters of a client's rows, at the most one for each `least` rows", ge=1)
    least: int = knob(5, "rows of a cluster below which it is not sent", ge=2)
    lambda_cons: float = knob(1.0, "weight of the agreement; 0: FedAvg", ge=0)
    neighbors: int = knob(5, "q: centroids of others that a row's target is composed of", ge=1)
    tau: float = knob(1.0, "how fast a centroid's part falls with its squared distance", gt=0)

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'fedkc' and data.task = {model.task!r} do not fit together: it composes "
                                   "class predictions; use data.task = 'classification'")

    def init(self, model: Any) -> State:
        self.check(model)
        return {**super().init(model), "wide": [model.net.classifier.in_features, len(model.labels)]}

    def round(self, state: State, clients) -> Program:
        told = {c.id: self.down(state, c) for c in clients}
        if self.lambda_cons:
            out = yield Ask(self.tell, {c: {**msg, "wide": state["wide"]} for c, msg in told.items()})
            pool = {c: [torch.cat([out[o][k] for o in out if o != c]) for k in "cy"] for c in told if set(out) - {c}}
            told = {c: {**msg, **(dict(zip("cy", pool[c], strict=True)) if c in pool and len(pool[c][0]) else {})}
                    for c, msg in told.items()}
        return self.merge(state, (yield Ask(self.local, told)))

    def fits(self, msg: Any, reply: Any) -> None:
        aligned(reply, ["c", "y", "count"])
        for name, size in zip("cy", msg["wide"], strict=True):
            shaped(name, reply[name], (None, size))
        need(all(x >= self.least for x in reply["count"]), f"'count' holds a cluster of fewer than {self.least} rows")

    @on_client(gives="c: tensor, y: tensor, count: numbers", fits=fits)
    def tell(self, msg, client):
        """Centroids [m, d], mean predictions [m, C] and rows of the clusters that are large enough."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        h, p = self.states(msg, client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
            found = KMeans(max(1, min(self.n_clusters, len(h) // self.least)), n_init=1,
                           random_state=int(client.rng("fedkc").integers(2**31))).fit_predict(h)
        kept = [at for g in np.unique(found) if len(at := np.flatnonzero(found == g)) >= self.least]
        means = [torch.tensor(np.array([x[at].mean(0) for at in kept]).reshape(-1, x.shape[1])) for x in (h, p)]
        return {"c": means[0], "y": means[1], "count": [len(at) for at in kept]}

    def states(self, msg: Any, client: Any) -> tuple[np.ndarray, np.ndarray]:
        """Pooled states [n, d] and predictions [n, C] of the client's rows, by the model as it came."""
        x = client.measure(part(msg, "theta"), client.tokens, seen).astype(np.float64)
        c = len(client.model.labels)
        return x[:, :-c], softmax(x[:, -c:], axis=1)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        if not len(msg.get("c", ())):  # nobody else has told anything
            fitted = client.fit(theta)
        else:
            target = self.composed(self.states(msg, client)[0], msg["c"].numpy(), msg["y"].numpy())
            fitted = client.fit(theta, objective=Composed(self.lambda_cons), side={"target": list(target)})
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def composed(self, h: np.ndarray, c: np.ndarray, y: np.ndarray) -> np.ndarray:
        """t_i = sum_j w_ij y_j over the q nearest centroids, w_ij = softmax_j(-||h_i - c_j||^2 / tau): [n, C]."""
        far = ((h[:, None] - c[None]) ** 2).sum(-1)
        at = np.argsort(far, 1, kind="stable")[:, : self.neighbors]
        return (softmax(-np.take_along_axis(far, at, 1) / self.tau, axis=1)[..., None] * y[at]).sum(1)

    def merge(self, state: State, out: Replies) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}
