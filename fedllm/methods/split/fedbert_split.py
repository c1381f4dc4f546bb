"""FedBERT: the model's ends at the clients, its middle at the server; states and their gradients cross in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, QuorumError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, scale, sub, zeros_like
from fedllm.core.reduce import Mean
from fedllm.methods._plain_sgd import steps_together
from fedllm.models.batch import collate
from fedllm.models.segments import segments


@dataclass(frozen=True)
class FedBERTSplit(Method):
    """e = front(x) up, h = middle(e) down, dL/dh up, dL/de down; SGD on both sides; ends are averaged each round."""
    card = Card(
        title="FedBERT: split learning of a whole model",
        paper="Tian et al., FedBERT: When Federated Learning Meets Pre-training, ACM TIST 2022",
        topic="pre-training",
        sends="each step up: states behind the front and dL/dh, down: states before the back and dL/de; once a round "
              "the ends' weights either way. Never token ids or labels",
        needs="a language model, masked or causal, a space with trainables in it (full), plain SGD; a line each step",
        claim=Claim("one step of all clients is one step of the unsplit model along the mean of their gradients "
                    "(largest relative difference of the weights after 3 rounds)", rig="split_lm",
                    metric="off_unsplit", holds="<=", threshold=1e-5, kind="exact"),
        also={"tokens": Claim("the cut alone keeps nothing secret: with no block at the client, the nearest row of the "
                              "embedding gives more than 90 % of the tokens back", rig="split_lm", metric="recovered",
                              holds=">", threshold=0.9),
              "learns": Claim("after as many steps its loss on the global test is below that of clients that train "
                              "alone, on the mean", rig="split_lm", metric="loss", baseline="local_only",
                              relative="difference", holds="<", threshold=0.0, grid={"local.lr": (0.05, 0.1, 0.3)}),
              "masked": Claim("so with masked words", rig="split_masked", metric="loss", baseline="local_only",
                              relative="difference", holds="<", threshold=0.0, grid={"local.lr": (0.1, 0.3, 0.5)})},
        evidence="From the abstract and a dossier. Masked words (data.task: masked_words) or next ones; parallel mode.",
    )
    trial, only_fits = Trial({"steps": 2}, {"name": "full"}, far={"local.optimizer": "sgd"}), False
    cut: int = knob(0, "blocks that clients hold before the middle, and as many behind it", ge=0)
    steps: int = knob(4, "steps of a round", ge=1)

    repeats = property(lambda self: self.steps)  # each step asks for `top` and `turn` once

    def check(self, model) -> None:
        self.cuts(model)

    def cuts(self, model) -> Any:
        """(front, middle, back)"""
        depth = segments(model, [0])[0].of
        if 2 * self.cut >= depth:
            raise CompositionError(f"method.cut = {self.cut} leaves the server none of the model's {depth} blocks; "
                                   f"allowed are 0 to {(depth - 1) // 2}")
        return segments(model, [self.cut, depth - self.cut])

    check_work = steps_together("fedbert_split")

    def init(self, model) -> State:
        theta = model.initial()
        middle = self.cuts(model)[1].part(model, theta)
        return {"ends": {n: t for n, t in theta.items() if n not in middle}, "middle": middle}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        return {**state["ends"], **state["middle"]}, None

    def round(self, state: State, clients) -> Program:
        middle, rows = state["middle"], {c.id: c.n for c in clients}
        turn = yield Ask(self.begin, {c.id: pack(ends=state["ends"]) for c in clients})
        for t in range(self.steps):
            told = pack(middle=middle, e={c: turn[c]["e"] for c in turn}, mask={c: turn[c]["mask"] for c in turn})
            [up] = (yield Ask(self.through, {SERVER: told}, quorum=1)).values()
            tops = yield Ask(self.top, {c: {"h": h} for c, h in part(up, "h").items()})
            if not tops.answered:
                raise QuorumError(f"fedbert_split: no client answered in step {t + 1} of {self.steps}")
            p = {c: rows[c] / sum(rows[d] for d in tops) for c in tops}  # p_k = n_k / sum n
            told = pack(middle=middle, g={c: tops[c]["g"] for c in tops}, p=p)
            [back] = (yield Ask(self.learn, {SERVER: told}, quorum=1)).values()
            middle = part(back, "middle")
            turn = yield Ask(self.turn, {c: {"g": g, "last": t + 1 == self.steps}
                                         for c, g in part(back, "g").items()})
        out = yield Ask(self.hand_in, {c: {} for c in turn})
        return {**state, "ends": part(out.value, "ends"), "middle": middle}

    def fits(self, msg, reply):
        if msg.get("last"):
            return need("done" in reply and "e" not in reply, "it was the last step, and states came")
        e, mask = (reply.get(k) for k in ("e", "mask"))
        need(e is not None and mask is not None, "of 'e' and 'mask' one is lacking")
        wide = {t.shape[-1] for k, t in msg.items() if k.startswith("ends/") and t.dim()} | (
            {msg["g"].shape[-1]} if "g" in msg else set())
        need(e.dim() == 3 and e.numel() > 0 and mask.shape == e.shape[:2] and e.shape[-1] in wide,
             f"'e' has shape {tuple(e.shape)} and 'mask' {tuple(mask.shape)}, allowed are [B, T, d] and [B, T]")

    @on_client(gives="e: tensor, mask: mask", fits=fits)
    def begin(self, msg, client) -> Payload:
        self.check_work(client.training, 0)
        client.session["ends"], client.session["plan"] = part(msg, "ends"), client.batches(self.steps)
        return self.ahead(client)

    def ahead(self, client) -> Payload:
        """e = front(x) of the next batch."""
        at, client.session["plan"] = client.session["plan"][0], client.session["plan"][1:]
        batch = client.session["batch"] = collate([[client.tokens[i] for i in at]], client.model.pad, "cpu")  # type: ignore[arg-type]
        front = self.cuts(client.model)[0]
        theta = front.part(client.model, client.session["ends"])
        return {"e": client.forward(front, theta, batch.ids, batch.mask), "mask": batch.mask}

    @on_server
    def through(self, msg, client) -> Payload:
        """h_k = middle(e_k) for each client; e_k waits for its gradient."""
        theta, segment = part(msg, "middle"), self.cuts(client.model)[1]
        client.session["of"] = of = part(msg, "e"), part(msg, "mask")
        return pack(h={c: client.forward(segment, theta, e, of[1][c]) for c, e in of[0].items()})

    @on_client(gives="g: tensor", fits=lambda self, msg, reply: need(reply["g"].shape == msg["h"].shape, "g is odd"))
    def top(self, msg, client) -> Payload:
        """dL/dh; the back's own gradient waits for the front's, since tied embeddings lie in both."""
        batch, back = client.session["batch"], self.cuts(client.model)[2]
        theta = back.part(client.model, client.session["ends"])
        got = client.backward(back, theta, msg["h"], batch.mask, labels=batch.labels)
        client.session["slopes"] = got.theta
        return {"g": got.x}

    @on_server
    def learn(self, msg, client) -> Payload:
        """middle <- middle - lr sum_k p_k g_k, and dL_k/de_k for each client."""
        theta, segment, (e, mask) = part(msg, "middle"), self.cuts(client.model)[1], client.session["of"]
        total, back = zeros_like(theta), {}
        for c, g in part(msg, "g").items():
            got = client.backward(segment, theta, e[c], mask[c], g)
            total, back[c] = add(total, got.theta, msg[f"p/{c}"]), got.x
        return pack(middle=sub(theta, scale(total, client.training.lr)), g=back)

    @on_client(gives="done?: count, e?: tensor, mask?: mask", fits=fits)
    def turn(self, msg, client) -> Payload:
        """ends <- ends - lr (dL/d front + dL/d back), and the next batch."""
        batch, front, ends = client.session["batch"], self.cuts(client.model)[0], client.session["ends"]
        got = client.backward(front, front.part(client.model, ends), batch.ids, batch.mask, msg["g"])
        for slopes in (got.theta, client.session["slopes"]):
            ends = {n: t - client.training.lr * slopes[n] if n in slopes else t for n, t in ends.items()}
        client.session["ends"] = ends
        return {"done": 1} if msg["last"] else self.ahead(client)

    @on_client(reduce=Mean(), gives="ends: tensors, n: rows")
    def hand_in(self, msg, client) -> Payload:
        return pack(ends=client.session["ends"], n=client.n)
