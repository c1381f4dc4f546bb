"""FELLRec: a recommender for each client, which leans on those of similar clients, the less the harder it has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, sub
from fedllm.methods._similar import flat, unflat

MOST = 1e4
"""No mean cross-entropy is larger."""


@dataclass(frozen=True)
class FELLRec(Method):
    """theta_i <- sum_j s_ij theta_j / sum_j s_ij, with s_ij = a_i (1 + cos(u_i, u_j)) / 2 for others, s_ii = 1."""

    card = Card(
        title="FELLRec: federated LLM-based recommendation",
        paper="Zhao et al., LLM-based Federated Recommendation, arXiv 2402.09959",
        topic="prompt learning: applications",
        sends="the trainables either way, and up the training loss; each client is told a model of its own",
        needs="any model and space; clients that are groups of users (data.partition by_cluster or by_key)",
        claim=Claim("segments of a shop's users: the mean over segments of NDCG@10 is not below FedAvg's on the same "
                    "adapters", rig="segments", metric="ndcg10", baseline="fedavg", relative="difference", holds=">=",
                    threshold=0.0, grid={"lr": (3e-3, 1e-2)}),
        also={"worst": Claim("and neither is that of the segment with the lowest", rig="segments",
                             metric="worst_ndcg10", baseline="fedavg", relative="difference", holds=">=", threshold=0.0,
                             grid={"lr": (3e-3, 1e-2)}),
              "alone": Claim("it ranks better than adapters that each segment trains alone", rig="segments",
                             metric="ndcg10", baseline="local_only", relative="difference", holds=">", threshold=0.0,
                             grid={"lr": (3e-3, 1e-2)}),
              "item_knn": Claim("and better than item-kNN of all segments' users", rig="segments",
                                metric="over_item_knn", holds=">", threshold=0.0)},
        evidence="Authors' code read by the dossier: it writes into what it still reads, so that order counts; here "
                 "all are mixed at once. Cosines are of updates, since A's random start is common to all. Clients "
                 "hold the whole model: the middle at the server is `fedbert_split`'s matter.",
    )
    trial = Trial()

    alpha: float = knob(0.7, "how much others count at all", gt=0)
    beta: float = knob(1.0, "the larger, the more others count in the first rounds", gt=0)
    loss_temperature: float = knob(0.05, "of the softmax that says who has it hard", gt=0)

    def init(self, model) -> State:
        theta = model.initial()
        return {"theta": theta, "start": theta, "own": {}, "round": 0}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        out = yield Ask(self.local, {c.id: pack(theta=state["own"].get(c.id, state["theta"])) for c in clients})
        moved = [sub(part(out[c], "theta"), state["start"]) for c in out]
        told = all("loss" in out[c] for c in out)  # a layer may keep losses back (dp_sgd): then all have it as hard
        losses = [out[c]["loss"] if told else 1.0 for c in out]
        own = dict(zip(out, self.mixed(moved, losses, state["round"]), strict=True))
        every = {**state["own"], **{c: add(state["start"], u) for c, u in own.items()}}
        mean = {n: torch.stack([t[n].double() for t in every.values()]).mean(0).to(x)
                for n, x in state["theta"].items()} if every else state["theta"]
        return {**state, "theta": mean, "own": every, "round": state["round"] + 1}

    def mixed(self, moved: Sequence[Tree], losses: Sequence[float], t: int) -> list[Tree]:
        """Each client's own mean of what all moved."""
        if not moved:
            return []
        u = flat(moved)
        return unflat(self.weights(u, torch.tensor(losses, dtype=torch.float64), t) @ u, moved)

    def weights(self, u: Tensor, losses: Tensor, t: int) -> Tensor:
        """[N, N], whose rows sum to 1, of updates [N, D] and losses [N] in round t."""
        unit = u / u.norm(dim=1, keepdim=True).clamp_min(1e-30)
        s = (unit @ unit.T + 1) / 2
        share = (losses / self.loss_temperature).softmax(0)  # l_i
        a = torch.tanh(self.alpha / share.clamp_min(1e-30) ** (t + 1 / self.beta))  # hard clients: small
        s = (s * a[:, None]).fill_diagonal_(1.0)
        return s / s.sum(1, keepdim=True)

    def sound(self, msg: Payload, reply: Payload) -> None:
        need(0 <= reply.get("loss", 0.0) <= MOST, f"'loss' is {reply.get('loss')}, allowed is 0 to {MOST:g}")

    @on_client(gives="theta: tree, n: rows, loss?: number", fits=sound)
    def local(self, msg: Payload, client: Client) -> Payload:
        fitted = client.fit(part(msg, "theta"))
        return pack(theta=fitted.theta, n=client.n, loss=fitted.loss)

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        """For who is no client: the mean of the clients' models."""
        return state["theta"], None

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        own: Mapping[str, Tree] = state["own"]
        return (yield Ask(self.score, {c.id: pack(theta=own.get(c.id, state["theta"]), on=on) for c in clients}))
