"""One large message over a connected socket in small chunks: a ring of buffers, a checksum a chunk, and only what was
lost is sent again.

A chunk is 24 bytes of head (message, index, length, CRC32) and its bytes; the receiver answers each with a verdict of
one byte (credit, or again) and the index. Chunks may be dropped, doubled, changed or come in any order: `Faults` does
so on purpose. A head without a chunk ends the message: until then the receiver stays, since what is under way twice
would meet a closed line, and the last word with it.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedllm.core.errors import PayloadError, RecipeError

CHUNK = struct.Struct("<QQII")  # message, index, length, CRC32
OPEN = struct.Struct("<QQQI")  # message, bytes, chunk bytes, CRC32 of all
WORD = struct.Struct("<cQ")  # verdict, index (of G: the first chunk wanted)
OK, AGAIN, DONE, GO = b"+", b"-", b"!", b"G"
MOST = 1 << 40
"""Bytes of a message that a receiver is ready to hear of at all; each has its own, lower `limit`."""


@dataclass(frozen=True)
class Ring:
    """How messages are cut and how long the ends wait."""

    chunk_bytes: int = 4 << 20
    depth: int = 4
    """Chunks under way at a time."""
    max_retries: int = 5
    """Times that one chunk is sent again before the transfer is given up."""
    chunk_timeout: float = 5.0
    """Seconds without an answer after which chunks under way are sent again."""
    timeout: float = 30.0
    """Seconds without a byte after which the connection counts as dead; no less than a receiver takes to look over the
    whole message."""

    def __post_init__(self) -> None:
        if not 4 << 10 <= self.chunk_bytes <= 1 << 30:
            raise RecipeError(f"chunk_bytes = {self.chunk_bytes!r} is not allowed; it must be from 4 KiB to 1 GiB")
        for name, low in (("depth", 1), ("max_retries", 0)):
            if getattr(self, name) < low:
                raise RecipeError(f"{name} = {getattr(self, name)!r} is not allowed; it must be a whole number from "
                                  f"{low}")
        for name in ("chunk_timeout", "timeout"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} = {getattr(self, name)!r} is not allowed; it must be above 0 seconds")


@dataclass
class Faults:
    """What a bad line does to chunks, by chance."""

    drop: float = 0.0
    double: float = 0.0
    swap: float = 0.0
    flip: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    kept: bytes | None = None

    def through(self, packet: bytes) -> list[bytes]:
        """What comes out of the line for this packet."""
        if self.rng.random() < self.drop:
            return []
        if self.rng.random() < self.flip and len(packet) > CHUNK.size:
            at = self.rng.randrange(CHUNK.size, len(packet))
            packet = packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]
        out = [packet] * (1 + (self.rng.random() < self.double))
        if self.kept is not None:
            out.append(self.kept)
            self.kept = None
        elif self.rng.random() < self.swap:
            self.kept, out = packet, out[1:]
        return out


@dataclass
class Sent:
    """What a transfer took."""

    chunks: int = 0
    resent: int = 0
    bytes: int = 0
    """On the line, heads included."""


@contextlib.contextmanager
def _spoken() -> Iterator[None]:
    """A line that dies is said in our own words."""
    try:
        yield
    except OSError as error:
        raise PayloadError(f"the connection died: {type(error).__name__}") from None


@_spoken()
def send(sock: socket.socket, data: bytes | bytearray | memoryview, ring: Ring, message: int = 1,
         faults: Faults | None = None, stop_at: float | None = None) -> Sent:
    """Send one message; the receiver says from which chunk on (a transfer that was cut goes on there).

    Raises PayloadError when a chunk fails more often than `max_retries`, or nobody answers. `stop_at` hangs up once so
    large a share was acknowledged, as a line that is cut does.
    """
    view, c, out = memoryview(data).cast("B"), ring.chunk_bytes, Sent()
    count = -(-len(view) // c)
    sock.settimeout(ring.timeout)
    sock.sendall(OPEN.pack(message, len(view), c, zlib.crc32(view)))
    verdict, first = WORD.unpack(_exactly(sock, WORD.size))
    if verdict != GO:
        raise PayloadError(f"the receiver refuses a message of {len(view)} bytes")
    todo, flying, tries = deque(range(first, count)), dict[int, float](), dict[int, int]()
    left = set(todo)
    while left:
        while todo and len(flying) < ring.depth:
            i = todo.popleft()
            tries[i] = tries.get(i, 0) + 1
            if tries[i] > ring.max_retries + 1:
                raise PayloadError(f"chunk {i} of {count} failed {ring.max_retries + 1} times; the line is too bad for "
                                   f"chunks of {c} bytes: try smaller ones")
            part = view[i * c : (i + 1) * c]
            packet = CHUNK.pack(message, i, len(part), zlib.crc32(part)) + part
            out.chunks, out.resent, out.bytes = out.chunks + 1, out.resent + (tries[i] > 1), out.bytes + len(packet)
            for piece in faults.through(packet) if faults else [packet]:
                sock.sendall(piece)
            flying[i] = time.monotonic() + ring.chunk_timeout
        wait = max(0.0, min(flying.values()) - time.monotonic())
        if select.select([sock], [], [], wait)[0]:
            verdict, i = WORD.unpack(_exactly(sock, WORD.size))
            if i not in flying and i not in left:
                continue
            flying.pop(i, None)
            if verdict == OK:
                left.discard(i)
            elif i in left and i not in todo:
                todo.appendleft(i)
        else:
            late = [i for i, ends in flying.items() if ends <= time.monotonic()]
            for i in late:
                flying.pop(i)
                todo.appendleft(i)
        if stop_at is not None and 1 - len(left) / max(1, count) >= stop_at:
            return out
    _finish(sock)
    with contextlib.suppress(OSError):  # who has the message whole may have gone
        sock.sendall(CHUNK.pack(message, count, 0, 0))
    return out


def _finish(sock: socket.socket) -> None:
    """Doubles may still be answered before the receiver's last word."""
    while (verdict := WORD.unpack(_exactly(sock, WORD.size))[0]) in (OK, AGAIN):
        pass
    if verdict != DONE:
        raise PayloadError("the receiver has all chunks and their checksum is not that of the message")


