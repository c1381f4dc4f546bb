"""Architectures under federation: clients train the first part of every layer's width, and a shape has a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub, tensor_bytes, zeros_like
from fedllm.local.objectives.own_words import OwnWords, targets
from fedllm.models.narrow import narrow, nested, shapes_of
from fedllm.spaces.params import Params
from fedllm.spaces.slices import Covered, Slice

RATES = {"local.lr": (3e-3, 1e-2, 3e-2)}
ONE = {"knobs": {"widths": (1.0,)}, "local": {"optimizer": "sgd"}, "norm": "layer"}


@dataclass(frozen=True)
class FedArch(Method):
    """W[: r o, : r i] of every matrix at a client of width r; each entry is the mean over the clients that hold it.

    What nobody of a round holds stays. Which shape the whole has is the recipe's `model.shape`.
    """

    card = Card(
        title="Architecture choices under federation: nested widths and budgets",
        paper="Diao, Ding and Tarokh, HeteroFL, ICLR 2021, arXiv 2010.01264 (widths); Hsieh et al., The Non-IID Data "
              "Quagmire, ICML 2020, arXiv 1910.00189 (norms)",
        topic="pre-training",
        sends="down: the first heads, neurons and states of every layer that the client's width has; up: their change, "
              "which rows and columns they are, the shapes of all",
        needs="space full or layers; widths below 1: a transformer with separate projections, of whose heads and sizes "
              "they leave whole numbers",
        claim=Claim("eight clients of two of eight labels each: a network with LayerNorm ends with a lower loss on the "
                    "IID test than the same one with BatchNorm, whose statistics are averaged, each at its best rate",
                    rig="norms", metric="global_loss", baseline="fed_arch", relative="difference", holds="<",
                    threshold=0.0, options=ONE, against={"knobs": {"widths": (1.0,)}, "norm": "batch"},
                    grid={"local.lr": (0.03, 0.1, 0.3)}),
        also={"nested": Claim("two of four clients hold half the width: the whole model ends with a lower loss on "
                              "held-out rows than FedAvg of the two others alone", rig="widths", metric="loss",
                              baseline="fedavg", relative="difference", holds="<", threshold=0.0, grid=RATES,
                              against={"only": (0, 2)},
                              unequal="the small clients' steps are what is claimed to be worth something"),
              "scaled": Claim("and a lower one than without the division by the width", rig="widths", metric="loss",
                              baseline="fed_arch", relative="difference", holds="<", threshold=0.0, grid=RATES,
                              against={"knobs": {"scaled": False}}),
              "memory": Claim("a fit at half the width peaks below 0.35 of the whole one's bytes (a Llama of width "
                              "256, AdamW, 8 rows of 16 tokens)", rig="narrow_memory", metric="share", holds="<",
                              threshold=0.35, kind="exact", seeds=3)},
        evidence="HeteroFL as a dossier has it. The division by r is of token embeddings and of the linear maps of "
                 "blocks, not of the last map; ten seeds do not tell whether it helps (0.007 nats, open). BatchNorm is "
                 "in a rig and offered nowhere. A site loads the whole model and trains the narrow one.",
    )
    trial = Trial({"widths": (1.0, 0.5)}, space={"name": "full"})
    widths: tuple[float, ...] = knob((1.0, 0.5), "widths of clients, dealt in the order in which they come: shares of "
                                     "every layer's heads, neurons and states, of which one is 1")
    scaled: bool = knob(True, "divide what a narrow client's embeddings and maps give by its width while it trains")
    masked: bool = knob(False, "a client learns among the targets that stand in its own rows alone")
    budget_bytes: int | None = knob(None, "bytes of the widest client's trainables each way, which no model may "
                                    "exceed", ge=1)
    budget_memory: int | None = knob(None, "and bytes of its weights, gradients and two moments", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or any(not 0 < w <= 1 for w in self.widths) or 1.0 not in self.widths:
            raise RecipeError(f"FedArch.widths = {list(self.widths)} is not allowed; each must be > 0 and <= 1, and "
                              "one must be 1, or nobody would train the rest of the model")

    @property
    def only_fits(self) -> bool:  # type: ignore[override]
        """Which targets are its own a client sees in its rows."""
        return not self.masked

    def check(self, model: Any) -> None:
        if not isinstance(model.space, Params):
            raise CompositionError(f"method 'fed_arch' and space '{model.space.stem}' do not fit together: it cuts the "
                                   "network's own weights; use the space 'full' or 'layers'")
        if self.masked and model.rules.net not in ("causal", "pooled", "tokens"):
            raise CompositionError(f"method.masked = true and data.task = {model.task!r} do not fit together: it is "
                                   "for next words and for classes; leave it out")
        size = tensor_bytes(model.initial())
        for key, budget, needed in (("bytes", self.budget_bytes, size), ("memory", self.budget_memory, 4 * size)):
            if budget is not None and needed > budget:
                raise RecipeError(f"method.budget_{key} = {budget} is not enough for this model, which takes {needed}; "
                                  "allowed is that or more, or a smaller model.shape")

    def init(self, model: Any) -> State:
        self.check(model)
        shapes = {str(float(w)): shapes_of(narrow(model, w).initial()) for w in self.widths}
        return {"theta": model.initial(), "shapes": shapes, "dealt": {}}

    def dealt(self, state: State, clients: Sequence[ClientInfo]) -> dict[str, float]:
        """Client -> width, with those of these clients."""
        out = dict(state["dealt"])
        for c in clients:
            out.setdefault(c.id, float(self.widths[len(out) % len(self.widths)]))
        return out

    def view(self, state: Any, width: float) -> Slice:
        """Where a client of this width is in the trainables."""
        return nested(state["shapes"]["1.0"], state["shapes"][str(width)])

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        dealt, theta = self.dealt(state, clients), state["theta"]
        parts = {w: pack(theta=self.view(state, w).take(theta), width=w) for w in {dealt[c.id] for c in clients}}
        out = yield Ask(self.local, {c.id: parts[dealt[c.id]] for c in clients})
        return {**state, "theta": add(theta, part(out.value, "delta")), "dealt": dealt}

    @on_client(reduce=Covered(), gives="delta: some, at: places, n: rows, loss?: number")
    def local(self, msg, client):
        sent, whole = part(msg, "theta"), client.once(nothing, client.model)
        own = client.having(narrow(client.model, msg["width"], self.scaled))
        goal = {"objective": OwnWords(), "side": {"words": [targets(client)] * client.n}} if self.masked else {}
        fitted = own.fit(sent, **goal)
        at = nested(shapes_of(whole), shapes_of(sent)).places(whole)
        return pack(delta=sub(fitted.theta, sent), at=at, n=client.n, loss=fitted.loss)

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        """Clients score what they can hold; the server the whole."""
        held = {**self.dealt(state, [c for c in clients if c.id != SERVER]), SERVER: 1.0}
        parts = {w: pack(theta=self.view(state, w).take(state["theta"]), width=w, on=on)
                 for w in {held[c.id] for c in clients}}
        return (yield Ask(self.score, {c.id: parts[held[c.id]] for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        return client.having(narrow(client.model, msg["width"])).score(part(msg, "theta"), on=msg["on"])

    def report(self, state: State):
        sizes = {w: 4 * sum(int(np.prod(s)) for s in shapes.values()) for w, shapes in state["shapes"].items()}
        return {"widths": {w: {"clients": sum(v == float(w) for v in state["dealt"].values()), "bytes_each_way": b,
                               "bytes_in_memory": 4 * b} for w, b in sizes.items()}}


def nothing(model: Any) -> Tree:
    """Zeros in the shape of all trainables."""
    return zeros_like(model.initial())
