"""HierFAVG: edge servers average their clients several times before the cloud averages the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, Method, State, knob
from fedllm.core.payload import add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.tree import Branching, check_tree, climb
from fedllm.wire import codec


@dataclass(frozen=True)
class Hierarchical(Branching, Method):
    """FedAvg along a tree of servers: kappa_2 rounds within every edge, then (w_e - w, W_e) up to the root."""

    card = Card(
        title="HierFAVG: hierarchical federated averaging over edges and a cloud",
        paper="Liu et al., Client-Edge-Cloud Hierarchical Federated Learning, ICC 2020, arXiv 1905.06641",
        topic="topology",
        sends="edge links: the trainables and their change in each edge round; between servers: the same once in "
              "kappa_2 edge rounds (counted in the state under `wide_area`)",
        needs="any model and space",
        claim=Claim("with kappa_2 = 1 balanced, deep, unbalanced and partly empty trees all end in the model of flat "
                    "FedAvg (largest relative difference of 3 rounds)", rig="trees", metric="off_flat", holds="<=",
                    threshold=1e-6, kind="exact"),
        also={
            "bytes": Claim("between root and two edges of four clients each goes a quarter of the star's bytes, either "
                           "way (relative difference, framing included)", rig="trees", metric="off_fan_out",
                           holds="<=", threshold=0.01, kind="exact"),
            "iid": Claim("with kappa_2 = 5 and IID edges it is within 5% of the loss of FedAvg after as many client "
                         "rounds", rig="edges", metric="loss", baseline="fedavg", relative="ratio", holds="<=",
                         threshold=1.05, wins=4, options={"knobs": {"fan_out": (2,), "kappa_2": 5}}),
            "regions": Claim("where edges are regions with labels of their own, kappa_2 = 5 ends above the loss of "
                             "kappa_2 = 1 after as many client rounds", rig="edges", metric="loss",
                             baseline="hierarchical", relative="ratio", holds=">", threshold=1.0, wins=4,
                             options={"knobs": {"fan_out": (2,), "kappa_2": 5}, "regions": True})},
        evidence="The layer server_tree gives the tree of kappa_2 = 1 to any method; this one adds kappa_2. Edges have "
                 "no optimizer of their own.",
    )
    kappa_2: int = knob(1, "edge rounds to one round of the cloud", ge=1)

    @property
    def repeats(self) -> int:
        return self.kappa_2

    def init(self, model) -> State:
        return {"theta": model.initial(), "wide_area": {"up": 0, "down": 0}}

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if self.tree:
            check_tree(self.tree, ids, "method.tree")

    def check_layers(self, layers) -> None:
        for layer in layers:
            if layer.algebra.kind == "dp" and layer.algebra.needs == "sum":
                raise CompositionError(f"method 'hierarchical' and layer '{name_of(layer)}' do not fit together: "
                                       "it would account for one sum and each edge takes its own; use fedavg with "
                                       f"the layers {name_of(layer)}, server_tree")

    def round(self, state: State, clients):
        edges = self.places([c.id for c in clients])
        w, weight = dict.fromkeys(edges, state["theta"]), dict.fromkeys(edges, 0.0)
        for _ in range(self.kappa_2):
            outs = yield [Ask(self.local, {c: pack(theta=w[e]) for c in mine}, quorum=0) for e, mine in edges.items()]
            for e, out in zip(edges, outs, strict=True):
                if out.answered:  # w_e <- w_e + sum_k (n_k / W_e) (w_k - w_e), W_e = sum_k n_k
                    w[e], weight[e] = add(w[e], part(out.value, "delta")), out.value["n"]
        mean = Mean()
        sums = {e: mean.lift(pack(delta=sub(w[e], state["theta"]), n=n)) for e, n in weight.items() if n}
        if not sums:
            raise QuorumError(f"Hierarchical.local: no client of {len(edges)} edges answered")
        total, sent = climb(sums, mean.plus)
        links = {p[:k] for p in edges for k in range(1, len(p) + 1)}  # each leads from a server to the one above it
        wide = {"up": state["wide_area"]["up"] + sum(map(codec.size, sent.values())),
                "down": state["wide_area"]["down"] + len(links) * codec.size(pack(theta=state["theta"]))}
        return {**state, "theta": add(state["theta"], part(mean.done(total), "delta")), "wide_area": wide}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)
