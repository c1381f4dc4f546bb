"""Emulators of several sizes of one model: which blocks each has, who has been sent which, and what they weigh."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER, ClientInfo
from fedllm.core.errors import CompositionError, DataError, RecipeError, Withheld
from fedllm.core.layer import name_of
from fedllm.core.method import Method, State, knob
from fedllm.core.payload import Payload, Tree, pack, part, sub, tensor_bytes
from fedllm.methods._control import Scene
from fedllm.methods._factors import need_lora
from fedllm.methods._offsite import brought_closer
from fedllm.models.emulator import KEPT, blocks_at, blocks_of, emulator, grown, per_block, renamed
from fedllm.models.model import Model
from fedllm.spaces.layers import block_of

log = logging.getLogger(__name__)

BLOCKS, ALIGNED = "blocks", "aligned"
"""In a client's memory: the owner's blocks that it was sent, and E by the size's number."""
MOMENTS = 4
"""A number that is trained takes as many places: itself, its gradient and two moments."""


@dataclass(frozen=True)
class Sizes:
    """The first `bottom` and the last `top` blocks are at every client; a size keeps `ratio` of those between.

    What a smaller size keeps is evenly spread over what the next larger one keeps, so that nobody is ever sent more
    than the largest has, and a change of size costs only the blocks that are new.
    """

    bottom: int
    top: int
    ratios: tuple[float, ...]

    def ends(self, depth: int) -> list[int]:
        return [*range(self.bottom), *range(depth - self.top, depth)]

    def kept(self, depth: int) -> list[list[int]]:
        """The owner's numbers of each size's blocks, the smallest size first."""
        of, out = list(range(self.bottom, depth - self.top)), []
        middle = len(of)
        for ratio in sorted(self.ratios, reverse=True):
            n = min(len(of), max(1, round(middle * ratio)))
            of = [of[round(i * (len(of) - 1) / (n - 1))] for i in range(n)] if n > 1 else [of[len(of) // 2]]
            out.insert(0, [*range(self.bottom), *of, *range(depth - self.top, depth)])
        return out


def skeleton(model: Model, sizes: Sizes) -> Model:
    """What every client has from the start: both ends and all that is no block."""
    return emulator(model, vars(model.net.config).get(KEPT) or sizes.ends(len(blocks_of(model.net))))


def split(theta: Tree, ends: Sequence[int]) -> tuple[Tree, Tree]:
    """(A, E): the trainables within blocks, those of the ends and the others."""
    within = {n: at for n in theta if (at := block_of(n)) is not None}
    return {n: theta[n] for n, at in within.items() if at in ends}, {
        n: theta[n] for n, at in within.items() if at not in ends}


def weigh(model: Model, sizes: Sizes, a: Tree) -> dict[str, Any]:
    """Bytes of the skeleton's weights, of each block between, and of A as it travels and as it is trained."""
    depth = len(blocks_of(model.net))
    middle = sizes.kept(depth)[-1][sizes.bottom : -sizes.top]
    return {"skeleton": parameter_bytes(skeleton(model, sizes)), "A": tensor_bytes(a),
            "blocks": {str(b): tensor_bytes(blocks_at(model, [b])) for b in middle}}


def parameter_bytes(model: Model) -> int:
    """Of a network's weights, each counted once."""
    return sum({id(p): p.numel() * p.element_size() for p in model.net.parameters()}.values())


def needed(weights: Mapping[str, Any], kept: Sequence[int]) -> int:
    """Bytes that training A on an emulator of these blocks takes at least; activations come on top."""
    return weights["skeleton"] + MOMENTS * weights["A"] + sum(weights["blocks"].get(str(b), 0) for b in kept)


def lacking(state: State, client: str, size: int) -> list[int]:
    """The blocks of this size that the client has not been sent yet."""
    have = {*state["ends"], *state["held"].get(client, {}).get("blocks", ())}
    return [b for b in state["kept"][size] if b not in have]


def scene(state: State, clients: Sequence[ClientInfo], work_seconds: float, headroom: float) -> Scene:
    """What the server knows of each client before a round, from what it declares and what it was sent."""
    weights, kept = state["weights"], state["kept"]
    need = headroom * np.array([needed(weights, k) for k in kept], float)
    fits, seconds, seen = [], [], []
    for c in clients:
        p, new = c.profile, [sum(weights["blocks"][str(b)] for b in lacking(state, c.id, i)) for i in range(len(kept))]
        memory = p.memory_bytes or 2 * need[-1]
        line = np.array([2 * weights["A"] + n for n in new]) / p.bandwidth if p.bandwidth else np.zeros(len(kept))
        work = work_seconds / p.speed * np.array([len(k) / state["depth"] for k in kept])
        fits.append(need <= memory)
        seconds.append(2 * p.latency + line + work)  # t_k = bytes down / R_k + steps / F_k + bytes up / R_k
        seen.append([memory / need[-1] - 1, np.log10(1 + line[-1]), np.log2(p.speed) / 4,
                     new[-1] / max(1, sum(weights["blocks"].values())), state["loss"]])
    if poor := [c.id for c, fit in zip(clients, fits, strict=True) if not fit.any()]:
        log.warning("not asked, since what they declare as memory_bytes is too little for any emulator: %s",
                    ", ".join(poor))
    return Scene(np.array(fits), np.array(seconds), np.clip(np.array(seen, float), -3, 3))


def assembled(client: Any, msg: Payload, keep: bool = True) -> tuple[Any, Tree, dict[int, int]]:
    """The client with the emulator that it is told to take, that one's E, and where the owner's blocks stand in it.

    It is made of what is there from the start, what came with the message and what came before; with `keep` that is
    remembered. Withheld by who has lost some of it, or declares too little memory.
    """
    kept, size = [int(b) for b in msg["kept"]], str(int(msg["size"]))
    own = list(vars(client.model.net.config)[KEPT])
    have = {**client.memory.get(BLOCKS, {}), **part(msg, "blocks")}
    es = {**client.memory.get(ALIGNED, {}), **({size: part(msg, "E")} if msg["fresh"] else {})}
    if size not in es or {*kept} - {*own} - {block_of(n) for n in have}:
        raise Withheld(f"client '{client.id}' has lost blocks that it was sent; it gets them again")
    more = {n: t for n, t in have.items() if block_of(n) in kept}
    takes, limit = parameter_bytes(client.model) + tensor_bytes(more) + MOMENTS * tensor_bytes(
        part(msg, "A")), client.profile.memory_bytes
    if limit is not None and takes > limit:  # worked out here, whatever the server knows
        raise Withheld(f"client '{client.id}' declares memory_bytes = {limit}, and an emulator of {len(kept)} blocks "
                       f"takes {takes}")
    if keep:
        client.memory[BLOCKS], client.memory[ALIGNED] = have, es
    thin = grown(client.model, kept, more, json.loads(msg["lists"]), len(kept) / int(msg["depth"]))
    return client.having(thin), es[size], {b: i for i, b in enumerate(kept)}


def back(tree: Tree, place: Mapping[int, int]) -> Tree:
    """The tree by the owner's block numbers again."""
    return renamed(tree, {i: b for b, i in place.items()})


@dataclass(frozen=True)
class Sized(Method):
    """A method whose server keeps a model of blocks, and emulators of several sizes of it. A and the E of each size are
    named by the owner's block numbers everywhere but within an emulator."""

    ratios: tuple[float, ...] = knob((0.25, 0.5, 0.75), "shares of the middle blocks that an emulator may keep")
    bottom_layers: int = knob(2, "blocks at the bottom that are tuned; 0: at the top alone", ge=0)
    adapter_layers: int = knob(2, "blocks at the top that are tuned", ge=1)
    prealign_steps: int = knob(500, "steps that align each emulator before the first round; 0: as cut", ge=0)
    align_lr: float = knob(1e-3, "learning rate of the alignment", gt=0)
    gamma: float = knob(0.9, "weight of the predictions beside the hidden states, in the alignment", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios or len({*self.ratios}) < len(self.ratios) or not all(0 < r <= 1 for r in self.ratios):
            raise RecipeError(f"{type(self).__name__}.ratios = {self.ratios} is not allowed; it must be different "
                              "numbers above 0 and up to 1")

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.bottom_layers, self.adapter_layers, self.ratios)

    def at_client(self, model: Model) -> Model:
        return skeleton(model, self.sizes)

    def check(self, model: Model) -> None:
        need_lora(self, model)
        if self.bottom_layers + self.adapter_layers >= (depth := len(blocks_of(model.net))):
            raise CompositionError(
                f"method '{name_of(self)}' with bottom_layers = {self.bottom_layers} and adapter_layers = "
                f"{self.adapter_layers} leaves nothing of a model of {depth} blocks between; lower one of them")
        blocks_at(model, [])
        if not split(model.initial(), self.sizes.ends(depth))[0]:
            raise CompositionError(f"method '{name_of(self)}': space.targets = {list(model.space.targets)} has "
                                   "nothing within the blocks that are tuned; name linear modules of theirs")

    def init(self, model: Model) -> State:
        self.check(model)
        depth = len(blocks_of(model.net))
        ends, kept = self.sizes.ends(depth), self.sizes.kept(depth)
        trees = [split(renamed(emulator(model, k).initial(), dict(enumerate(k))), ends) for k in kept]
        a = trees[-1][0]
        rest = {n: t for n, t in model.initial().items() if n not in a}
        return {"A": a, "E": {str(i): e for i, (_, e) in enumerate(trees)}, "rest": rest, "aligned": None,
                "ends": ends, "kept": kept, "depth": depth, "lists": [json.dumps(per_block(model, k)) for k in kept],
                "weights": weigh(model, self.sizes, a), "held": {}, "loss": 0.0, "seed": model.seed}

    def told(self, state: State, size: Mapping[str, int], **more: Any) -> Program:
        """The message to each client of this size: A, and what it lacks."""
        new = {c: lacking(state, c, i) for c, i in size.items()}
        wanted = sorted({b for some in new.values() for b in some})
        blocks = part((yield Ask(self.cut, {SERVER: {"numbers": wanted}}))[SERVER], "blocks") if wanted else {}
        msgs = {}
        for c, i in size.items():
            fresh = i not in state["held"].get(c, {}).get("sizes", ())
            msgs[c] = pack(
                A=state["A"], blocks={n: t for n, t in blocks.items() if block_of(n) in new[c]}, size=i, fresh=fresh,
                E=state["E"][str(i)] if fresh else {}, kept=state["kept"][i], depth=state["depth"],
                lists=state["lists"][i], **more)
        return msgs

    @on_server
    def cut(self, msg: Payload, client: Any) -> Payload:
        return pack(blocks=blocks_at(client.model, [int(b) for b in msg["numbers"]]))

    def sent(self, state: State, size: Mapping[str, int], answered: Sequence[str]) -> State:
        """The state in which those who answered hold what they were sent; of those who did not nothing is known."""
        held = {c: h for c, h in state["held"].items() if c not in size}
        for c in answered:
            old = state["held"].get(c, {"blocks": [], "sizes": []})
            held[c] = {"blocks": sorted({*old["blocks"], *lacking(state, c, size[c])}), "last": size[c],
                       "sizes": sorted({*old["sizes"], size[c]})}
        return {**state, "held": dict(sorted(held.items()))}

    def aligned(self, state: State) -> Program:
        """Each size's E brought closer to the blocks that it stands for."""
        if not self.prealign_steps:
            return {**state, "aligned": []}
        e, losses = {}, []
        for i, kept in enumerate(state["kept"]):
            msg = pack(A=state["A"], E=state["E"][str(i)], kept=kept)
            out = (yield Ask(self.alignment, {SERVER: msg}))[SERVER]
            e[str(i)] = part(out, "E")
            losses.append(float(out["loss"]))
        return {**state, "E": e, "aligned": losses}

    @on_server
    def alignment(self, msg: Payload, client: Any) -> Payload:
        self.need_public(client)
        place = {int(b): i for i, b in enumerate(msg["kept"])}
        a, e = part(msg, "A"), renamed(part(msg, "E"), place)
        e, loss = brought_closer(client, emulator(client.model, [*place]), renamed(a, place), a, e,
                                 self.adapter_layers, self.prealign_steps, self.align_lr, self.gamma)
        return pack(E=back(e, place), loss=loss)

    @on_server
    def own(self, msg: Payload, client: Any) -> Payload:
        """The server trains A in the whole model, on public rows."""
        self.need_public(client)
        a = part(msg, "A")
        fitted = client.fit(a, on=client.public)
        return pack(delta=sub(fitted.theta, a), n=len(client.public), loss=fitted.loss)

    def need_public(self, client: Any) -> None:
        if not client.public:
            raise DataError(f"method '{name_of(self)}' aligns its emulators (and trains at the server) on public "
                            "rows and the data has none; give data.public, or set prealign_steps to 0 and "
                            "server_trains to false")

    def served(self, state: State) -> tuple[Tree, None]:
        """The whole model with A plugged in."""
        return state["rest"] | state["A"], None

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        """Clients score A on the emulator that they had last (at first the smallest), the server in the whole model."""
        last = {c.id: state["held"].get(c.id, {}).get("last", 0) for c in clients if c.id != SERVER}
        msgs = dict((yield from self.told(state, last, on=on)))
        whole = pack(theta=self.served(state)[0], on=on)
        return (yield Ask(self.score, msgs | {c.id: whole for c in clients if c.id == SERVER}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Any) -> Payload:
        if client.id == SERVER:
            return client.score(part(msg, "theta"), on=msg["on"])
        thin, e, place = assembled(client, msg, keep=False)
        return thin.score({**renamed(e, place), **renamed(part(msg, "A"), place)}, on=msg["on"])
