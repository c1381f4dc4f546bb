"""One step through the pieces of a model that machines hold: micro-batches forward and back, and who is lost replaced.

The broker relays all that crosses and keeps it until the step counts, so that the next machine can do again what the
lost one had done. Nothing of the result hangs on who did it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import Client
from fedllm.core.errors import QuorumError, Withheld
from fedllm.core.form import need
from fedllm.core.method import Method, knob
from fedllm.core.payload import Payload, add, pack, part, tensor_bytes, zeros_like
from fedllm.data.encode import batches
from fedllm.local.descend import descended
from fedllm.local.fit import slice_of
from fedllm.models.batch import IGNORE, collate
from fedllm.models.segments import segments

KINDS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimizers keep."""


@dataclass
class Passing:
    """One step on its way through the pieces: what came where, so that whoever takes a piece over can do it again."""

    holders: list[str]
    spare: list[str]
    told: list[Payload]
    """By piece what its holder is told with the first message of the round; who takes over is told `whole`."""
    whole: list[Payload]
    masks: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    counts: Mapping[str, float]
    x: list[dict[str, Tensor]] = field(default_factory=list)
    g: list[dict[str, Tensor]] = field(default_factory=list)
    ahead: list[set[str]] = field(default_factory=list)
    back: list[set[str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    resent: int = 0

    def __post_init__(self) -> None:
        n = len(self.holders)
        self.x, self.g = [{} for _ in range(n)], [{} for _ in range(n)]
        self.ahead, self.back = [set() for _ in range(n)], [set() for _ in range(n)]

    def jobs(self) -> tuple[dict[int, str], dict[int, str]]:
        """By piece the micro-batch that it can take next, forward and backward; backward first, and each at one."""
        last, ahead, back = len(self.holders) - 1, {}, {}
        for p in range(last + 1):
            ready = self.g[p] if p < last else self.x[p]
            if todo := [m for m in self.masks if m in ready and m not in self.back[p]]:
                back[p] = todo[0]
            elif p < last and (todo := [m for m in self.masks if m in self.x[p] and m not in self.ahead[p]]):
                ahead[p] = todo[0]
        return ahead, back

    def slip(self, p: int, m: str) -> Payload:
        """What piece p is told of micro-batch m, once its gradient is there (the last piece: once it is there)."""
        if p == len(self.holders) - 1:
            return {"m": m, "x": self.x[p][m], "mask": self.masks[m], "labels": self.labels[m], "count": self.counts[m]}
        return {"m": m, "g": self.g[p][m], "end": p == 0}

    def first(self, p: int) -> Payload:
        """What comes with a holder's first message, and nothing after that."""
        said, self.told[p] = self.told[p], {}
        return said

    def took(self, p: int, m: str, h: Tensor) -> None:
        """Piece p went forward."""
        self.ahead[p].add(m)
        self.x[p + 1][m] = h

    def gave(self, p: int, m: str, g: Tensor | None) -> None:
        """And back."""
        self.back[p].add(m)
        if p and g is not None:
            self.g[p - 1][m] = g

    def replace(self, p: int) -> None:
        """The next spare machine holds piece p, and is told all that the one before it was; QuorumError without one."""
        self.lost.append(self.holders[p])
        if not self.spare:
            raise QuorumError(f"machine '{self.holders[p]}' was lost and there is no spare one; let more clients come, "
                              "or raise method.backups")
        self.holders[p] = self.spare.pop(0)
        again = sorted(self.ahead[p] | self.back[p], key=list(self.masks).index)
        rest: dict[str, Any] = {"x": {m: self.x[p][m] for m in again}, "mask": {m: self.masks[m] for m in again}}
        done = [m for m in self.masks if m in self.back[p]]
        if p == len(self.holders) - 1:
            rest |= {"labels": {m: self.labels[m] for m in done}, "count": {m: self.counts[m] for m in done}}
        else:
            rest["g"] = {m: self.g[p][m] for m in done}
        self.told[p] = {**self.whole[p], **{f"re{k}": v for k, v in pack(**rest).items()}}
        self.resent += tensor_bytes(self.told[p])


@dataclass(frozen=True)
class Pipeline(Method):
    """What machines do with their pieces, and what the broker does with their answers and their silence."""

    deadline: float = knob(60.0, "seconds that a machine may take for an answer, before it counts as lost", gt=0)

    @on_server
    def draw(self, msg: Payload, client: Any) -> Payload:
        """The step's micro-batches of public rows, and how many targets each has, as one process counts them (of a step
        in one part: 1)."""
        rows, spec, rng = client.public, client.training, client.rng("pipeline")
        [lot] = batches([len(r.ids) for r in rows], spec.lot, rng, rng, steps=1)
        parts = -(-len(lot) // spec.batch_size)
        some = [[rows[i] for i in slice_of(lot, m, parts, spec)] for m in range(parts)]
        cut = [collate([mine], client.model.pad, "cpu") for mine in some]  # type: ignore[arg-type]
        shift = int(client.model.rules.net == "causal")  # the first token is nobody's next one
        counts = [int((b.labels[:, shift:] != IGNORE).sum()) if parts > 1 else 1 for b in cut]
        kinds = ("ids", "mask", "labels")
        return pack(**{kind: {str(m): getattr(b, kind) for m, b in enumerate(cut)} for kind in kinds},
                    count={str(m): float(n) for m, n in enumerate(counts)})

    def through(self, run: Passing) -> Program:
        """All micro-batches forward and back."""
        while any(jobs := run.jobs()):
            ahead, back = jobs
            asked: dict[int, tuple[Callable[..., Any], Payload]] = {p: (self.backward, run.slip(p, m))
                                                                   for p, m in back.items()}
            asked |= {p: (self.forward, {"m": m, "x": run.x[p][m], "mask": run.masks[m]}) for p, m in ahead.items()}
            said = yield from self.reach(run, asked)
            for p, m in ahead.items():
                run.took(p, m, said[p]["h"])
            for p, m in back.items():
                run.gave(p, m, said[p].get("x"))

    def reach(self, run: Passing, asked: Mapping[int, tuple[Callable[..., Any], Payload]],
              like: Mapping[int, Mapping[str, Tensor]] | None = None) -> Program:
        """Every piece's answer, by whoever comes to hold it; `like` are shapes that the trees of answers must have."""
        left, got = dict(asked), dict[int, Payload]()
        while left:
            asks: dict[str, tuple[Callable[..., Any], dict[str, Payload]]] = {}
            for p, (fn, msg) in left.items():
                asks.setdefault(fn.__name__, (fn, {}))[1][run.holders[p]] = {**run.first(p), **msg}
            outs = yield [Ask(fn, msgs, quorum=0, deadline=self.deadline) for fn, msgs in asks.values()]
            said = {c: reply for out in outs for c, reply in out.items()}
            for p in list(left):
                reply = said.get(run.holders[p])
                if reply is not None and (like is None or fits_like(reply, like[p])):
                    got[p] = reply
                    del left[p]
                else:
                    run.replace(p)
        return got

    @on_client(gives="h: tensor", fits=lambda self, msg, reply: need(
        reply["h"].dim() == 3 and reply["h"].shape[: 2] == msg["mask"].shape
        and (not msg["x"].is_floating_point() or reply["h"].shape == msg["x"].shape), "'h' has another shape"))
    def forward(self, msg: Payload, client: Client) -> Payload:
        piece = taken(msg, client)
        piece["x"][msg["m"]], piece["mask"][msg["m"]] = msg["x"], msg["mask"]
        return {"h": client.forward(piece["segment"], piece["theta"], msg["x"], msg["mask"])}

    @on_client(gives="x?: tensor, done?: count", fits=lambda self, msg, reply: need(
        "done" in reply if msg.get("end") else "x" in reply and reply["x"].shape == msg.get("x", msg.get("g")).shape,
        "'x' is lacking or has another shape"))
    def backward(self, msg: Payload, client: Client) -> Payload:
        piece, m = taken(msg, client), msg["m"]
        if "labels" in msg:
            piece["x"][m], piece["mask"][m] = msg["x"], msg["mask"]
        x = learned(piece, client, m, msg.get("g"), msg.get("labels"), msg.get("count", 1.0))
        return {"done": 1} if x is None else {"x": x}

    @on_client(gives="slopes: tensors")
    def tied(self, msg: Payload, client: Client) -> Payload:
        """The gradients of weights that lie in both ends."""
        piece = taken(msg, client)
        return pack(slopes={n: piece["sum"][n] for n in msg["names"]})

    @on_client(gives="theta: tensors, moments?: tensors")
    def step(self, msg: Payload, client: Client) -> Payload:
        piece = taken(msg, client)
        slopes = {n: t / msg["total"] for n, t in (piece["sum"] | part(msg, "slopes")).items()}
        theta, moments = descended(piece["theta"], slopes, client.training, piece["moments"] or None)
        client.memory["piece"] = {"at": piece["at"], "version": piece["version"] + 1, "theta": theta,
                                  "moments": moments}
        told = {n: t for n, t in moments.items() if n != "step"}  # made of public rows alone: it may leave
        return pack(theta=theta, moments=told)


def told_of(state: Any, cuts: Sequence[int]) -> tuple[list[set[str]], list[Payload], list[Payload]]:
    """By piece the names of its trainables, what its holder is told, and what one who is new to it is told."""
    names = [{n for op in state["ops"][a:b] for n in op["names"]}
             for a, b in zip((0, *cuts), (*cuts, len(state["ops"])), strict=True)]
    bare: list[Payload] = [{"cuts": [b - 1 for b in cuts], "at": p, "version": state["version"]}  # blocks begin at op 1
                           for p in range(len(names))]
    whole = [{**bare[p], **pack(theta={n: state["theta"][n] for n in sorted(mine)}, moments={
        k: t for k, t in state["moments"].items() if k == "step" or k.partition("/")[2] in mine})}
        for p, mine in enumerate(names)]
    return names, bare, whole


def taken(msg: Payload, client: Client) -> Any:
    """This machine's piece: with the first message of a round as it is told, or as it was kept since the last step."""
    if "cuts" not in msg:
        return client.session["piece"]
    cuts, at = [int(b) for b in msg["cuts"]], int(msg["at"])
    piece: dict[str, Any] = {"segment": segments(client.model, cuts)[at], "at": [*cuts, at], "version": msg["version"],
                             "theta": part(msg, "theta"), "moments": part(msg, "moments"), "x": part(msg, "rex"),
                             "mask": part(msg, "remask")}
    if not piece["theta"]:
        kept = client.memory.get("piece")
        if kept is None or list(kept["at"]) != piece["at"] or kept["version"] != piece["version"]:
            raise Withheld(f"it does not hold this piece at version {msg['version']} and must be told it whole")
        piece |= {"theta": kept["theta"], "moments": kept["moments"]}
    client.session["piece"] = piece | {"sum": zeros_like(piece["theta"])}
    labels, counts, g = part(msg, "relabels"), part(msg, "recount"), part(msg, "reg")
    for m in labels or g:  # what the machine before this one had done
        learned(client.session["piece"], client, m, g.get(m), labels.get(m), counts.get(m, 1.0))
    return client.session["piece"]


def learned(piece: dict[str, Any], client: Client, m: str, g: Tensor | None, labels: Tensor | None, count: float
            ) -> Tensor | None:
    """Adds a micro-batch's part of the gradient of the sum over all targets, and gives that of its input: gradients are
    then as large as in one process, and round alike in norms that are fp32."""
    got = client.backward(piece["segment"], piece["theta"], piece["x"][m], piece["mask"][m], g, labels=labels,
                          times=count)
    piece["sum"] = add(piece["sum"], got.theta)
    return got.x


def fits_like(reply: Payload, like: Mapping[str, Tensor]) -> bool:
    """Whether every tree of a reply (of moments each kind) has these names, all of them, and shapes."""
    trees: dict[str, dict[str, Any]] = {}
    for key, t in reply.items():
        tree, _, name = key.partition("/")
        kind, _, rest = name.partition("/")
        owner, name = (f"{tree}/{kind}", rest) if tree == "moments" else (tree, name)
        trees.setdefault(owner, {})[name] = t
    return all(tree.keys() == like.keys() and all(tree[n].shape == t.shape for n, t in like.items())
               for tree in trees.values()) and trees.keys() - {"theta", "slopes"} <= {f"moments/{k}" for k in KINDS}
