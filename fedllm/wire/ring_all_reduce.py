"""A ring all-reduce under any method whose replies are summed: clients add up among themselves, part by part."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Replies, on_client
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, Withheld
from fedllm.core.form import Form, need
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer
from fedllm.core.payload import Payload
from fedllm.core.reduce import wide
from fedllm.core.sums import SMALLEST, is_control, must_lift, need_sums, without
from fedllm.wire import _letters as letters
from fedllm.wire._blame import BROKE, blame, staying_out
from fedllm.wire.codec import DTYPES, NAMES

OWN = "ring/"
HELD = "ring_all_reduce"


@dataclass(frozen=True)
class RingAllReduce(Knobs, Layer):
    """Reduce-scatter around a ring (Patarasuk and Yuan 2009): the reply is cut into N parts, and in N - 1 steps each
    client adds its own to a part that comes from its left and hands it on to its right; then each sends one finished
    part to the server.

    Every client sends as much as without the ring: N - 1 parts to its neighbor and one to the server. Letters between
    neighbors are sealed: the server reads the sum alone, and a client's right neighbor one Nth of its reply. It takes N
    trips; a client that falls silent on the way breaks the ring, and the round is given up. The next ring is formed
    without it, and without its left neighbor where either may have lied; who breaks rings again stays out twice as
    long. Here the server relays; where clients reach each other the same letters can go directly.
    """

    algebra = Algebra("secagg", needs="sum", reveals="sum", additive=False,
                      instead="secagg, whose masked replies add up on any way")
    session = (OWN + "sid",)

    keys: str | None = knob(None, "folder of identity keys, as of secagg; None: the relay must hand keys on unchanged")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_least", 1)
        object.__setattr__(self, "_void", [])

    def bind(self, facts: Facts) -> RingAllReduce:
        """In a run of three clients or more nobody takes part in a ring of fewer."""
        bound, n = replace(self), facts.cohort or len(facts.rows)
        object.__setattr__(bound, "_least", min(SMALLEST, n))
        if 0 < n < SMALLEST:
            object.__setattr__(bound, "_void", [f"a ring of {n} hides nobody; {SMALLEST} clients a round do"])
        return bound

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)

    def init(self) -> dict[str, Any]:
        return {"sessions": 0, "broke": {}}

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift = must_lift(ask, self)
        if ask.enough is not None or ask.flight is not None:
            raise CompositionError(f"ring_all_reduce and '{ask.phase}' do not fit together: it takes the first answers "
                                   "that come, and a ring must stand before it starts; leave the ring out")
        state["sessions"] += 1
        sid = str(state["sessions"])
        out = staying_out(state, ask.msgs, self.__dict__["_least"], "a ring")
        met = yield Ask(self.greet, {c: {"sid": sid} for c in ask.msgs if c not in out}, quorum=ask.quorum,
                        deadline=ask.deadline)
        told = {OWN + "sid": sid, OWN + "lift": lift}
        held = yield replace(ask, msgs={c: {**ask.msgs[c], **told} for c in met}, reduce=SameLayout(),
                             form=Form.of("layout: code"))
        ring = list(held.answered)
        if state.get(BROKE):  # other neighbors than last time, so that nobody is suspected again for who stands there
            random.Random(sid).shuffle(ring)
        chunks = yield from self._around(ring, {c: list(met[c]["key"]) for c in ring}, sid, ask.deadline, state,
                                         sizes(held.value["layout"], len(ring)))
        total = unflat([chunks[k] for k in range(len(ring))], held.value["layout"])
        missing = {c: out.get(c) or met.missing.get(c) or held.missing.get(c, "fell silent")
                   for c in ask.msgs if c not in ring}
        return Replies({}, ask.reducer.done(total), tuple(ring), missing, held.notes, held.seconds)

    def _blame(self, ring: Sequence[str], missing: Mapping[str, str], step: int, state: Any) -> None:
        """Note who broke the ring: who did not answer as it should, and where a client could not use what it was
        handed, its left neighbor too."""
        for c, why in missing.items():
            alone = step == 0 or why.startswith("reply refused")
            for one in {c} if alone else {c, ring[ring.index(c) - 1]}:
                blame(state, one)

    def _around(self, ring: Sequence[str], keys: Mapping[str, list[bytes]], sid: str, deadline: float | None,
                state: Any, long: Sequence[tuple[int, int]]) -> Any:
        """Part -> its sum, from the client that finished it; `long` are the entries and numbers of each part."""
        n, post = len(ring), dict[str, Payload]()
        for step in range(n):
            msgs = {c: {"sid": sid, "step": step, "place": i, "n": n,
                        "left": (left := ring[i - 1]), "left_key": keys[left], **post.get(left, {}),
                        "right": (right := ring[(i + 1) % n]), "right_key": keys[right]}
                    for i, c in enumerate(ring)}
            got = yield Ask(self.turn, msgs, quorum=1, deadline=deadline,
                            hidden={"RingAllReduce": frozenset({"letter", "envelope"})})
            missing = dict(got.missing)
            if step == n - 1:
                missing |= {c: "reply refused: its part is not as long as it should be" for i, c in enumerate(ring)
                            if c in got and (len(got[c]["x"]), len(got[c]["y"])) != long[(i + 1) % n]}
            if missing:
                self._blame(ring, missing, step, state)
                who = "; ".join(f"{c}: {why}" for c, why in list(missing.items())[:5])
                raise QuorumError(f"ring_all_reduce gives the round up: the ring broke in step {step + 1} of {n} "
                                  f"({who})")
            post = dict(got)
        return {(i + 1) % n: (got["x"], got["y"]) for i, got in enumerate(post[c] for c in ring)}

    def keyed(self, msg: Payload, reply: Payload) -> None:
        letters.check_key(reply["key"])

    @on_client(gives="key: blobs", fits=keyed)
    def greet(self, msg: Payload, client: Any) -> Payload:
        return {"key": letters.greet(client, OWN + msg["sid"], self.keys)}

    def client(self, fn: Any, msg: Payload, client: Any, call: Any) -> Payload:
        """Compute the reply and keep it: only its layout is told."""
        if OWN + "sid" not in msg:
            return call(msg)
        reply = call(without(msg, OWN))
        notes = {k: v for k, v in reply.items() if k.startswith("note/")}
        plain = without(reply, "note/")
        x, y, layout = flat(fn.__dict__["reduce"].lift(plain) if msg[OWN + "lift"] else plain)
        client.memory[HELD] = {"x": x, "y": y}
        return {"layout": layout, **notes}

    def step(self, msg: Payload, reply: Payload) -> None:
        """A sealed letter in all steps but the last, and then the finished part."""
        want = {"letter", "envelope"} if msg["step"] < msg["n"] - 1 else {"x", "y"}
        need(reply.keys() == want, f"its reply in step {msg['step'] + 1} of {msg['n']} lacks one of {sorted(want)}")
        need(all(v.dim() == 1 for v in reply.values() if isinstance(v, Tensor)), "its part is no vector")

    @on_client(gives="letter?: whole, envelope?: bytes, x?: tensor, y?: tensor", fits=step)
    def turn(self, msg: Payload, client: Any) -> Payload:
        """Step s: take part (i - s) from the left, add the own, hand it on; after N - 1 steps it is finished."""
        n, place, step = msg["n"], msg["place"], msg["step"]
        held = client.memory.get(HELD)
        if n < (least := self.__dict__["_least"]):  # of one the server would read the whole reply
            raise PayloadError(f"client '{client.id}' refuses a ring of {n}: fewer than {least} hide too little")
        if held is None or not 0 <= step < n:
            raise PayloadError(f"client '{client.id}' holds no reply for step {step} of a ring of {n}")
        part = (place - step) % n
        mine = {k: held[k].tensor_split(n)[part] for k in ("x", "y")}
        if step:
            try:
                theirs = letters.unseal(client, OWN + msg["sid"], msg["left"], msg["left_key"], msg["letter"],
                                        msg["envelope"], self.keys, like=mine)
            except PayloadError as error:  # nothing of its own is wrong: the ring breaks here, and the run does not
                raise Withheld(str(error)) from None
            mine = {k: theirs[k] + mine[k] for k in mine}
        if step < n - 1:
            to = {msg["right"]: msg["right_key"]}
            letter, (envelope,) = letters.seal(client, OWN + msg["sid"], to, mine, self.keys)
            return {"letter": letter, "envelope": envelope}
        letters.forget(client)
        client.memory.pop(HELD)
        return dict(mine)

    def statement(self, state: Any) -> dict[str, Any]:
        return {"layer": "ring_all_reduce", "hides": "single updates from the server",
                "not_covered": "one Nth of each update from the client's right neighbor, all of it from its neighbors "
                               "if they collude with the server; the sum itself; who answered",
                "void": list(self.__dict__["_void"])}


class SameLayout:
    """Keeps one layout, and refuses another."""

    ragged = staticmethod(lambda reply: frozenset({("layout", str(reply["layout"]))}))

    def zero(self) -> dict[str, Any]:
        return {}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        if acc and reply["layout"] != acc["layout"]:
            raise PayloadError("a reply's names or shapes differ from the others'")
        return {"layout": reply["layout"]}

    def done(self, acc: dict[str, Any]) -> Payload:
        return acc


def flat(lifted: Payload) -> tuple[Tensor, Tensor, str]:
    """All tensors as one vector (fp64 if one of them is), all numbers as one of fp64, and the layout as JSON."""
    tensors = {k: wide(v).detach().cpu() for k, v in lifted.items() if isinstance(v, Tensor)}
    numbers = {k: float(v) for k, v in lifted.items() if not isinstance(v, Tensor)}
    double = any(t.dtype == torch.float64 or not t.is_floating_point() for t in tensors.values())
    kind = torch.float64 if double else torch.float32
    x = torch.cat([t.reshape(-1).to(kind) for t in tensors.values()]) if tensors else torch.zeros(0)
    rows = [[k, NAMES[t.dtype], list(t.shape)] for k, t in tensors.items()]
    return x, torch.tensor(list(numbers.values()), dtype=torch.float64), json.dumps([rows, list(numbers)])


def sizes(layout: str, n: int) -> list[tuple[int, int]]:
    """How many entries and numbers each of n parts has."""
    rows, names = json.loads(layout)
    whole = torch.empty(sum(math.prod(shape) for _, _, shape in rows), dtype=torch.bool), torch.empty(len(names))
    return [(len(x), len(y)) for x, y in zip(*(t.tensor_split(n) for t in whole), strict=True)]


def unflat(chunks: Sequence[tuple[Tensor, Tensor]], layout: str) -> dict[str, Any]:
    """The summed reply from its parts in order."""
    (rows, names), out, at = json.loads(layout), dict[str, Any](), 0
    x, y = (torch.cat([chunk[i] for chunk in chunks]) for i in (0, 1))
    for key, dtype, shape in rows:
        size = math.prod(shape)
        out[key] = x[at : at + size].view(shape).to(DTYPES[dtype])
        at += size
    return out | dict(zip(names, y.tolist(), strict=True))