@dataclass
class Receiver:
    """Takes one message, over as many connections as it needs."""

    limit: int = 1 << 32
    """Bytes of the largest message that is taken: what a sender declares is not to be trusted."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as dead."""
    into: Callable[[int, memoryview], None] | None = None
    """Called with the place and the bytes of each good chunk (to write them to a file); None: the message is kept."""
    message: int | None = None
    data: bytearray = field(default_factory=bytearray)
    here: set[int] = field(default_factory=set)

    @_spoken()
    def take(self, sock: socket.socket) -> bytearray:
        """The message; raises PayloadError for what is malformed, too large or cut (then `take` another connection)."""
        sock.settimeout(self.timeout)
        message, size, c, whole = OPEN.unpack(_exactly(sock, OPEN.size))
        if size > min(self.limit, MOST) or c < 1:
            sock.sendall(WORD.pack(AGAIN, 0))
            raise PayloadError(f"a message of {size} bytes is above the limit of {self.limit}")
        if message != self.message:
            self.message, self.data, self.here = message, bytearray(), set()
        count = -(-size // c)
        if self.into is None and len(self.data) != size:
            self.data = bytearray(size)
        first = next((i for i in range(count) if i not in self.here), count)
        sock.sendall(WORD.pack(GO, first))
        buffer = bytearray(min(c, max(size, 1)))
        while len(self.here) < count:
            self._chunk(sock, message, count, c, size, buffer)
        good = self.into is not None or zlib.crc32(self.data) == whole
        sock.sendall(WORD.pack(DONE if good else GO, 0))
        if not good:
            raise PayloadError("all chunks came and the message's checksum is another")
        with contextlib.suppress(OSError, PayloadError):  # the message is here, whatever becomes of the line
            self._stay(sock, message, count, buffer)
        return self.data

    def _stay(self, sock: socket.socket, message: int, count: int, buffer: bytearray) -> None:
        """Take what was sent twice until the sender has heard that all is here."""
        while True:
            of, i, length, _ = CHUNK.unpack(_exactly(sock, CHUNK.size))
            if (of, i) == (message, count) or length > len(buffer):
                return
            _fill(sock, memoryview(buffer)[:length])

    def _chunk(self, sock: socket.socket, message: int, count: int, c: int, size: int, buffer: bytearray) -> None:
        of, i, length, crc = CHUNK.unpack(_exactly(sock, CHUNK.size))
        if of != message or i >= count or length != min(c, size - i * c):
            raise PayloadError(f"a chunk with index {i} and {length} bytes does not belong to this message")
        part = memoryview(buffer)[:length]
        _fill(sock, part)
        if zlib.crc32(part) != crc:
            sock.sendall(WORD.pack(AGAIN, i))
            return
        if i not in self.here:
            if self.into is None:
                self.data[i * c : i * c + length] = part
            else:
                self.into(i * c, part)
            self.here.add(i)
        sock.sendall(WORD.pack(OK, i))


def _exactly(sock: socket.socket, size: int) -> bytes:
    got = bytearray(size)
    _fill(sock, memoryview(got))
    return bytes(got)


def _fill(sock: socket.socket, view: memoryview) -> None:
    at = 0
    while at < len(view):
        n = sock.recv_into(view[at:])
        if not n:
            raise PayloadError("the connection was closed in the middle of a message")
        at += n
