"""RaFFM: small devices train the first units of every layer, and the server keeps the weighty ones in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub, zeros_like
from fedllm.core.rng import numpy_stream
from fedllm.spaces.order import ordered, units_of
from fedllm.spaces.slices import Covered, Slice, blocks, cuts_of, joined

LR = {"local.lr": (1e-3, 2e-3, 5e-3)}
MIXED = {"space": {"name": "full"}, "alpha": 1.0}


@dataclass(frozen=True)
class RaFFM(Method):
    """Reorder neurons and heads without changing the function, cut a prefix for each device, average by coverage."""

    card = Card(
        title="RaFFM: resource-aware federated foundation models",
        paper="Yu, Munoz and Jannesari, Bridging the Gap Between Foundation Models and Heterogeneous Federated "
              "Learning, 2023, arXiv 2310.00247",
        topic="heterogeneity: devices",
        sends="down: the first neurons and heads of every layer that the device affords, and what is not cut "
              "(embeddings, norms, head); up: their change, which rows and columns they are, the shapes of all",
        needs="spaces that train a transformer's own weights (full, layers); n_blocks that divides heads and neurons",
        claim=Claim("with devices of mixed sizes the whole model ends with a lower loss on the IID test where the "
                    "weighty units come first than where the cut takes units as they lie", rig="subspace",
                    metric="global_loss", baseline="raffm", relative="difference", holds="<", threshold=0.0,
                    options=MIXED, against={"knobs": {"spp": False}}, grid=LR),
        also={"whole": Claim("and at most 0.05 above FedAvg's, whose clients all hold the whole model",
                             rig="subspace", metric="global_loss", baseline="fedavg", relative="difference",
                             holds="<=", threshold=0.05, options=MIXED, grid=LR)},
        evidence="Authors' code read by the dossier. It divides by the number of clients and not by coverage, orders "
                 "rows of Q and K within a head (wrong under rotary embeddings) and cuts feed-forward neurons that it "
                 "did not order. Here whole heads and neurons are ordered, and the mean is over those who had them.",
    )
    trial = Trial({"n_blocks": 2, "widths": (1, 2)}, space={"name": "full"})

    n_blocks: int = knob(4, "G: a width is a number of G-ths of every layer's heads and neurons", ge=1)
    widths: tuple[int, ...] = knob((1, 2, 4), "widths that devices are dealt, in G-ths; the first client of a round "
                                   "gets the largest, the second the smallest, the rest any")
    spp: bool = knob(True, "weighty units first; else as they lie")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or any(not 1 <= w <= self.n_blocks for w in self.widths):
            raise RecipeError(f"RaFFM.widths = {list(self.widths)} is not allowed; each must be from 1 to n_blocks = "
                              f"{self.n_blocks}: no device trains more than the whole width")

    def check(self, model: Any) -> None:
        cuts_of(model, self.n_blocks, "raffm")

    def init(self, model: Any) -> State:
        theta, cuts = model.initial(), cuts_of(model, self.n_blocks, "raffm")
        units = {str(i): group for i, group in enumerate(units_of(model.net, theta))}
        return {"theta": theta, "t": 0, "cuts": cuts, "units": units, "dealt": {}}

    def round(self, state: State, clients):
        held = dict(zip((c.id for c in clients), self.deal(state["t"], len(clients)), strict=True))
        theta = ordered(state["theta"], list(state["units"].values())) if self.spp else state["theta"]
        views = {c: self.prefix(state["cuts"], w) for c, w in held.items()}
        out = yield Ask(self.local, {c: pack(theta=views[c].take(theta), width=w) for c, w in held.items()})
        return {**state, "theta": add(theta, part(out.value, "delta")), "t": state["t"] + 1, "dealt": held}

    def prefix(self, cuts: Any, width: int) -> Slice:
        """The first `width` of G parts of every layer."""
        return joined([Slice(None, **cuts[str(g)]) for g in range(width)])

    def deal(self, t: int, clients: int) -> list[int]:
        """Each client's width in round t."""
        rest = numpy_stream("raffm", t).choice(self.widths, clients)
        return [int(w) for w in [max(self.widths), min(self.widths), *rest][:clients]]

    @on_client(reduce=Covered(), gives="delta: some, at: places, n: rows, loss?: number")
    def local(self, msg, client):
        sent = part(msg, "theta")
        whole = client.once(nothing, client.model)  # zeros in the shape of all trainables
        cuts = blocks(client.model.net, whole, self.n_blocks)
        view = joined(cuts[: msg["width"]])
        fitted = client.fit(view.put(whole, sent))  # zeros elsewhere have zero gradients: this is the small network
        return pack(delta=sub(view.take(fitted.theta), sent), at=view.places(whole), n=client.n, loss=fitted.loss)

    def report(self, state: State):
        return {"width_of_each_client_in_the_last_round": dict(state["dealt"])}


def nothing(model: Any) -> Tree:
    """Zeros in the shape of all trainables."""
    return zeros_like(model.initial())
