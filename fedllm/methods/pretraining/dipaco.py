"""DiPaCo: a modular network of which each client trains one path, that its documents are routed to, and no more."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.form import shaped
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, scale, sub, zeros_like
from fedllm.core.rng import seed_of
from fedllm.local.objectives.task import row_sums
from fedllm.models.emulator import blocks_of
from fedllm.spaces.layers import block_of
from fedllm.spaces.params import Params

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}
LOCAL = {"local": {"optimizer": "adamw", "lr": 3e-3, "steps": 10}}
SHARED = "all"  # the module on every path: embeddings, last norm and head


@dataclass(frozen=True)
class DiPaCo(Method):
    """A path is one module of each level; a module's step is the mean of its paths' pseudo-gradients, by Nesterov."""

    card = Card(
        title="DiPaCo: distributed path composition",
        paper="Douillard et al., DiPaCo: Distributed Path Composition, 2024, arXiv 2403.10616",
        topic="pre-training",
        sends="once, up: the documents' mean word embedding (d numbers); then down: one path, up: its change",
        needs="a network of blocks, space full or layers; local.optimizer adamw; documents of few kinds a client",
        claim=Claim("four kinds of document, 2 levels of 2 modules: routed, the mean loss on all kinds is below that "
                    "of a dense network of one path's size (DiLoCo) after the same steps", rig="kinds",
                    metric="loss", baseline="diloco", relative="difference", holds="<", threshold=0.0, grid=LR,
                    options=LOCAL),
        also={"bytes": Claim("and no client sends or gets more in a round than with the dense one (but for 1 % of "
                             "names)", rig="kinds", metric="round_bytes", baseline="diloco", relative="ratio",
                             holds="<=", threshold=1.01, kind="exact", options=LOCAL)},
        evidence="From memory and a dossier. Rows stay, so that clients are clustered (k-means of their means); a test "
                 "row takes the nearest center's path. Routes stay; no early stop. Over ten seeds a tie: open.",
    )
    trial = Trial({"levels": 2}, space={"name": "full"}, local={"steps": 2},
                  silent="which paths there are follows from all who are asked")
    serves = only_fits = False
    levels: int = knob(2, "L: runs of consecutive blocks, each in E forms", ge=1)
    modules_a_level: int = knob(2, "E: there are E^L paths", ge=1, le=64)
    route_prefix: int = knob(32, "first tokens of a document by which it is routed", ge=1)
    rescale: Literal["none", "sqrt"] = knob("sqrt", "a module's step times the root of how many paths moved it",
                                            options=("none", "sqrt"))
    outer_lr: float = knob(0.7, "the server's rate", gt=0)
    outer_momentum: float = knob(0.9, "of the server's SGD with Nesterov momentum", ge=0, lt=1)

    def check(self, model: Any) -> None:
        if not isinstance(model.space, Params):
            raise CompositionError(f"method 'dipaco' and space '{model.space.stem}' do not fit together: modules are "
                                   "blocks of the network's own weights; use the space 'full'")
        if self.levels > (depth := len(blocks_of(model.net))):
            raise RecipeError(f"DiPaCo.levels = {self.levels} leaves a path without modules at some level: the model "
                              f"has {depth} blocks; allowed are 1 to {depth}")

    def init(self, model: Any) -> State:  # modules of one level begin alike
        depth, every = len(blocks_of(model.net)), range(self.modules_a_level)
        level = {n: None if (b := block_of(n)) is None else b * self.levels // depth for n in model.initial()}
        theta = {f"{m}/{n}": t for n, t in model.initial().items()
                 for m in ([SHARED] if level[n] is None else [f"{level[n]}.{e}" for e in every])}
        return {"theta": theta, "b": {}, "level": level, "centers": None, "paths": {},
                "width": model.words.shape[1]}

    def on_path(self, state: State, path: int) -> dict[str, str]:  # its digits in base E are its modules
        digit = [path // self.modules_a_level**i % self.modules_a_level for i in range(self.levels)]
        return {n: f"{SHARED if at is None else f'{at}.{digit[at]}'}/{n}" for n, at in state["level"].items()}

    def tree(self, state: State, path: int) -> Tree:
        return {n: state["theta"][key] for n, key in self.on_path(state, path).items()}

    def round(self, state: State, clients) -> Program:
        if new := [c.id for c in clients if c.id not in state["paths"]]:
            seen = yield Ask(self.looks, {c: {"size": state["width"]} for c in new}, quorum=0)
            state = self.routed(state, {c: seen[c]["mean"] for c in seen})
        paths = {c.id: state["paths"][c.id] for c in clients if c.id in state["paths"]}
        out = yield Ask(self.local, {c: pack(theta=self.tree(state, p)) for c, p in paths.items()})
        return self.merge(state, {c: (paths[c], part(out[c], "delta")) for c in out})

    def routed(self, state: State, means: Mapping[str, Tensor]) -> State:
        from sklearn.cluster import KMeans

        if not means:
            return state
        x, centers = torch.stack(list(means.values())).double(), state["centers"]  # of those who come first
        if centers is None:
            k = min(self.modules_a_level**self.levels, len(x.unique(dim=0)))
            fit = KMeans(k, n_init=4, random_state=seed_of("dipaco") % 2**31).fit(x.numpy())
            centers = torch.from_numpy(fit.cluster_centers_)
        near = torch.cdist(x, centers).argmin(1).tolist()
        return {**state, "centers": centers, "paths": {**state["paths"], **dict(zip(means, near, strict=True))}}

    def merge(self, state: State, out: Mapping[str, tuple[int, Tree]]) -> State:
        """Delta_j = mean over the clients whose path has j, times sqrt(paths); b <- mu b + Delta, as torch's SGD."""
        got: dict[str, list[tuple[int, Tensor]]] = {}
        for path, delta in out.values():
            for n, key in self.on_path(state, path).items():
                got.setdefault(key, []).append((path, delta[n]))
        root = {k: len({p for p, _ in v}) ** 0.5 if self.rescale == "sqrt" else 1.0 for k, v in got.items()}
        g = {k: functools.reduce(torch.add, [t for _, t in v]) / len(v) * root[k] for k, v in got.items()}
        b = add(scale({**zeros_like(g), **{k: t for k, t in state["b"].items() if k in g}}, self.outer_momentum), g)
        moved = add({k: state["theta"][k] for k in g}, add(g, b, self.outer_momentum), -self.outer_lr)
        return {**state, "theta": {**state["theta"], **moved}, "b": {**state["b"], **b}}

    @on_client(gives="mean: tensor", fits=lambda self, msg, reply: shaped("mean", reply["mean"], (msg["size"],)))
    def looks(self, msg, client):
        return {"mean": torch.from_numpy(self.features(client, client.tokens)).mean(0)}

    def features(self, client: Any, rows: Any) -> np.ndarray:  # [rows, d], by the base's embeddings
        words = client.model.words.double().numpy()
        return np.stack([words[row.ids[: self.route_prefix]].mean(0) for row in rows])

    @on_client(gives="delta: tree, loss?: number")
    def local(self, msg, client):
        theta = part(msg, "theta")
        fitted = client.fit(theta, moments=client.memory.get("inner"))
        client.memory["inner"] = fitted.moments
        return pack(delta=sub(theta, fitted.theta), loss=fitted.loss)

    def modules(self, state: State) -> Mapping[str, Tree]:
        return {f"path-{p}": self.tree(state, p) for p in sorted(set(state["paths"].values()))}

    def evaluate(self, state: State, clients, on: str) -> Program:
        paths = sorted(set(state["paths"].values())) or [0]
        centers = None if state["centers"] is None else state["centers"][paths]
        trees = {str(i): self.tree(state, p) for i, p in enumerate(paths)}
        return (yield Ask(self.score, {c.id: pack(on=on, centers=centers, **trees) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        if not (rows := client.encode(client.held_out(msg["on"]))):
            return {"n": 0}
        x = torch.from_numpy(self.features(client, rows))
        near = torch.cdist(x, msg.get("centers", x[:1])).argmin(1).numpy()  # each row down its own path
        told = [client.measure(part(msg, str(p)), [rows[i] for i in np.flatnonzero(near == p)], row_sums)
                for p in sorted(set(near.tolist()))]
        loss, count = np.concatenate(told).sum(0)
        return {"n": len(rows), "loss": float(loss / max(1.0, count))}
