"""CEFHRI: federated recognition of actions, where only adapters that look along time are trained and sent."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.core.ask import on_client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Star, State, Trial
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.spaces.st_adapter import STAdapter


@dataclass(frozen=True)
class CEFHRI(Star):
    """The mean of the clients' spatio-temporal adapters and heads; the backbone is frozen and never sent."""

    card = Card(
        title="CEFHRI: spatio-temporal adapters for human-robot interaction",
        paper="Khalid et al., CEFHRI: A Communication Efficient Federated Learning Framework for Recognizing "
              "Industrial Human-Robot Interaction, IROS 2023, arXiv 2308.14965",
        topic="communication efficiency",
        sends="down: adapters with depth-wise kernels, and the head; up: their change, the number of examples, the "
              "training loss",
        needs="the space st_adapter; a classifier over token sequences (space.grid: frames of places)",
        claim=Claim("where the label is the order of the steps alone, and the encoder knows positions, its accuracy is "
                    "at least 5 points above that of FedAvg on plain adapters with as many parameters, on the same "
                    "work, each at its best rate", rig="frame_order", metric="accuracy", baseline="fedavg",
                    relative="difference", holds=">=", threshold=0.05, grid={"local.lr": (3e-3, 1e-2, 3e-2)}),
        also={"blind": Claim("and at least 20 points where the encoder has no position embeddings, so that plain "
                             "adapters cannot tell orders at all", rig="frame_order", metric="accuracy",
                             baseline="fedavg", relative="difference", holds=">=", threshold=0.20,
                             options={"blind": True}, grid={"local.lr": (3e-3, 1e-2, 3e-2)}),
              "bytes": Claim("a client sends up at most 5 % of what full fine-tuning of MiniLM sends, by encoded "
                             "messages", rig="minilm_bytes", metric="up_share", holds="<=", threshold=0.05,
                             kind="exact")},
        evidence="The authors' scripts were read; the file that defines their adapter is not among them, so kernel and "
                 "place are ST-Adapter's (Pan et al., 2022). Left out: the head's BatchNorm without an affine part, "
                 "SAM as a local optimizer, and their noise, which is no valid Gaussian mechanism (use dp_sgd).",
    )
    trial = Trial(space={"name": "st_adapter"}, task="classification")

    def check(self, model) -> None:
        if not isinstance(model.space, STAdapter):
            raise CompositionError(f"method 'cefhri' trains adapters that look along time, not the space "
                                   f"'{model.space.stem}'; use the space 'st_adapter'")
        if model.task != "classification":
            raise CompositionError(f"method 'cefhri' recognizes classes, and the task is '{model.task}'; use "
                                   "data.task: classification, or method: fedavg with the space 'st_adapter'")

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    def merge(self, state: State, out) -> State:
        # a_(t+1) = a_t + sum_k p_k (a_k - a_t), of adapters and head alone
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}
