"""Long bodies cross in pieces: bounded memory on both sides, and a bad or lost piece is sent again, not the whole.

A piece is a slice of the one flat buffer, with its CRC-32. The receiver announces nothing and copies each piece to its
place at once, so that a body costs its own length and the few pieces under way, whatever the transport copies.
"""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fedllm.core.errors import PayloadError
from fedllm.engines.far.line import Body, Head, Link, Silence
from fedllm.engines.far.reasons import sentence
from fedllm.engines.far.sites import PROTOCOL

PIECE = 16 << 20
"""Bytes of a piece; what is no longer than that crosses whole."""

AT_ONCE, FEW = 3, 2
"""Pieces under way at a time: one more is 5 % quicker and costs 0.18 GB, for which a heavy body leaves no room."""

HEAVY = 1 << 30
"""Bytes from which a body goes by `FEW` pieces at a time."""

TRIES = 4
"""How often a piece that arrives damaged is sent."""

LONGEST = 8 << 30
"""Bytes of the longest body that a site takes."""

HELD = 2
"""Bodies that a site holds at a time, coming in or waiting to be fetched; the oldest is one that was given up."""

PIECE_OPS = ("pieces_begin", "piece_put", "piece_get")
FETCHES = "fetches"
"""In an envelope: the asker fetches a long reply in pieces."""


def empty(length: int) -> memoryview:
    """A buffer that is written before it is read."""
    return torch.empty(length, dtype=torch.uint8).numpy().data


@dataclass
class Parcel:
    """One body on its way."""

    data: memoryview
    here: set[int] = field(default_factory=set)
    """Where the pieces begin that have arrived."""


class Pieces:
    """A site's side: what the server has sent so far, and what it has yet to fetch."""

    def __init__(self, size: int | None = None) -> None:
        """`size` are the bytes of a piece (None: `PIECE`); both ends must have the same."""
        self.size, self._lock = size or PIECE, threading.Lock()
        self._coming, self._going = OrderedDict[str, Parcel](), OrderedDict[str, memoryview]()

    def serve(self, head: Head, body: Body) -> tuple[dict[str, Any], Body]:
        """Answers `pieces_begin` (which are here?), `piece_put` (take one) and `piece_get` (give one)."""
        token, op = str(head["token"]), head["op"]
        if op == "piece_get":
            data, at = self._find(self._going, token), int(head["at"])
            piece = data[at : at + self.size]
            return {"crc": zlib.crc32(piece)}, piece
        if op == "pieces_begin":
            return {"here": sorted(self._begin(token, int(head["length"])).here)}, b""
        parcel, at = self._find(self._coming, token), int(head["at"])
        whole = not at % self.size and 0 <= at < len(parcel.data) and len(body) == min(self.size, len(parcel.data) - at)
        if not whole or zlib.crc32(body) != head["crc"]:
            return {"again": at}, b""
        parcel.data[at : at + len(body)] = body
        with self._lock:
            parcel.here.add(at)
        return {"got": at}, b""

    def taken(self, head: Head, body: Body) -> Body:
        """The body of this message, which may have come before it; it stays until the next ones push it out."""
        if "pieces" not in head:
            return body
        parcel = self._find(self._coming, str(head["pieces"]))
        if len(parcel.here) * self.size < len(parcel.data):
            raise PayloadError(f"{len(parcel.here)} pieces of a body of {len(parcel.data)} bytes are here, not all")
        with self._lock:
            self._coming.pop(str(head["pieces"]), None)
        return parcel.data

    def given(self, head: Head, said: dict[str, Any], body: Body) -> tuple[dict[str, Any], Body]:
        """A long reply is left here to be fetched, if the asker fetches."""
        if len(body) <= self.size or FETCHES not in head:
            return said, body
        token = uuid.uuid4().hex
        with self._lock:
            self._going.clear()  # the server has one question at a time: what it did not fetch, it gave up
            self._going[token] = memoryview(body)
        return {**said, "pieces": token, "length": len(body)}, b""

    def _begin(self, token: str, length: int) -> Parcel:
        if not 0 < length <= LONGEST:
            raise PayloadError(f"a body of {length} bytes, allowed are {LONGEST}")
        with self._lock:
            parcel = self._coming.get(token)
            if parcel is None or len(parcel.data) != length:
                self._going.clear()
                while len(self._coming) >= HELD:
                    self._coming.popitem(last=False)
                parcel = self._coming[token] = Parcel(empty(length))
            return parcel

    def _find(self, held: OrderedDict[str, Any], token: str) -> Any:
        with self._lock:
            if token not in held:
                raise PayloadError("no such body is on its way here")
            return held[token]


