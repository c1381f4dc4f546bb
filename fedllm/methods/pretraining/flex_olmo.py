"""FlexOlmo: every owner trains an expert of its own once, against one frozen anchor; merged is put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Tree, pack, part
from fedllm.models.batch import Batch
from fedllm.models.known_by import base_digest
from fedllm.models.model import Model
from fedllm.spaces.experts import MINE, PUBLIC, Experts, leaf, renamed

LR = {"local.lr": (1e-3, 3e-3, 1e-2)}
FULL = {"space": "full"}


@dataclass(frozen=True)
class FlexOlmo(Method):
    """No rounds: who has not delivered is asked, once; who leaves is left out, and the rest is as if it never came."""

    card = Card(
        title="FlexOlmo: experts trained apart, merged by a router without joint training",
        paper="Shi, Bhagia, Farhat et al., FlexOlmo: Open Language Models for Flexible Data Use, NeurIPS 2025, arXiv "
              "2507.07024",
        topic="pre-training",
        sends="once. down: the public row of the router (d numbers) and shapes; up: an expert, layers * (3 d f + d + "
              "1) numbers, of which the router's row starts as the mean of the owner's documents",
        needs="the space experts (a Llama, Qwen, Mistral or OLMo); public rows at the server; one public model at all "
              "owners; local.steps for all that an owner trains",
        claim=Claim("three domains beside a public one: the merge's mean loss on the closed domains is below that of "
                    "the uniform average of three models trained apart, on the same steps", rig="domains",
                    metric="closed_loss", baseline="fedavg", relative="difference", holds="<", threshold=0.0, grid=LR,
                    against=FULL),
        also={"public": Claim("and its mean loss there is below the public model's", rig="domains",
                              metric="over_public", holds="<", threshold=0.0, options={"local": {"lr": 3e-3}}),
              "leaves": Claim("left out by name, the loss on its domain is bit for bit that of a merge that never had "
                              "it", rig="domains", metric="left_apart", holds="<=", threshold=0.0, kind="exact"),
              "forgets": Claim("and at least 0.5 above that of the merge with it: what it knew is gone", rig="domains",
                               metric="left_rise", holds=">", threshold=0.5, options={"local": {"lr": 3e-3}})},
        evidence="Authors' code from a dossier. Documents are the public model's own mean states, of length one; the "
                 "softmax is over the chosen experts alone; the router is not tuned afterwards, which no owner could "
                 "be taken out of again. The bias is kept, which transformers' `flex_olmo` has no place for. "
                 "Over nine seeds a tie with the average of whole models (0.01 above): open.",
    )
    trial = Trial(space={"name": "experts"}, local={"steps": 2})
    only_fits = False
    without: tuple[str, ...] = knob((), "owners whose expert is left out at inference")

    def check(self, model: Any) -> None:
        if not isinstance(model.space, Experts):
            raise CompositionError(f"method 'flex_olmo' and space '{model.space.stem}' do not fit together: each owner "
                                   "trains an expert beside the public one; use the space 'experts'")

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        if odd := [c for c in self.without if c not in ids]:
            raise RecipeError(f"method.without = {list(self.without)!r}: '{odd[0]}' owns no expert; allowed are "
                              f"{', '.join(ids)}")
        if odd := [c for c in ids if c in (MINE, PUBLIC)]:
            raise RecipeError(f"client '{odd[0]}': flex_olmo's experts are called by their owners, and that name is "
                              "taken; rename the client")

    def public_at(self):
        return ("server",)

    def init(self, model: Any) -> State:
        like = {n: list(t.shape) for n, t in model.initial().items()}
        return {"like": like, "of": base_digest(model), "anchor": None, "experts": {}}

    def round(self, state: State, clients) -> Program:
        if state["anchor"] is None:
            told = yield Ask(self.anchors, {SERVER: {}})
            state = {**state, "anchor": told[SERVER]["row"]}
        if new := [c.id for c in clients if c.id not in state["experts"]]:
            msg = pack(row=state["anchor"], of=state["of"], like=state["like"])
            out = yield Ask(self.local, dict.fromkeys(new, msg), quorum=0)
            state = {**state, "experts": {**state["experts"], **{c: part(out[c], "expert") for c in out}}}
        return state

    @on_server
    def anchors(self, msg, client):
        return {"row": mean_state(client, client.public)}

    def fits(self, msg, reply):
        """An upload is one expert of this very model: a site with another architecture, or other weights, is refused.
        """
        like, expert = part(msg, "like"), part(reply, "expert")
        need(reply["of"] == msg["of"], f"its public model is {reply['of'][:12]}, and the server's {msg['of'][:12]}: "
             "experts of other models cannot be merged")
        odd = sorted(like.keys() ^ expert.keys()) or [n for n, t in expert.items() if list(t.shape) != like[n]]
        need(not odd, f"'expert/{odd[0] if odd else ''}' is no tensor of this model's experts")

    @on_client(gives="expert: tensors, of: mark, loss?: number", fits=fits)
    def local(self, msg, client):
        theta = client.model.initial()
        row = mean_state(client, client.tokens)
        theta |= {n: row.to(t) for n, t in theta.items() if n.endswith(".router")}
        anchor = public_rows(theta, msg["row"])
        fitted = client.fit({**theta, **anchor}, freeze=list(anchor))
        expert = {n: t for n, t in fitted.theta.items() if n not in anchor}
        return pack(expert=expert, of=client.once(base_digest, client.model), loss=fitted.loss)

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        """The experts side by side; none: the public model."""
        theta: Tree = {}
        for owner, expert in state["experts"].items():
            if owner not in self.without:
                theta |= renamed(expert, MINE, owner)
        return {**theta, **public_rows(theta, state["anchor"])}, None

    def report(self, state: State):
        return {"experts_of": sorted(state["experts"]), "left_out": sorted(self.without)}


def mean_state(client: Any, rows: Any) -> Tensor:
    """The mean of the public model's mean last states of these rows, of length one [d]."""
    states = torch.from_numpy(client.measure({}, rows, pooled))  # [rows, d]
    return F.normalize(states.double().mean(0), dim=0)


def pooled(model: Model, batch: Batch) -> Tensor:
    """[N, d]"""
    m = batch.mask.to(model.net.dtype)[..., None]
    return (model.hidden(batch) * m).sum(1) / m.sum(1).clamp(min=1)


def public_rows(theta: Tree, row: Tensor) -> Tree:
    """The public expert's row of the router, in every block that has experts."""
    return {leaf(path, PUBLIC, "router"): row.float() for path in sorted({n.partition(".experts.")[0] for n in theta})}
