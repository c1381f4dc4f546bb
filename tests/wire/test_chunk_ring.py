"""Chunks over sockets: exact under faults, resumed after a cut, in bounded memory; and the layer over engines."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid

import pytest

from evidence.rigs.topology import carried
from fedllm.core.errors import PayloadError, RecipeError
from fedllm.wire._chunk_ring import CHUNK, OPEN, Faults, Receiver, Ring, send
from fedllm.wire.fedrdma import chunked_share, seconds, tuned

C = 4096
FAST = Ring(C, depth=4, max_retries=60, chunk_timeout=0.05)


@pytest.mark.parametrize("size", [0, 1, C - 1, C, C + 1, 10 * C + 7])
def test_exact_under_faults(size):
    data = random.Random(size).randbytes(size)
    got, sent = carried(data, FAST, Faults(0.2, 0.2, 0.2, 0.2, random.Random(1)))
    assert got == data and sent.chunks - sent.resent == -(-size // C)
    got, sent = carried(data, FAST)
    assert got == data and sent.resent == 0 and sent.bytes == size + CHUNK.size * -(-size // C)


def test_only_what_was_lost_is_sent_again():
    data = random.Random(0).randbytes(400 * C)
    got, sent = carried(data, FAST, Faults(drop=0.2, rng=random.Random(2)))
    assert got == data and 0.1 < sent.resent / 400 < 0.45


def test_a_cut_transfer_goes_on():
    data, half = random.Random(0).randbytes(200 * C), Receiver()
    with pytest.raises(PayloadError, match=r"closed|died"):
        carried(data, FAST, stop_at=0.6, receiver=half)
    got, sent = carried(data, FAST, receiver=half)
    assert got == data and sent.bytes <= 0.45 * len(data)


def test_a_line_that_is_too_bad_is_given_up():
    with pytest.raises(PayloadError, match="failed 3 times; the line is too bad"):
        carried(b"x" * 9 * C, Ring(C, max_retries=2, chunk_timeout=0.02), Faults(drop=1.0))


def test_what_is_sent_twice_meets_a_receiver_that_is_still_there():
    """A chunk that is long under way is sent again; its receiver had everything by then, and hung up."""
    data, job, receiver = random.Random(0).randbytes(4 << 20), None, Receiver()

    class Slow:
        """A sender's socket, whose second copy goes off when the receiver's last word is here."""

        def __init__(self, sock):
            self.sock = sock

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def sendall(self, part):
            if len(part) > len(data) and self.sent:
                ends = time.monotonic() + 60
                while b"!" not in self.sock.recv(99, socket.MSG_PEEK)[::9] and time.monotonic() < ends:
                    time.sleep(0.01)
                job.join(0.2)
            self.sent = len(part) > len(data)
            self.sock.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as server:
        def take():
            sock, _ = server.accept()
            with sock:
                receiver.take(sock)

        job = threading.Thread(target=take, daemon=True)
        job.start()
        with socket.create_connection(server.getsockname(), timeout=60) as sock:
            sent = send(Slow(sock), data, Ring(8 << 20, chunk_timeout=60.0), faults=Faults(double=1.0))
            job.join(60)
            assert not job.is_alive()  # the connection stands, and is free for the next message
    assert receiver.data == data and sent.chunks == 1


def test_what_a_sender_declares_is_not_trusted():
    with pytest.raises(PayloadError, match="refuses a message of 9000"):
        carried(b"x" * 9000, FAST, receiver=Receiver(limit=8000))
    a, b = socket.socketpair()
    with a, b, pytest.raises(PayloadError, match="does not belong to this message"):
        a.sendall(OPEN.pack(1, C, C, 0) + CHUNK.pack(1, 7, C, 0))
        Receiver().take(b)
    a, b = socket.socketpair()
    a.close()
    with b, pytest.raises(PayloadError, match="closed in the middle"):
        Receiver().take(b)


@pytest.mark.parametrize("knobs, says", [({"depth": 0}, "depth = 0"), ({"chunk_bytes": 100}, "from 4 KiB to 1 GiB"),
                                         ({"max_retries": -1}, "max_retries = -1"), ({"chunk_timeout": 0}, "above 0"),
                                         ({"timeout": 0}, "timeout = 0 is not allowed")])
def test_bad_knobs(knobs, says):
    with pytest.raises(RecipeError, match=says):
        Ring(**knobs)


def test_memory_of_the_receiver(tmp_path):
    """64 MB into a file: one chunk at a time is held; the same as one message takes 64 MB."""
    data, c = bytes(64 << 20), 1 << 20

    def taken(receiver):
        a, b = socket.socketpair()
        job = threading.Thread(target=send, args=(a, data, Ring(c, depth=4)))
        with a, b:
            job.start()
            tracemalloc.start()
            receiver.take(b)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            job.join(30)
        return peak

    with (tmp_path / "message").open("wb") as file:
        def into(at, part):
            file.seek(at)
            file.write(part)

        assert taken(Receiver(into=into)) <= 5 * c + (1 << 20)
    assert (tmp_path / "message").read_bytes() == data
    assert taken(Receiver()) >= len(data)


def test_closed_forms():
    assert chunked_share(4 << 20, 1e-4, 4096) == pytest.approx((1 - 1e-4) ** -1024)
    assert chunked_share(100e6, 1e-4, 4096) == pytest.approx(11.5, rel=0.01)
    line = {"loss": 1e-4, "packet": 1500, "bandwidth": 1.25e8}
    assert chunked_share(4 << 20, 1e-4, 1500) == pytest.approx(1.32, rel=0.01)
    best = tuned(100e6, **line)
    assert best <= 1 << 20
    assert all(seconds(100e6, best, **line) <= seconds(100e6, 1 << p, **line) for p in range(12, 27))


RECEIVE = """
import socket, sys, zlib
from fedllm.wire._chunk_ring import Receiver
with socket.create_server(("10.99.0.1", 5099)) as server:
    server.settimeout(60)
    print("ready", flush=True)
    sock, _ = server.accept()
    with sock:
        print(zlib.crc32(Receiver().take(sock)), flush=True)
