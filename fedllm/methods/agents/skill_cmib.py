"""Skill-CMIB: a skill is a card of words and a latent of what pictures say beside it; nets and cards are shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.form import aligned, need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.methods import _bottleneck as ib
from fedllm.methods._cards import CARD, NAME, drafted, kept, picked, trials

RIG = {"rig": "two_cues", "metric": "accuracy", "relative": "difference", "holds": ">", "threshold": 0.0,
       "baseline": "skill_cmib"}


@dataclass(frozen=True)
class SkillCMIB(Method):
    """The card c with the least -log p(y | x, c) + beta_c |c|; then z ~ q(z | v, c) with the least -log p(y | x, c, z)
    + beta_z KL(q(z | v, c) || p(z | c)): it holds what the card does not say.

    A row is a trial: `text` (asked), `label` (done), `skill`, `trace` (said), `glyph` (a picture's numbers)."""

    card = Card(
        title="Skill-CMIB: skills as a card and a residual latent",
        paper="Huang, Wu et al., Skill-CMIB, arXiv 2605.08526, 2026",
        topic="agents",
        sends="both ways: encoder, prior, projector and head, and a card of each skill: WORDS that several traces of a "
              "client have, none of their values; up also what cards were worth. No picture, latent or trace",
        needs="data.task classification, an encoder, which stays frozen; rows with `skill`, `trace` and `glyph`",
        kinds=("text",),
        claim=Claim("where an action depends on a rule that the card says and on a cue that the picture shows, card "
                    "and latent are right more often than the card alone", against={"knobs": {"use": "card"}}, **RIG),
        also={"latent": Claim("and than the latent alone", against={"knobs": {"use": "latent"}}, **RIG),
              "alone": Claim("and than skills of one's own, over everybody's skills", against={
                  "knobs": {"share": "nothing"}}, **RIG),
              "collapse": Claim("at beta_z = 10 it is within 2 points of the card alone", rig="two_cues",
                                metric="above_card", holds="<=", threshold=0.02, options={"knobs": {"beta_z": 10.0}}),
              "rate": Claim("a larger beta_z leaves less in the latent (KL at 0.1 over KL at 0.001)",
                            **{**RIG, "metric": "kl", "relative": "ratio", "holds": "<", "threshold": 1.0},
                            options={"knobs": {"beta_z": 0.1}}, against={"knobs": {"beta_z": 0.001}}),
              "residual": Claim("at beta_z = 0.1 the latent tells the card's rule less often than one that was learned "
                                "without the card", **{**RIG, "metric": "tells_rule", "holds": "<"},
                                options={"knobs": {"beta_z": 0.1}},
                                against={"knobs": {"beta_z": 0.1, "use": "latent"}}),
              "consistent": Claim("two tries at one task do the same more often than by the card alone",
                                  **{**RIG, "metric": "agree"}, against={"knobs": {"use": "card"}})},
        evidence="From a dossier of a third party's notes. Ours: cards are words that traces share, chosen by the net; "
                 "z joins the frozen state behind the encoder, and not as tokens before it: it runs once a row.",
    )
    trial = Trial({"pixels": 64, "least": 2, "card_rounds": 1}, {"name": "head"}, task="classification", far={
        "data.fields": {"skill": "skill", "trace": "trace", "glyph": "strokes"}}, apart="its rows are trials")
    metrics: ClassVar = {"card_accuracy": "max", "agree": "max", "kl": "min"}
    serves, only_fits = False, False
    beta_c: float = knob(0.01, "nats that a word of a card costs", ge=0)
    beta_z: float = knob(0.01, "weight of the latent's KL, reached over `anneal` rounds", ge=0)
    card_rounds: int = knob(8, "rounds by cards alone, before the first card is chosen and the latent comes", ge=0)
    anneal: int = knob(4, "rounds over which beta_z grows then, lest the latent stays empty", ge=0)
    dim: int = knob(8, "d_z, numbers of the latent", ge=1)
    hidden: int = knob(32, "width of encoder and head", ge=1)
    pixels: int = knob(256, "numbers of a glyph", ge=1)
    least: int = knob(3, "traces that a word of a card must be in", ge=2)
    longest: int = knob(8, "words of a card at the most", ge=1)
    every: int = knob(8, "rounds from one choice of cards to the next", ge=1)
    use: Literal["both", "card", "latent"] = knob("both", "parts of a skill, for comparison",
                                                  options=("both", "card", "latent"))
    share: Literal["all", "nothing"] = knob("all", "nothing: each client keeps its own", options=("all", "nothing"))

    def init(self, model: Any) -> State:
        if model.task != "classification":
            raise CompositionError(f"method 'skill_cmib' and data.task = {model.task!r} do not fit together: actions "
                                   "are classes; allowed is 'classification'")
        net = ib.start(self.pixels, model.net.config.hidden_size, self.dim, self.hidden, len(model.labels), model.seed)
        return {"theta": net, "cards": {}, "round": 0}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        out = yield Ask(self.local, {c.id: self.down(state) for c in clients})
        if self.share == "nothing":
            return {**state, "round": state["round"] + 1}
        theta, total = state["theta"], sum(float(out[c]["n"]) for c in out)
        for c in out:  # theta <- theta + sum_k p_k delta_k
            theta = add(theta, part(out[c], "delta"), out[c]["n"] / total)
        told = sorted(one for r in out.values() for one in zip(r["names"], r["worth"], r["texts"], strict=True))
        cards = {n: t for n, _, t in told}  # of a skill's cards the one that was worth most
        return {**state, "theta": theta, "cards": {**state["cards"], **cards}, "round": state["round"] + 1}

    def down(self, state: State) -> Payload:
        told = {"names": list(state["cards"]), "texts": list(state["cards"].values()), "round": state["round"]}
        return {**told, **pack(theta=state["theta"])}

    def fits(self, msg: Payload, reply: Payload) -> None:
        aligned(reply, ("names", "texts", "worth"))
        need(all(NAME.fullmatch(n) for n in reply["names"]), "'names' holds what is no name of a skill")
        need(all(CARD.fullmatch(t) for t in reply["texts"]), "'texts' holds what is no card: words alone")

    @on_client(gives="delta?: tree, n: rows, loss: number, kl: number, names: names, texts: texts, worth: numbers",
               fits=fits)
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, cards = self.own(msg, client)
        late = msg["round"] - self.card_rounds * (self.use == "both")  # stage 1 is before 0, stage 2 from 0 on
        beta = self.beta_z * min(1.0, (late + 1) / (self.anneal + 1))
        now = self.use != "latent" and not msg["round"] % self.every
        mine, worth = self.chosen(theta, cards, client, msg["round"]) if now else ({}, [])
        seen = kept(client, {**cards, **mine}, lambda known: self.seen(client, client.data, known))
        net, loss, rate = ib.trained(theta, client, seen, beta, self.use != "card" and late >= 0)
        told = {"n": client.n, "loss": loss, "kl": rate, "names": [], "texts": [], "worth": []}
        if self.share == "nothing":
            client.memory["skills"] = {"theta": net, "cards": mine or cards}
            return told
        told |= {"names": list(mine), "texts": list(mine.values()), "worth": worth, **pack(delta=sub(net, theta))}
        return told

    def own(self, msg: Payload, client: Client) -> tuple[Any, dict[str, str]]:
        """The net and the cards that this client works with."""
        own = client.memory.get("skills", {}) if self.share == "nothing" else {}
        told = dict(zip(msg["names"], msg["texts"], strict=True))
        return own.get("theta") or part(msg, "theta"), own.get("cards") or told

    def chosen(self, theta: Any, cards: Mapping[str, str], client: Client, round: int) -> Any:
        """A card for each skill by -log p(y | x, c, z) + beta_c |c|, and its worth; at first the longest."""
        def price(rows: Sequence[Any], name: str, card: str) -> float:
            seen = trials(client, rows, {name: card}, self.pixels)
            latent = self.use != "card" and round > self.card_rounds
            return ib.judged(theta, seen, client, latent, 0)["loss"] + self.beta_c * len(card.split())

        drafts = lambda rows: drafted([str(r["trace"]) for r in rows], self.least, self.longest)  # noqa: E731
        return picked(client.data, cards, drafts, price if round else None)

    def seen(self, client: Client, rows: Sequence[Any], cards: Mapping[str, str]) -> tuple[Tensor, ...]:
        return trials(client, rows, cards if self.use != "latent" else {}, self.pixels)

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: {**self.down(state), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """By the latent's mean; with no latent (`card_accuracy`); how often two tries, each with a latent and an action
        drawn, do the same (`agree`); and what the latent holds in nats (`kl`)."""
        rows = client.held_out(msg["on"])
        if not rows:
            return {"n": 0}
        theta, cards = self.own(msg, client)
        return {"n": len(rows), **ib.judged(theta, self.seen(client, rows, cards), client, self.use != "card")}
