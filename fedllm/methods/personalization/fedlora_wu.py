"""FedLoRA (FedDecomp): full-rank weights are shared, a low-rank part on top of them stays with each client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, on_client
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._streams import both, held, merged, need_two


@dataclass(frozen=True)
class FedLoRAWu(Star):
    """theta_k = sigma + tau_k: sigma travels and is averaged, tau_k never leaves; each trains while the other rests."""

    card = Card(
        title="FedLoRA / FedDecomp: shared full rank, personal low rank",
        paper="Wu et al., Decoupling General and Personalized Knowledge in Federated Learning via Additive and "
              "Low-Rank Decomposition, ACM MM 2024, arXiv 2406.19931 (FedLoRA in its first version)",
        topic="personalization",
        sends="down: sigma; up: its change, the number of examples, the training loss; tau never",
        needs="space streams with sigma (shared; any space) and tau (personal; any space that fits over it); clients "
              "that remember",
        claim=Claim("each client's own model is right more often on its own kind of data than FedAvg's of the same "
                    "weights, on the same steps", rig="two_streams", metric="local_accuracy", baseline="fedavg",
                    relative="difference", holds=">", threshold=0.0, grid={"local.lr": (1e-3, 2e-3, 5e-3)}),
        also={"alone": Claim("and has a lower loss on it than a model that the client trains alone", rig="two_streams",
                             metric="local_loss", baseline="local_only", relative="difference", holds="<",
                             threshold=0.0, grid={"local.lr": (1e-3, 2e-3, 5e-3)})},
        evidence="Authors' code read; it reports the best test accuracy over rounds, we the last, and averages over "
                 "all clients, the unselected with their last, we over those asked. That its accuracy is above that of "
                 "training alone does not hold here: 0.85 against 0.86 over five seeds; nor that taking "
                 "turns beats training both at once (`order: joint`).",
    )
    trial = Trial(space={"name": "streams", "of": {"sigma": "full", "tau": {"name": "lora", "rank": 2}},
                         "personal": ("tau",)}, local={"steps": 3})
    personal_share: float = knob(0.4, "share of a round's steps that train tau, rounded", ge=0, lt=1)
    order: Literal["personal_first", "shared_first", "joint"] = knob(
        "personal_first", "which is trained first, or both at once",
        options=("personal_first", "shared_first", "joint"))
    weighting: Literal["n", "uniform"] = knob("uniform", "clients weigh all alike as in the authors' code, or by their "
                                              "examples", options=("n", "uniform"))
    use: Literal["both", "sigma", "tau"] = knob("both", "which part each client is tested with",
                                                options=("both", "sigma", "tau"))

    def check(self, model) -> None:
        need_two(self, model, "sigma", "tau",
                 "{name: streams, of: {sigma: full, tau: {name: lora, rank: 4}}, personal: [tau]}")

    def init(self, model) -> State:
        self.check(model)
        return {"theta": part(model.initial(), "sigma")}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        sigma, tau = part(msg, "theta"), held(client, "tau")
        theta, steps = pack(sigma=sigma, tau=tau), client.training.count(client.n)
        own = round(self.personal_share * steps)
        plan = [(own, "sigma/*"), (steps - own, "tau/*")]  # (steps, what rests)
        plan = {"joint": [(steps, "")], "shared_first": plan[::-1]}.get(self.order, plan)
        loss = 0.0
        for count, rests in plan:
            if count:
                fitted = client.fit(theta, freeze=[rests], steps=count)
                theta, loss = fitted.theta, loss + fitted.loss * count / steps
        client.memory["tau"] = part(theta, "tau")
        n = client.n if self.weighting == "n" else 1
        return pack(delta=sub(part(theta, "sigma"), sigma), n=n, loss=loss)

    def merge(self, state: State, out) -> State:
        return merged(state, out)  # sigma_{t+1} = sigma_t + mean_k (sigma_k - sigma_t)

    def served(self, state: State):
        return pack(sigma=state["theta"]), None

    def evaluate(self, state, clients, on):
        return (yield Ask(self.score, {c.id: pack(theta=state["theta"], on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        theta = both(msg, client, "sigma", "tau")
        return client.score({n: x for n, x in theta.items() if self.use in ("both", n.partition("/")[0])}, on=msg["on"])
