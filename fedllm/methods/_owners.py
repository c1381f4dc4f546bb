"""Methods over things of which each client holds a part: owners tell a vector each, and one of them has the labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, DataError, QuorumError, RecipeError, Withheld
from fedllm.core.form import need
from fedllm.core.layer import name_of
from fedllm.core.method import Method, State, knob
from fedllm.core.payload import Payload, Tree
from fedllm.core.rng import torch_stream
from fedllm.local.objective import Objective
from fedllm.local.objectives.prototypes import representation
from fedllm.spaces.mlp_head import OUTER, MLPHead

MOST = 1e3
"""No number of a vector is larger: vectors have length 1, and noise."""


@dataclass(frozen=True)
class Joint:
    """An answer made of several owners' parts, who had one, and how sure it is."""

    question: str
    answer: str | None
    clients: tuple[str, ...] = ()
    confidence: float = 0.0


def mark(name: object) -> int:
    """What a thing is called between owners: a hash of 63 bits, which whoever knows the name can make as well."""
    return int.from_bytes(hashlib.sha256(f"fedllm entity {name}".encode()).digest()[:8], "big") >> 1


def places(client: Client, rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Where each thing's part lies among these rows, by its mark; DataError for a row without an id, or two of one."""
    out: dict[int, int] = {}
    for i, row in enumerate(rows):
        if (name := row.get("id")) is None:
            raise DataError(f"client '{client.id}': row {i + 1} has no 'id', by which the parts of one thing find each "
                            "other; name the column by data.entity")
        if out.setdefault(mark(name), i) != i:
            raise DataError(f"client '{client.id}' has two rows of id {str(name)[:60]!r}; allowed is one part of a "
                            "thing at each owner")
    return out


def listed(things: Iterable[int]) -> Tensor:
    """Marks as they leave an owner: numbers [N], in an order that tells nothing."""
    return torch.tensor(sorted(things), dtype=torch.int64)


def drawn(marks: Sequence[int], count: int, size: int, rng: np.random.Generator) -> list[list[int]]:
    """So many batches of things, each thing once before any comes again."""
    order: list[str] = []
    while len(order) < count * size:
        order += [marks[int(i)] for i in rng.permutation(len(marks))]
    return [sorted(set(order[i * size : (i + 1) * size])) for i in range(count)]


def seen(up: Mapping[str, Payload], owners: Sequence[str], shape: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
    """All owners' vectors h [n, B, d], and of what each has a part, has [n, B]; who is silent has none."""
    n, (b, d) = len(owners), shape
    h, has = like.new_zeros(n, b, d), torch.zeros(n, b, dtype=torch.bool)
    for k, owner in enumerate(owners):
        if owner in up:
            h[k], has[k] = up[owner]["h"].to(like), up[owner]["has"].bool()
    return {"h": h, "has": has}


@dataclass(frozen=True)
class Bridged(Objective):
    """<g, h>, h the row's representation: its gradient is J^T g, what autograd would have done with a g = dL/dh that
    came over the wire."""

    needs: ClassVar[tuple[str, ...]] = ("g",)

    def losses(self, model: Any, batch: Any, side: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        h = representation(model, batch)
        return (h * side["g"].to(h)).sum(1), torch.ones(len(h), dtype=h.dtype, device=h.device)


@dataclass(frozen=True)
class Owned(Method):
    """What owners do: train an encoder of their own, show vectors, follow gradients, and judge by labels."""

    serves, only_fits, mixes, answers_for_clients = False, False, "models", True
    metrics: ClassVar = {"alone": "max"}

    own_rounds: int = knob(1, "rounds in which owners train by their own labels; from the last on the server learns",
                           ge=0)
    steps: int = knob(20, "steps of a round at the server", ge=1)
    batch: int = knob(32, "things of a step", ge=1)
    labels_at: str = knob("", "who holds the labels; '': the first client by name")
    encoders: Literal["frozen", "trained"] = knob("frozen", "trained: owners' encoders follow dL/dh in each step",
                                                  options=("frozen", "trained"))
    noise: float = knob(0.0, "deviation of what an owner adds to each number; no epsilon is claimed", ge=0)

    @property
    def repeats(self) -> int:
        return self.steps + 1

    def check(self, model: Any) -> None:
        if model.task != "classification" or not isinstance(model.space, MLPHead):
            raise CompositionError(f"method '{name_of(self)}', data.task = {model.task!r} and space "
                                   f"'{model.space.stem}' do not fit together: what owners tell is a hidden layer; use "
                                   "data.task = 'classification' and the space 'mlp_head'")

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if len(ids) < 2 or cohort < len(ids):
            raise RecipeError(f"clients.per_round = {cohort} of {len(ids)} clients: what they hold are parts of one "
                              "thing, so that all must be asked; allowed is all of two or more")
        if self.labels_at and self.labels_at not in ids:
            raise RecipeError(f"method.labels_at = {self.labels_at!r} is no client; allowed are {', '.join(ids)}")

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        ids = {c: {str(r["id"]) for r in some if "id" in r} for c, some in rows.items()}
        if bare := next((c for c, some in rows.items() if any("id" not in r for r in some)), None):
            raise DataError(f"client '{bare}' has rows without 'id', by which the parts of one thing find each other; "
                            "name the column by data.entity")
        holder = self.labels_at or min(rows)
        if not any(ids[holder] & ids[c] for c in rows if c != holder):
            raise DataError(f"client '{holder}' holds the labels, and no other has a part of any of its "
                            f"{len(ids[holder])} things; data.entity is the column that names them")

    def check_work(self, local: Any, rounds: int) -> None:
        if self.encoders == "trained" and self.batch > local.batch_size:
            raise CompositionError(f"method.batch = {self.batch} and local.batch_size = {local.batch_size} do not fit "
                                   "together: an owner's step is of the whole batch; allowed is up to local.batch_size")

    def begun(self, state: State, clients: Sequence[Any]) -> Program:
        """The state after the owners' own part of a round: encoders trained, and known what is to be learned from."""
        owners = state["owners"] or sorted(c.id for c in clients)
        holder, own = self.labels_at or owners[0], state["round"] < self.own_rounds
        state = {**state, "owners": owners, "holder": holder, "round": state["round"] + 1}
        told = {c.id: {"own": own, "tell": c.id == holder and not state["ids"]} for c in clients}
        if asked := {c: m for c, m in told.items() if m["own"] or m["tell"]}:
            out = yield Ask(self.ready, asked)
            if holder in out and asked[holder]["tell"]:
                state |= {"ids": out[holder]["ids"].tolist()}
        if not state["ids"]:
            raise QuorumError(f"client '{holder}' holds the labels, and has not said of what")
        return state

    def marks(self, msg: Payload, reply: Payload) -> None:
        need(("ids" in reply) == bool(msg.get("tell", True)), "'ids' are there or lacking")
        ids = reply["ids"].tolist() if "ids" in reply else []
        need(len(set(ids)) == len(ids), "'ids' are no marks of things, each once")

    @on_client(gives="ids?: whole, done: count", fits=marks)
    def ready(self, msg: Payload, client: Client) -> Payload:
        if msg["own"]:
            client.memory["theta"] = client.fit(self.encoder(client)).theta
        return {"done": 1, **({"ids": listed(places(client, client.data))} if msg["tell"] else {})}

    def encoder(self, client: Client) -> Tree:
        """The owner's own trainables, which begin as nobody else's do."""
        if "theta" not in client.memory:
            stream = torch_stream(client.model.seed, "owners", client.id)
            client.memory["theta"] = client.model.space.start(client.model.net, stream)
        return client.memory["theta"]

    def fit_shown(self, msg: Payload, reply: Payload) -> None:
        h, has, b = reply["h"], reply["has"], len(msg["ids"])
        need(h.shape == (b, msg["d"]) and has.shape == (b,), f"'h' and 'has' have shapes {tuple(h.shape)} and "
             f"{tuple(has.shape)}, allowed are {(b, msg['d'])} and ({b},)")
        need(float(h.abs().max()) <= MOST, f"'h' holds a number above {MOST:g}")

    @on_client(gives="h: tensor, has: mask", fits=fit_shown)
    def show(self, msg: Payload, client: Client) -> Payload:
        """h_k = f_k(x_k) of these things, as far as it has their parts."""
        return self.shown(msg, client, client.data, client.tokens)

    @on_client(gives="h: tensor, has: mask", fits=fit_shown, test=True)
    def tell(self, msg: Payload, client: Client) -> Payload:
        """The same of things that are asked about, which may be kept back."""
        rows = list(client.held_out("local"))
        if msg["any"]:
            kept = places(client, rows)
            rows += [row for row in client.data if mark(row.get("id")) not in kept]
        return self.shown(msg, client, rows, None)

    def shown(self, msg: Payload, client: Client, rows: Sequence[Any], tokens: Sequence[Any] | None) -> Payload:
        if "theta" not in client.memory and self.own_rounds:
            raise Withheld(f"client '{client.id}' has lost its encoder, or never trained one")
        at, theta = places(client, rows), self.encoder(client)
        mine = [at[i] for i in msg["ids"] if i in at]
        has = torch.tensor([i in at for i in msg["ids"]], dtype=torch.bool)
        h = torch.zeros(len(has), msg["d"], dtype=torch.promote_types(client.model.net.dtype, torch.float32))
        if mine:
            some = [tokens[i] for i in mine] if tokens is not None else client.encode([rows[i] for i in mine])
            h[has] = torch.from_numpy(client.measure(theta, some, representation)).to(h)
        if self.noise:
            h = h + self.noise * torch.from_numpy(client.rng("owners").normal(0, 1, h.shape)).to(h)
        client.session.update(at=mine, has=has)
        return {"h": h, "has": has}

    def slope(self, msg: Payload, reply: Payload) -> None:
        g = reply["g"]
        need(g.shape == msg["z"].shape and float(g.abs().max()) <= 1, "'g' is no gradient of these logits")

    @on_client(gives="g: tensor, loss: number", fits=slope)
    def judge(self, msg: Payload, client: Client) -> Payload:
        """dCE/dz = (softmax(z) - one-hot(y)) / B"""
        at, z = places(client, client.data), msg["z"]
        y = torch.tensor([int(client.data[at[i]]["label"]) for i in msg["ids"]])
        return {"g": (z.softmax(-1) - F.one_hot(y, z.shape[1])) / len(y), "loss": float(F.cross_entropy(z, y))}

    @on_client(gives="done: count")
    def turn(self, msg: Payload, client: Client) -> Payload:
        """A step of the encoder along J^T dL/dh, g [B, d] of the things that it has shown last."""
        mine = client.session["at"]
        if mine:
            rows = [client.tokens[i] for i in mine]
            g = msg["g"][client.session["has"]] * len(mine)  # a step is of the mean over the rows that it has
            done = client.fit(self.encoder(client), on=rows, objective=Bridged(), side={"g": list(g)}, steps=1,
                              moments=client.memory.get("inner"), freeze=[f"{OUTER}.*"])
            client.memory["theta"], client.memory["inner"] = done.theta, done.moments
        return {"done": 1}

    def asked(self, state: State, clients: Sequence[Any], ids: Sequence[int]) -> Ask:
        """Owners' vectors of these things."""
        return Ask(self.show, {c.id: {"ids": list(ids), "d": state["d"]} for c in clients})

    def joined(self, state: State, up: Mapping[str, Payload], count: int) -> Program:
        """What the server makes of `count` things of which owners told: z [B, C], the labels' names, how sure."""
        raise NotImplementedError

    def about(self, state: State, clients: Sequence[Any], ids: Sequence[int], any: bool) -> Program:
        """(what the server makes of these things, who has a part of one)"""
        up = yield Ask(self.tell, {c.id: {"ids": list(ids), "d": state["d"], "any": any} for c in clients})
        return (yield from self.joined(state, up, len(ids))), tuple(c for c in up if bool(up[c]["has"].any()))

    def answer(self, query: str, clients: Sequence[Any], state: State | None = None) -> Program:
        """`query` is a thing's id; no answer where nobody has a part of it."""
        if not (state or {}).get("net"):
            raise QuorumError("there is an answer once the server has learned; let a round go by")
        said, who = yield from self.about(state, clients, [mark(query)], True)  # type: ignore[arg-type]
        return Joint(query, said["said"][0], who, said["sure"][0]) if who else Joint(query, None)

    def examine(self, state: State, clients: Sequence[Any], rows: Sequence[Any]) -> Program:
        raise DataError("this method joins parts that owners hold, and the rows of the global test are nobody's; set "
                        "data.test = 0.0 and keep things back at owners by data.client_test")
        yield

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        """The joint answers about what the labels' holder keeps back, by its labels."""
        if on != "local":
            return (yield from self.examine(state, clients, ()))
        holder = state.get("holder") or self.labels_at or min(c.id for c in clients)
        ids = (yield Ask(self.tests, {holder: {}}))[holder]["ids"].tolist()
        if not ids or not state["net"]:
            return {holder: {"n": 0}}
        said, _ = yield from self.about(state, clients, ids, False)
        return (yield Ask(self.score, {holder: {"z": said["z"], "ids": ids}}))

    @on_client(gives="ids: whole", fits=marks, test=True)
    def tests(self, msg: Payload, client: Client) -> Payload:
        return {"ids": listed(places(client, client.held_out("local")))}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        """Loss and accuracy of the joint answers, and how often its own head is right (`alone`)."""
        rows, z = client.held_out("local"), msg["z"]
        at = places(client, rows)
        y = torch.tensor([int(rows[at[i]]["label"]) for i in msg["ids"]])
        return {"n": len(y), "loss": float(F.cross_entropy(z, y)),
                "accuracy": float((z.argmax(-1) == y).double().mean()),
                "alone": client.score(self.encoder(client), on="local")["accuracy"]}
