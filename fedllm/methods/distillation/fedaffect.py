"""FedAffect: rows without labels shape the encoder, the few with labels the head, and each is averaged by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, Withheld
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.local.objectives.apart import Apart
from fedllm.local.objectives.two_views import TwoViews, predictor, states, viewed

LR = {"local.lr": (1e-3, 2e-3, 5e-3)}


@dataclass(frozen=True)
class FedAffect(Method):
    """Phase U: a row's two views, words struck out of it, are to say the same, the one by the encoder and a predictor,
    the other by the encoder as it was. Phase L: cross-entropy on the labelled rows, the encoder at rest."""

    card = Card(
        title="FedAffect: few-shot federated learning with disjoint feature learning",
        paper="Shome and Kar, FedAffect: Few-shot Federated Learning for Facial Expression Recognition, ICCV workshops "
              "2021",
        topic="label scarcity",
        sends="both ways: the encoder and its predictor after phase U, the head (or all) after phase L; to the server "
              "how many rows have labels and how many have none",
        needs="task classification; the space full, or another that has the classifier among its trainables",
        claim=Claim("with 5 labelled rows of each label and 200 without labels it is right more often than FedAvg on "
                    "the labelled rows, by 3 points or more", rig="few_labels", metric="accuracy", baseline="fedavg",
                    relative="difference", holds=">=", threshold=0.03, grid=LR, unequal="phase U is work beside"),
        also={"byol": Claim("with `byol` it is not", rig="few_labels", metric="accuracy", baseline="fedavg",
                            relative="difference", holds="<", threshold=0.03, better="max", grid=LR,
                            options={"knobs": {"ssl": "byol"}}, unequal="phase U is work beside"),
              "spread": Claim("and its features do not collapse: their spread is above 0.3 / sqrt(d)",
                              rig="few_labels", metric="spread", holds=">", threshold=0.3)},
        evidence="Abstract, for disjoint updates; the loss is a choice of the dossier's. `byol`: the target is the "
                 "encoder as the round began, so that a row's loss hangs on the row alone; `simclr` draws its "
                 "negatives from what that encoder says of other rows. Text: a view lacks a share of the tokens.",
    )
    trial = Trial({"shots": 1, "u_steps": 2, "l_steps": 2}, space={"name": "full"}, task="classification")
    only_fits = False

    shots: int = knob(5, "rows of each label, the first of a client's, whose label it knows; others have none", ge=0)
    ssl: Literal["byol", "simclr"] = knob("simclr", "what phase U descends", options=("byol", "simclr"))
    temperature: float = knob(0.5, "tau of simclr", gt=0)
    negatives: int = knob(32, "other rows that simclr tells a row from", ge=1)
    strike: float = knob(0.2, "share of a row's tokens that a view lacks", ge=0, lt=1)
    u_steps: int = knob(20, "steps of phase U a round; 0: few-shot FedAvg", ge=0)
    l_steps: int = knob(10, "steps of phase L a round", ge=1)
    freeze_encoder: bool = knob(True, "phase L trains the head alone")

    def check(self, model: Any) -> None:
        if model.task != "classification" or not any(n.startswith("classifier.") for n in model.initial()):
            raise CompositionError(f"method 'fedaffect', data.task = {model.task!r} and space '{model.space.stem}' do "
                                   "not fit together: it averages encoder and head apart; use data.task = "
                                   "'classification' and the space 'full'")

    def init(self, model: Any) -> State:
        self.check(model)
        d = model.net.config.hidden_size
        return {"theta": model.initial(), "predictor": predictor(d, torch_stream(model.seed, "fedaffect"))}

    def round(self, state: State, clients) -> Program:
        theta, guess = state["theta"], state["predictor"]
        if self.u_steps:
            body = {n: t for n, t in theta.items() if not head(n)}
            out = yield Ask(self.unlabelled, {c.id: pack(theta=theta, predictor=guess) for c in clients}, quorum=0)
            if out.answered:
                theta = theta | add(body, part(out.value, "body"))
                guess = add(guess, part(out.value, "predictor"))
        out = yield Ask(self.local, {c.id: pack(theta=theta) for c in clients})
        return {"theta": theta | add({n: theta[n] for n in part(out.value, "delta")}, part(out.value, "delta")),
                "predictor": guess}

    def split(self, client: Any) -> tuple[list[Any], list[Any]]:
        """The client's rows with labels, the first `shots` of each, and the others."""
        seen: dict[int, int] = {}
        known, rest = [], []
        for row in client.tokens:
            y = int(row.labels)
            seen[y] = seen.get(y, 0) + 1
            (known if seen[y] <= self.shots else rest).append(row)
        return known, rest

    @on_client(reduce=Mean(), gives="body: some, predictor: some, n: rows, loss?: number")
    def unlabelled(self, msg, client):
        theta, guess, rows = part(msg, "theta"), part(msg, "predictor"), self.split(client)[1]
        if not rows:
            raise Withheld(f"client '{client.id}' has no row without a label")
        rng = client.rng("fedaffect")
        one, other = ([viewed(r, self.strike, rng) for r in rows] for _ in range(2))
        target = torch.from_numpy(client.measure(theta, other, states))  # of the encoder as it was
        side: dict[str, list[Any]] = {"target": list(target)}
        if self.ssl == "simclr":
            side["others"] = [target[torch.from_numpy(rng.choice(len(rows), self.negatives))] for _ in rows]
        heads = [n for n in theta if head(n)]
        goal = TwoViews() if self.ssl == "byol" else Apart(self.temperature)
        fitted = client.fit({**theta, **guess}, on=one, steps=self.u_steps, objective=goal, side=side, freeze=heads)
        moved = lambda old: sub({n: fitted.theta[n] for n in old}, old)  # noqa: E731
        return pack(body=moved({n: t for n, t in theta.items() if not head(n)}), predictor=moved(guess), n=len(rows),
                    loss=fitted.loss)

    @on_client(reduce=Mean(), gives="delta: some, n: rows, loss?: number")
    def local(self, msg, client):
        theta, (rows, _) = part(msg, "theta"), self.split(client)
        if not rows:
            raise Withheld(f"client '{client.id}' has no row with a label")
        still = [n for n in theta if not head(n)] if self.freeze_encoder else []
        fitted = client.fit(theta, on=rows, steps=self.l_steps, freeze=still)
        kept = {n: t for n, t in theta.items() if n not in still}
        return pack(delta=sub({n: fitted.theta[n] for n in kept}, kept), n=len(rows), loss=fitted.loss)


def head(name: str) -> bool:
    """Whether a trainable is of the classifier."""
    return name.startswith("classifier.")
