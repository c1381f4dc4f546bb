"""PFCR: shops share how the codes of items' names are embedded, and nothing of their users; prompts come after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part, sub
from fedllm.methods._randomized import coded, decoded
from fedllm.models.shop import ENCODER, PROMPT, TABLE, ShopNet


def of(theta: Tree, head: str) -> Tree:
    """The trainables whose names begin so."""
    return {n: t for n, t in theta.items() if n.startswith(head)}


@dataclass(frozen=True)
class PFCR(Method):
    """E <- E + lr sum_k w_k dE_k, told in 8 bits and by randomized response; then each shop trains its own prompts."""

    card = Card(
        title="PFCR: prompt-enhanced federated content representation",
        paper="Guo, Lu, Yu, Nguyen, Yin, Prompt-enhanced Federated Content Representation Learning for Cross-domain "
              "Recommendation, WWW 2024, arXiv 2401.14678",
        topic="prompt learning: applications",
        sends="down: the table of codes E; up: what an epoch moved in it, a byte an entry; nothing once prompts begin. "
              "Never a history, an item's own vector or the reader",
        needs="data.task: next_item, model.name: shop, space full; items' names are known to all parties",
        claim=Claim("two shops without a user or an item in common: the small one ranks its users' last items better "
                    "(NDCG@10) than with a table of its own", rig="shops", metric="small_ndcg10", baseline="pfcr",
                    relative="difference", holds=">", threshold=0.0, against={"knobs": {"share": "nothing"}},
                    grid={"lr": (3e-3, 1e-2)}),
        also={"item_knn": Claim("and better than item-kNN", rig="shops", metric="over_item_knn", holds=">",
                                threshold=0.0),
              "popularity": Claim("and better than what is popular there", rig="shops", metric="over_popularity",
                                  holds=">", threshold=0.0),
              "words": Claim("where the titles of the small shop are dealt out anew, sharing no longer helps by more "
                             "than 0.01", rig="shops", metric="small_ndcg10", baseline="pfcr", relative="difference",
                             holds="<", threshold=0.01, better="max", against={"knobs": {"share": "nothing"}},
                             options={"mixed": "office"}, grid={"lr": (3e-3, 1e-2)}),
              "prompts": Claim("prompts after the federation add to the small shop's NDCG@10", rig="shops",
                               metric="small_ndcg10", baseline="pfcr", relative="difference", holds=">", threshold=0.0,
                               options={"tuned": True}, against={"tuned": False},
                               unequal="the prompts' rounds are what is compared"),
              "ldp": Claim("told by randomized response at epsilon 0.3 an entry, as the paper has it, nothing is left "
                           "of the gain over a table of its own", rig="shops", metric="small_ndcg10",
                           baseline="pfcr", relative="difference", holds="<", threshold=0.0, better="max",
                           options={"knobs": {"ldp_epsilon": 0.3}}, against={"knobs": {"share": "nothing"}})},
        evidence="Authors' code read by the dossier; its codec wraps levels around and is biased, so this one is k-ary "
                 "randomized response after unbiased rounding. Sent is the epoch's move, in which Adam's steps are, "
                 "and not the sum of gradients. Codes are of titles' TF-IDF. Prompts begin behind a gate of 0.",
    )
    trial = Trial({"fed_rounds": 1}, {"name": "full"}, task="next_item",
                  rounding="what is sent is rounded to 256 levels by a coin")
    serves = False

    fed_rounds: int = knob(10, "rounds of the table; all later ones train each shop's prompts, and nothing is sent",
                           ge=1)
    server_lr: float = knob(1.0, "size of the server's step along the mean move", gt=0)
    clip: float = knob(0.12, "b: an entry's move beyond it is cut", gt=0)
    bits: int = knob(8, "of a level", ge=1, le=8)
    ldp_epsilon: float | None = knob(None, "of randomized response, for ONE entry in one round; None: none", gt=0)
    share: Literal["table", "nothing"] = knob("table", "nothing: each shop keeps its own, for comparison",
                                              options=("table", "nothing"))

    def check(self, model: Any) -> None:
        if not isinstance(model.net, ShopNet) or not {TABLE, ENCODER, PROMPT} <= {
                n.split(".")[0] + "." for n in model.initial()}:
            raise CompositionError(f"method 'pfcr' trains the code table, the reader and the prompts of a recommender, "
                                   f"which data.task = {model.task!r} with space '{model.space.stem}' has not; use "
                                   "data.task = 'next_item', model.name = 'shop', space = 'full'")

    def init(self, model: Any) -> State:
        return {"round": 0, "table": of(model.initial(), TABLE)}

    def report(self, state: State) -> Mapping[str, Any] | None:
        if self.ldp_epsilon is None:
            return None
        entries, rounds = sum(t.numel() for t in state["table"].values()), min(state["round"], self.fed_rounds)
        return {"epsilon_of_an_entry_in_a_round": self.ldp_epsilon, "entries": entries, "rounds": rounds,
                "epsilon_of_a_client": self.ldp_epsilon * entries * rounds,
                "of": "basic composition; an entry's epsilon is no user's"}

    def round(self, state: State, clients: Any) -> Program:
        t = state["round"]
        told = {c.id: pack(table=state["table"] if self.share == "table" else None) for c in clients}
        if t >= self.fed_rounds:
            first = {c: m if t == self.fed_rounds else {} for c, m in told.items()}
            yield Ask(self.tune, first)
            return {**state, "round": t + 1}
        out = yield Ask(self.learn, told)
        if self.share == "nothing":
            return {**state, "round": t + 1}
        total, table = sum(out[c]["n"] for c in out), dict(state["table"])
        for c in out:  # E <- E + lr sum_k n_k / n dE_k
            for n, level in part(out[c], "moved").items():
                move = decoded(level, self.clip, self.bits, self.ldp_epsilon).to(table[n])
                table[n] = table[n] + self.server_lr * out[c]["n"] / total * move
        return {"round": t + 1, "table": table}

    def levels(self, msg: Payload, reply: Payload) -> None:
        for name, level in part(reply, "moved").items():
            need(int(level.max()) < 1 << self.bits, f"'moved/{name}' holds the level {int(level.max())}, allowed are 0 "
                 f"to {(1 << self.bits) - 1}")
            need(f"table/{name}" in msg and level.shape == msg[f"table/{name}"].shape,
                 f"'moved/{name}' is not of the table that was sent")

    @on_client(gives="moved?: wholes, n: rows, loss?: number", fits=levels)
    def learn(self, msg: Payload, client: Client) -> Payload:
        start = {**self.own(client), **part(msg, "table")}
        fitted = client.fit(of(start, TABLE) | of(start, ENCODER))
        client.memory["encoder"] = of(fitted.theta, ENCODER)
        if self.share == "nothing":
            client.memory["table"] = of(fitted.theta, TABLE)
            return {"n": client.n, "loss": fitted.loss}
        client.memory["table"] = of(start, TABLE)  # what it moved is sent, and comes back with what others moved
        rng, moved = client.rng("pfcr"), sub(of(fitted.theta, TABLE), of(start, TABLE))
        return pack(moved={n: coded(t, self.clip, self.bits, self.ldp_epsilon, rng) for n, t in moved.items()},
                    n=client.n, loss=fitted.loss)

    @on_client(gives="n: rows, loss?: number")
    def tune(self, msg: Payload, client: Client) -> Payload:
        """Prompts and table; the reader rests."""
        start = {**of(client.model.initial(), PROMPT), **self.own(client), **part(msg, "table")}
        theta = client.fit(start, freeze=(f"{ENCODER}*",)).theta
        client.memory["table"], client.memory["prompt"] = of(theta, TABLE), of(theta, PROMPT)
        return {"n": client.n}

    def own(self, client: Client) -> Tree:
        """What it would rank by: its table, its reader, and prompts if it has some."""
        start = client.model.initial()
        mine = {n: t for key in ("table", "encoder", "prompt") for n, t in client.memory.get(key, {}).items()}
        return {**of(start, TABLE), **of(start, ENCODER), **mine}

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        """While the table is shared, by the newest; then by each shop's own."""
        told = state["table"] if self.share == "table" and state["round"] <= self.fed_rounds else None
        return (yield Ask(self.score, {c.id: pack(table=told, on=on) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score({**self.own(client), **part(msg, "table")}, on=msg["on"])
