"""Model Swarms: clients' adapters as particles in search of what scores best; vectors seldom travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import RecipeError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import add, pack, part, scale, sub, zeros_like

FAR = 1e9


@dataclass(frozen=True)
class SwarmSearch(Method):
    """v <- normalized (inertia v + cognitive (p - x) + social (g - x) + repel (x - w)), x <- x + step v; up goes f(x).

    The first round trains each client's expert; all later ones search. f is the loss on public rows, which all hold.
    """

    card = Card(
        title="Model Swarms: collaborative search among adapters",
        paper="Feng et al., Model Swarms: Collaborative Search to Adapt LLM Experts via Swarm Intelligence, 2024, "
              "arXiv 2410.11163 (concrete for Qu et al., Federated LLMs for Swarm Intelligence, 2024)",
        topic="topology",
        sends="up: a number, and the particle only where it is the best or the worst so far; down: the best and the "
              "worst when they have changed",
        needs="any model and space with equal shapes at all clients; public rows at clients, by whose loss particles "
              "are told apart; local.steps trains the experts; clients that remember",
        claim=Claim("under label skew the best particle's loss on the IID test ends below that of the best single "
                    "expert, which took the same steps", rig="particles", metric="over_expert", holds="<",
                    threshold=0.0),
        also={"average": Claim("and below the plain average of the experts", rig="particles", metric="over_average",
                               holds="<", threshold=0.0)},
        evidence="Authors' code from a dossier: four random weights a particle and move, normalized. A first velocity "
                 "towards another expert would send all of them; restarts of particles are left out.",
    )
    trial = Trial({"start": "best"}, local={"steps": 2})
    only_fits = False
    inertia: float = knob(0.4, "phi_v: how far a particle goes on as it went", ge=0)
    cognitive: float = knob(0.3, "phi_p: towards its own best", ge=0)
    social: float = knob(0.3, "phi_g: towards the swarm's best", ge=0)
    repel: float = knob(0.3, "phi_w: away from the swarm's worst", ge=0)
    step_length: float = knob(1.0, "of the first search round", gt=0, le=2)
    step_factor: float = knob(0.95, "by which it shrinks each round", gt=0, le=1)
    min_step: float = knob(0.1, "below which it does not shrink", gt=0)
    patience: int = knob(10, "rounds without a better best after which the search rests", ge=1)
    start: Literal["zero", "best"] = knob("best", "first velocity: none, or towards the best expert",
                                          options=("zero", "best"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inertia + self.cognitive + self.social + self.repel:
            raise RecipeError("SwarmSearch.inertia, cognitive, social and repel are all 0, so that no particle would "
                              "move; one must be > 0")

    def public_at(self):
        return ("clients",)

    def init(self, model: Any) -> State:
        ends = {"best": {}, "worst": {}, "f": {}, "at": {"best": 0, "worst": 0}}
        return {**ends, "start": model.initial(), "round": 0, "step": self.step_length, "waited": 0, "knows": {}}

    def served(self, state: State):
        return (state["best"] or state["start"]), None

    def round(self, state: State, clients) -> Program:
        shapes = {n: list(t.shape) for n, t in state["start"].items()}
        if state["waited"] >= self.patience:
            return state
        out = yield Ask(self.move, {c.id: self.down(state, c.id) for c in clients})
        knows = {**state["knows"], **{c: dict(state["at"]) for c in out}}
        state = {**state, "knows": knows, "round": state["round"] + 1, "waited": state["waited"] + 1}
        for end, sign in (("best", 1), ("worst", -1)):
            c = min(out, key=lambda c, sign=sign: sign * out[c]["f"])
            if end not in state["f"] or sign * out[c]["f"] < sign * state["f"][end]:
                shown = yield Ask(self.show, {c: pack(like=shapes)}, quorum=0)
                if c in shown:  # who dies with it takes it along
                    state = {**state, end: part(shown[c], "x"), "f": {**state["f"], end: out[c]["f"]},
                             "at": {**state["at"], end: state["round"]}}
                    state |= {"waited": 0} if end == "best" else {}
        return {**state, "step": max(state["step"] * self.step_factor, min(self.min_step, state["step"]))}

    def down(self, state: State, c: str) -> dict[str, Any]:
        """The best and the worst, where the client does not hold them yet."""
        new = {e: state[e] for e, t in state["at"].items() if t > state["knows"].get(c, {}).get(e, 0)}
        return pack(step=state["step"], **new)

    @on_client(gives="f: number, loss?: number")
    def move(self, msg, client):
        m, best, worst = client.memory, part(msg, "best"), part(msg, "worst")
        m.update({e: x for e, x in (("best", best), ("worst", worst)) if x})
        if "x" not in m:  # its expert
            fitted = client.fit(client.model.initial())
            m.update(x=fitted.theta, p=fitted.theta, f=self.f(client, fitted.theta))
            return {"f": m["f"], "loss": fitted.loss}
        x, g, w = m["x"], m.get("best", m["x"]), m.get("worst", m["x"])
        v = m.get("v") or (sub(g, x) if self.start == "best" else zeros_like(x))
        a = client.rng("swarm_search").random(4) * (self.inertia, self.cognitive, self.social, self.repel)
        a = a / a.sum()
        v = add(add(add(scale(v, a[0]), sub(m["p"], x), a[1]), sub(g, x), a[2]), sub(x, w), a[3])
        x = add(x, v, msg["step"])
        f = self.f(client, x)
        m.update(x=x, v=v)
        if f < m["f"]:
            m.update(p=x, f=f)
        return {"f": f}

    def f(self, client: Any, x: Any) -> float:
        """The loss on public rows; one that is no number is worse than any."""
        f = float(client.probe([x], on=client.public)[0].mean)
        return f if np.isfinite(f) else FAR

    @on_client(gives="x: tensors", fits=lambda self, msg, reply: need(
        {n: list(t.shape) for n, t in part(reply, "x").items()} == part(msg, "like"),
        "its particle has other names or shapes than the model's trainables"))
    def show(self, msg, client):
        return pack(x=client.memory["x"])

    def report(self, state: State):
        return {"best_loss_on_public_rows": state["f"].get("best"), "rounds_without_a_better_one": state["waited"]}
