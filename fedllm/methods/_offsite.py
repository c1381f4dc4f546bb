"""Offsite tuning: clients train the last blocks of a model of which they hold only a thinned copy, the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.layer import name_of
from fedllm.core.method import Method, State, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.data.encode import batches
from fedllm.local.align import View, align, align_work
from fedllm.local.terms import Proximal, sum_lanes
from fedllm.methods._factors import need_lora
from fedllm.models.emulator import KEPT, blocks_of, emulator, renamed
from fedllm.models.model import Model
from fedllm.spaces.layers import block_of
from fedllm.spaces.lora import LoRA, factors, names_of


@dataclass(frozen=True)
class Merged:
    """weight * sum_m ||B_m A_m - B_m^0 A_m^0||_F^2, from r x r products; `tensors` are the factors at the start."""

    weight: float
    tensors: Tree

    @property
    def key(self):
        return ("merged", self.weight)

    def loss(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        out = {}
        for path in factors(tensors):
            b, a = names_of(path)
            u = torch.cat([theta.get(b, tensors[b]), -tensors[b]], -1)  # [K, o, 2r]
            v = torch.cat([theta.get(a, tensors[a]), tensors[a]], -2)  # [K, 2r, i]
            out[path] = (u.mT @ u) * (v @ v.mT)  # sums to ||U V||^2
        return self.weight * sum_lanes(out)


def held_to(space: Any, a: Tree, weight: float) -> list[Any]:
    """The term weight * ||merge(A) - merge(A_t)||^2 over A, which is `a` at the start; none for a weight of 0."""
    if weight and isinstance(space, LoRA):
        s = space.scale(next(iter(factors(a).values()))[1].shape[0])
        return [Merged(weight * s * s, a)]
    return [Proximal(2 * weight, a)] if weight else []


def brought_closer(client: Any, thin: Model, a: Tree, plugged: Tree, e: Tree, top: int, steps: int, lr: float,
                   gamma: float) -> tuple[Tree, float]:
    """E trained on public rows so that the emulator `thin` with A (`a`; in the whole model `plugged`) says what the
    whole model does, where the middle ends `top` blocks before the last and at the head; with the mean loss."""
    ends = [len(blocks_of(m.net)) - top for m in (client.model, thin)]
    teacher = View(client.model, plugged, ends[0])
    spec = replace(client.training, lr=lr, optimizer="adamw", momentum=0.0)
    rng = client.rng("alignment")
    plan = batches([len(r.ids) for r in client.public], spec.lot, rng, rng, steps=steps)
    client.book(**align_work(teacher, thin, e, client.public, plan))
    return align(teacher, View(thin, {**e, **a}, ends[1]), e, client.public, plan, spec, gamma)


@dataclass(frozen=True)
class Offsite(Method):
    """The last `adapter_layers` blocks are A and are trained by clients; the emulator E stands for all before them.
    (With `bottom` blocks at the other end in A too, E stands for those between.)

    Trees A and E are named as in the emulator; `plugged` names A as in the whole model.
    """

    drop_ratio: float = knob(0.5, "share of the blocks under the adapter that clients do not get", ge=0, lt=1)
    adapter_layers: int = knob(2, "blocks at the top that clients train", ge=1)
    prealign_steps: int = knob(500, "steps that align the emulator before the first round; 0: none", ge=0)
    align_steps: int = knob(10, "steps that align it again after every round; 0: none", ge=0)
    align_lr: float = knob(1e-3, "learning rate of the alignment", gt=0)
    gamma: float = knob(0.9, "weight of the predictions beside the hidden states, in the alignment", ge=0)
    lambda_c: float = knob(0.1, "how strongly A is held to where the round began", ge=0)
    freeze_a: bool = knob(False, "train and send only B of A's LoRA (FFA-LoRA), which noise enters linearly")

    @property
    def bottom(self) -> int:
        """Blocks at the bottom that clients train too."""
        return 0

    def spread(self, middle: int, n: int) -> list[int]:
        """Which `n` of the `middle` blocks stand for all of them."""
        return [i * (middle - 1) // (n - 1) for i in range(n)] if n > 1 else [middle // 2]

    def kept(self, depth: int) -> list[int]:
        """Which of `depth` blocks clients get: evenly spread ones of the middle, and A."""
        low, middle = self.bottom, depth - self.adapter_layers - self.bottom
        n = round(middle * (1 - self.drop_ratio))
        if n < 1:
            raise CompositionError(
                f"method '{name_of(self)}' with adapter_layers = {self.adapter_layers} and drop_ratio = "
                f"{self.drop_ratio} leaves no block of a model of {depth} to the emulator; lower one of them")
        return [*range(low), *(low + i for i in self.spread(middle, n)), *range(low + middle, depth)]

    def public_at(self):
        return ("server",) if self.prealign_steps or self.align_steps else ()

    def at_client(self, model: Model) -> Model:
        """The emulator with A on it."""
        known = vars(model.net.config).get(KEPT)
        return emulator(model, known or self.kept(len(blocks_of(model.net))))

    def split(self, model: Model) -> tuple[Tree, Tree]:
        """(A, E) at the start."""
        theta, top = model.initial(), len(blocks_of(model.net)) - self.adapter_layers
        within = {n: at for n in theta if (at := block_of(n)) is not None}
        mine = {n for n, at in within.items() if at >= top or at < self.bottom}
        return {n: theta[n] for n in within if n in mine}, {n: theta[n] for n in within if n not in mine}

    def check(self, model: Model) -> None:
        a, _ = self.split(self.at_client(model))
        if not a or (self.freeze_a and not isinstance(model.space, LoRA)):
            raise CompositionError(
                f"method '{name_of(self)}' and space '{model.space.stem}' do not fit together: "
                + ("freeze_a is about LoRA's factors" if a else "it trains nothing within blocks") + "; use 'lora'")
        if isinstance(model.space, LoRA):
            need_lora(self, model)

    def init(self, model: Model) -> State:
        self.check(model)
        a, e = self.split(self.at_client(model))
        depth = len(blocks_of(model.net))
        shift = {len(self.kept(depth)) - i: depth - i for i in range(1, self.adapter_layers + 1)}
        shift |= {i: i for i in range(self.bottom)}
        rest = {n: t for n, t in model.initial().items() if n not in renamed(a, shift)}
        return {"A": a, "E": e, "rest": rest, "shift": [[k, v] for k, v in shift.items()], "aligned": False}

    def round(self, state: State, clients) -> Program:
        if not state["aligned"]:
            state = yield from self.realigned(state, self.prealign_steps)
        msg = pack(A=self.moving(state["A"]), E=state["E"])
        out = yield Ask(self.local, {c.id: msg for c in clients})
        state = {**state, "A": state["A"] | add(self.moving(state["A"]), part(out.value, "delta"))}
        return (yield from self.realigned(state, self.align_steps))

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        moving, e = part(msg, "A"), part(msg, "E")
        a = self.split(client.model)[0] | moving
        terms = held_to(client.model.space, a, self.lambda_c)
        # min L(A, E) + lambda_c sum ||merge(A) - merge(A_t)||^2 over A
        fitted = client.fit({**e, **a}, freeze=[*e, *(a.keys() - moving.keys())], terms=terms)
        return pack(delta=sub({n: fitted.theta[n] for n in moving}, moving), n=client.n, loss=fitted.loss)

    def realigned(self, state: State, steps: int) -> Program:
        """E brought closer to the blocks that it stands for, with the A of now on both."""
        if not steps:
            return {**state, "aligned": True}
        told = {SERVER: pack(A=state["A"], E=state["E"], plugged=self.plugged(state), steps=steps)}
        out = yield Ask(self.alignment, told)
        return {**state, "E": part(out[SERVER], "E"), "aligned": True}

    @on_server
    def alignment(self, msg: Payload, client: Any) -> Payload:
        if not client.public:
            raise DataError(f"method '{name_of(self)}' aligns its emulator on public rows and the data has none; "
                            "give data.public, or set prealign_steps and align_steps to 0")
        thin = self.at_client(client.model)
        e, loss = brought_closer(client, thin, part(msg, "A"), part(msg, "plugged"), part(msg, "E"),
                                 self.adapter_layers, msg["steps"], self.align_lr, self.gamma)
        return pack(E=e, loss=loss)

    def moving(self, a: Tree) -> Tree:
        """What of A is trained."""
        return {n: t for n, t in a.items() if not (self.freeze_a and n.endswith("lora_A.weight"))}

    def plugged(self, state: State) -> Tree:
        """A as the whole model names it: mapped by block, never by order."""
        return renamed(state["A"], dict(state["shift"]))

    def served(self, state: State) -> tuple[Tree, None]:
        """The whole model with A plugged in."""
        return state["rest"] | self.plugged(state), None

    def evaluate(self, state: State, clients, on: str) -> Program:
        """Clients score what they have: the emulator with A; the server the whole model."""
        theta, whole = {**state["E"], **state["A"]}, self.served(state)[0]
        return (yield Ask(self.score, {c.id: pack(theta=whole if c.id == SERVER else theta, on=on) for c in clients}))
