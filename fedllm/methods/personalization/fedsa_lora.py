"""FedSA-LoRA: A is common knowledge and travels; B is each client's own and never does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._factors import need_lora

LR = {"local.lr": (1e-3, 3e-3, 1e-2, 3e-2)}


@dataclass(frozen=True)
class FedSALoRA(Star):
    """Train both factors, average A alone: client k goes on with W_0 + s B_k A."""

    card = Card(
        title="FedSA-LoRA: share A, keep B",
        paper="Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, "
              "arXiv 2410.01463",
        topic="personalization",
        sends="down: A; up: its change, the number of examples, the training loss; B and the head never",
        needs="the space lora, one rank for all; clients that remember",
        claim=Claim("each client's own model is right more often on its own kind of data than FedIT's, on the same "
                    "work", rig="label_skew", metric="local_accuracy", baseline="fedit", relative="difference",
                    holds=">", threshold=0.0, grid=LR),
        also={"alone": Claim("and has a lower loss on it than what the client trains alone: sharing A is worth "
                             "something beside keeping B", rig="label_skew", metric="local_loss",
                             baseline="local_only", relative="difference", holds="<", threshold=0.0, grid=LR)},
        evidence="Authors' code read by the dossier. In it all clients of a process share one module, and loading a "
                 "message skips B, so that B passes from client to client; here it stays. A client that never "
                 "trained has B = 0: the base model.",
    )
    serves = False

    share: Literal["A", "B"] = knob("A", "the factor that travels", options=("A", "B"))
    share_head: bool = knob(False, "whether modules that are trained whole (the classifier) travel too")

    def init(self, model: Any) -> State:
        need_lora(self, model)
        return {"theta": self.shared(model.initial())}

    def shared(self, tree: Tree) -> Tree:
        """What travels of a tree."""
        mine = f"lora_{self.share}.weight"
        return {n: x for n, x in tree.items() if n.endswith(mine) or (self.share_head and ".lora_" not in n)}

    def theta(self, msg: Any, client: Any) -> Tree:
        """The client's model: what came, over what stays here (B_k = 0 before its first round)."""
        return {**client.model.initial(), **client.memory.get("own", {}), **part(msg, "theta")}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = self.theta(msg, client)
        fitted = client.fit(theta)
        sent = self.shared(fitted.theta)
        client.memory["own"] = {n: x for n, x in fitted.theta.items() if n not in sent}
        return pack(delta=sub(sent, part(msg, "theta")), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out: Any) -> State:
        # A <- sum_k p_k A_k
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.score(self.theta(msg, client), on=msg["on"])