class InPieces:
    """A `Link` over another one that carries long bodies in pieces, both ways."""

    def __init__(self, link: Link, size: int | None = None) -> None:
        self.link, self.size = link, size or PIECE

    def revive(self, site: str) -> None:
        self.link.revive(site)

    def call(self, site: str, head: Head, body: Body, seconds: float, over: threading.Event | None = None
             ) -> tuple[Head, Body]:
        """The site's answer; raises `Silence` when there is none within `seconds`, or once `over` is set.

        A reply longer than the `most` bytes of the envelope is not fetched: `oversized` says so in its place.
        """
        trip = _Trip(self.link, site, time.monotonic() + seconds, over, self.size)
        head = {**head, FETCHES: True}
        if len(body) > self.size:
            token = "-".join(str(head[k]) for k in ("attempt", "phase", "visit") if k in head) or uuid.uuid4().hex
            trip.send(token, memoryview(body))
            got, reply = trip.ask({**head, "pieces": token}, b"")
        else:
            got, reply = trip.ask(head, body)
        if "pieces" not in got:
            return got, reply
        length, most = int(got["length"]), int(head.get("most", LONGEST))
        if not self.size < length <= most:
            return {**got, "oversized": f"{length} bytes, allowed are {most}"}, b""
        return got, trip.fetch(str(got["pieces"]), length)


@dataclass
class _Trip:
    """One message and its answer."""

    link: Link
    site: str
    ends: float
    over: threading.Event | None
    size: int

    def ask(self, head: Head, body: Body) -> tuple[Head, Body]:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise Silence("its deadline passed")
        return self.link.call(self.site, head, body, left, self.over)

    def send(self, token: str, body: memoryview) -> None:
        """Those pieces that the site does not have yet: all of them, unless an attempt before this one broke off."""
        here = set(self._said({"op": "pieces_begin", "token": token, "length": len(body)})[0]["here"])
        left = [at for at in range(0, len(body), self.size) if at not in here]
        self._each(left, lambda at: self._piece(token, at, body))

    def fetch(self, token: str, length: int) -> memoryview:
        """The reply, each piece copied to its place."""
        out = empty(length)

        def one(at: int) -> bool:
            said, piece = self._said({"op": "piece_get", "token": token, "at": at})
            if len(piece) != min(self.size, length - at) or zlib.crc32(piece) != said["crc"]:
                return False
            out[at : at + len(piece)] = piece
            return True

        self._each(range(0, length, self.size), one)
        return out

    def _piece(self, token: str, at: int, body: memoryview) -> bool:
        piece = body[at : at + self.size]
        said, _ = self._said({"op": "piece_put", "token": token, "at": at, "crc": zlib.crc32(piece)}, piece)
        return "got" in said

    def _said(self, head: dict[str, Any], body: Body = b"") -> tuple[Head, Body]:
        said, data = self.ask({**head, "protocol": PROTOCOL}, body)
        if "refused" in said:
            raise Silence(f"a piece was refused by the site: {sentence(said['refused'])}")
        return said, data

    def _each(self, places: Sequence[int], work: Any) -> None:
        """`work` at every place, a few at a time; a damaged piece is done again, a few times."""

        def tried(at: int) -> None:
            if not any(work(at) for _ in range(TRIES)):
                raise Silence(f"the piece from byte {at} arrived damaged {TRIES} times")

        pool = ThreadPoolExecutor(AT_ONCE if len(places) * self.size < HEAVY else FEW, thread_name_prefix="flare-piece")
        try:
            for done in [pool.submit(tried, at) for at in places]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
