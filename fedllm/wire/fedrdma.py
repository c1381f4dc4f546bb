"""FedRDMA's chunks: a reply crosses in pieces with a checksum each, and only a piece that is bad is sent again."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.card import Card, Claim
from fedllm.core.errors import PayloadError, QuorumError
from fedllm.core.form import Form, aligned, need
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload, non_finite
from fedllm.core.sums import without
from fedllm.wire import codec

OWN = "fedrdma/"
CHUNKS = Form.of(f"{OWN}crc: numbers, {OWN}id?: code, fedrdma?: wholes")
"""Of what is on the wire: chunks, their checksums, and whose they are."""


@dataclass(frozen=True)
class FedRDMA(Knobs, Layer):
    """Replies as chunks with CRC32, verified one by one; a bad chunk is asked for again, alone, `max_retries` times.

    Invisible to methods and to the layers above; list it last, next to the wire. The transport of the same kind over
    sockets is `wire/_chunk_ring.py`: a ring of `depth` chunks under way, credits, resend, going on after a cut. RDMA
    itself is not here: it takes hardware, and neither the claim nor the tests touch any.
    """

    algebra = Algebra("line")
    card = Card(
        title="FedRDMA: chunked transmission with resend of single chunks",
        paper="Zhang et al., FedRDMA: Communication-Efficient Cross-Silo Federated LLM via Chunked RDMA Transmission, "
              "2024, arXiv 2403.00881",
        topic="communication",
        sends="what it wraps, and a checksum a chunk",
        needs="nothing of the model; the place next to the wire",
        claim=Claim("a message crosses loopback sockets bit by bit although a fifth of its chunks is lost, doubled, "
                    "swapped or changed (bytes that differ)", rig="line", metric="wrong", holds="<=", threshold=0.0,
                    kind="exact"),
        also={"bytes": Claim("at a loss of 1e-4 per packet of 4096 bytes 100 MB in chunks of 4 MiB take at most 1.2 "
                             "times their bytes (closed form)", rig="line", metric="chunked_bytes", holds="<=",
                             threshold=1.2, kind="exact"),
              "time": Claim("and at most a third of the time of resending the whole message (closed form)", rig="line",
                            metric="time_ratio", holds="<=", threshold=1 / 3, kind="exact"),
              "tuned": Claim("for packets of 1500 bytes the tuner picks chunks of 1 MiB or less (MiB)", rig="line",
                             metric="tuned_1500", holds="<=", threshold=1.0, kind="exact"),
              "resume": Claim("a transfer cut at 60% sends at most 45% of its bytes again", rig="line",
                              metric="after_cut", holds="<=", threshold=0.45)},
        evidence="Speed-ups of RDMA over TCP are not measured: there is no such hardware here, and chunking alone "
                 "cannot be faster than one message on a perfect loopback line.",
    )
    chunk_bytes: int = knob(4 << 20, "bytes of a chunk", ge=4 << 10, le=1 << 30)
    max_retries: int = knob(5, "times that a bad chunk is asked for again", ge=0)

    def init(self) -> dict[str, Any]:
        return {"chunks": 0, "resent": 0}

    def server(self, ask: Any, state: Any) -> Any:
        if isinstance(ask.owner, Layer) and ask.reducer is None:
            return (yield ask)
        fold = Whole(ask)
        told = {c: {**m, OWN + "size": self.chunk_bytes} for c, m in ask.msgs.items()}
        out = yield replace(ask, msgs=told, reduce=fold, form=CHUNKS, opened=lambda c, r: {**r, OWN + "id": c})
        acc, each = (out.value or {"acc": fold.zero()["acc"]})["acc"], fold.each
        state["chunks"] += fold.chunks
        refused: dict[str, str] = {}
        for _ in range(self.max_retries):
            bad = {c: got.bad for c, got in fold.broken.items()}
            if not bad:
                break
            again = yield Ask(self.again, {c: {"want": want, "phase": ask.phase} for c, want in bad.items()},
                              quorum=0, deadline=ask.deadline)
            for c, reply in again.items():
                state["resent"] += len(bad[c])
                fold.broken[c].fill(reply)
                if not fold.broken[c].bad:
                    try:
                        acc = fold.folded(acc, c, fold.broken[c])
                        del fold.broken[c]
                    except Exception as error:  # of a stranger's bytes: the others' replies count all the same
                        refused[c] = f"reply refused: {error}"[:300]
                        del fold.broken[c]
        answered = tuple(c for c in out.answered if c not in {*fold.broken, *refused})
        missing = {**out.missing, **refused}
        missing |= {c: f"chunks {got.bad[:5]} came with a wrong checksum {self.max_retries + 1} times"
                    for c, got in fold.broken.items()}
        if len(answered) < (needed := ask.needed()):
            raise QuorumError(f"{ask.phase}: {len(answered)} of {len(ask.msgs)} replies came whole, {needed} needed "
                              f"({'; '.join(f'{c}: {w}' for c, w in list(missing.items())[:5])})")
        value = ask.reducer.done(acc) if ask.reducer and answered else None
        return replace(out, each={c: each[c] for c in answered if c in each}, value=value, answered=answered,
                       missing=missing)

    def client(self, fn: Any, msg: Payload, client: Any, call: Any) -> Payload:
        if OWN + "size" not in msg:
            return call(msg)
        reply = call(without(msg, OWN))
        notes = {k: v for k, v in reply.items() if k.startswith("note/")}
        blob = torch.frombuffer(codec.encode(without(reply, "note/")), dtype=torch.uint8)
        parts = list(blob.split(msg[OWN + "size"]))
        client.memory[OWN + f"{type(fn.__self__).__name__}.{fn.__name__}"] = {"parts": parts}  # until the next reply
        return {OWN + "id": client.id, **packed(dict(enumerate(parts))), **notes}

    def wanted(self, msg: Payload, reply: Payload) -> None:
        names = {k for k in reply if k.startswith(OWN + "chunk/")}
        need(names == {f"{OWN}chunk/{i}" for i in msg["want"]}, "it sent other chunks than were wanted")
        aligned(reply, (OWN + "crc",), len(names))

    @on_client(gives=f"{OWN}crc: numbers, fedrdma?: wholes", fits=wanted)
    def again(self, msg: Payload, client: Any) -> Payload:
        kept = client.memory.get(OWN + msg["phase"])
        if kept is None or not all(0 <= i < len(kept["parts"]) for i in msg["want"]):
            raise PayloadError(f"client '{client.id}' has no such chunks of {msg['phase']}: {msg['want'][:5]}")
        return packed({i: kept["parts"][i] for i in msg["want"]})


def packed(parts: Mapping[int, Tensor]) -> dict[str, Any]:
    """Chunks by index, and their checksums in the same order."""
    return {OWN + "crc": [crc(p) for p in parts.values()], **{OWN + f"chunk/{i}": p for i, p in parts.items()}}


def crc(part: Tensor) -> int:
    return zlib.crc32(memoryview(part.contiguous().numpy()))


@dataclass
class Chunks:
    """The chunks of one reply, as far as they are good."""

    parts: dict[int, Tensor] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)

    def fill(self, reply: Payload) -> None:
        """Take what is good of this message, and note what is not."""
        names = [k for k in reply if k.startswith(OWN + "chunk/")]
        self.bad = []
        for name, want in zip(names, reply[OWN + "crc"], strict=True):
            i, part = int(name.rpartition("/")[2]), reply[name]
            if crc(part) == want:
                self.parts[i] = part
            else:
                self.bad.append(i)

    def payload(self) -> dict[str, Any]:
        return codec.decode(torch.cat([self.parts[i] for i in range(len(self.parts))]).numpy().tobytes())


class Whole:
    """Another reducer, fed with replies whose chunks are all good; the others wait under `broken`."""

    ragged: ClassVar[bool] = True

    def __init__(self, ask: Ask) -> None:
        self.ask, self.inner, self.chunks = ask, ask.reducer, 0
        self.form = None if ask.expects is None else ask.expects.bound(ask.msgs)
        self.broken: dict[str, Chunks] = {}
        self.each: dict[str, Payload] = {}

    def zero(self) -> dict[str, Any]:
        return {"acc": self.inner.zero() if self.inner else None}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        got = Chunks()
        got.fill(reply)
        self.chunks += len(got.parts) + len(got.bad)
        if got.bad:
            self.broken[reply[OWN + "id"]] = got
            return acc
        return {"acc": self.folded(acc["acc"], reply[OWN + "id"], got)}

    def folded(self, acc: Any, client: str, got: Chunks) -> Any:
        """One whole reply more."""
        reply = got.payload()
        if self.ask.opened is not None:
            reply = self.ask.opened(client, reply)
        if bad := non_finite(reply):
            raise PayloadError(f"'{bad[:80]}' holds NaN or infinity")
        if self.form is not None:
            self.form.check({k: v for k, v in reply.items() if not k.startswith("note/")})
        self.ask.fits(client, reply)
        if self.inner:
            return self.inner.add(acc, reply)
        self.each[client] = reply
        return acc

    def done(self, acc: dict[str, Any]) -> Payload:
        return acc


def chunked_share(chunk: float, loss: float, packet: int) -> float:
    """Expected bytes over bytes when a chunk is sent until it is whole: 1 / (1 - f), 1 - f = (1 - l)^(c / packet)."""
    return math.exp(-math.log1p(-loss) * chunk / packet)


def seconds(size: float, chunk: float, *, loss: float, packet: int, bandwidth: float, rtt: float = 0.02,
            post: float = 2e-5, depth: int = 4) -> float:
    """T = RTT + S / (BW (1 - f)) + ceil(S / c) t_post / d; with one chunk it is the time of resending the whole."""
    sent = size * chunked_share(min(chunk, size), loss, packet)
    return rtt + sent / bandwidth + math.ceil(size / chunk) * post / depth


def tuned(size: float, **line: Any) -> int:
    """The quickest power of two from 4 KiB to 64 MiB on this line."""
    return min((1 << p for p in range(12, 27)), key=lambda c: seconds(size, c, **line))