"""
SEND = """
import random, socket, zlib
from fedllm.wire._chunk_ring import Faults, Ring, send
data = random.Random(0).randbytes(4 << 20)
with socket.create_connection(("10.99.0.1", 5099), timeout=60) as sock:
    sent = send(sock, data, Ring(1 << 16, max_retries=60, chunk_timeout=0.2), faults=Faults(.05, .05, .05, .05))
print(zlib.crc32(data), sent.resent, flush=True)
"""


def _ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable; skipped where this machine does not permit it."""
    if os.geteuid() or not os.path.exists("/usr/sbin/ip"):
        pytest.skip("network namespaces take root and the tool ip")
    tag = uuid.uuid4().hex[:6]
    a, b = f"fl-{tag}a", f"fl-{tag}b"
    steps = [("netns", "add", a), ("netns", "add", b),
             ("link", "add", f"v{tag}a", "netns", a, "type", "veth", "peer", "name", f"v{tag}b", "netns", b)]
    for ns, end, ip in ((a, f"v{tag}a", "10.99.0.1/24"), (b, f"v{tag}b", "10.99.0.2/24")):
        steps += [("-n", ns, "addr", "add", ip, "dev", end), ("-n", ns, "link", "set", end, "up")]
    try:
        for step in steps:
            if (done := _ip(*step)).returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield a, b
    finally:
        _ip("netns", "del", a)
        _ip("netns", "del", b)


def test_between_two_network_namespaces(two_hosts):
    a, b = two_hosts
    word = lambda ns, code: ["ip", "netns", "exec", ns, sys.executable, "-c", code]  # noqa: E731
    with subprocess.Popen(word(a, RECEIVE), stdout=subprocess.PIPE, text=True) as taking:
        try:
            assert taking.stdout.readline().strip() == "ready"
            sent = subprocess.run(word(b, SEND), capture_output=True, text=True, timeout=90, check=True).stdout.split()
            assert taking.stdout.readline().strip() == sent[0] and int(sent[1]) > 0
            assert taking.wait(20) == 0
        finally:
            taking.kill()
