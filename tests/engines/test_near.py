"""Sites that are processes of this machine: what crosses their sockets, and that no wait is without an end."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from fedllm.engines.far.near import ENVELOPE, Near, put, serve, take
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL, Silence, Sites


def pair():
    one, other = socket.socketpair()
    one.settimeout(30)
    other.settimeout(0.05)
    return one, other


def test_a_message_comes_whole_and_one_that_breaks_off_is_none():
    one, other = pair()
    body = bytes(range(256)) * 5000
    sender = threading.Thread(target=put, args=(one, {"op": "ask", "n": 3}, body))
    sender.start()
    head, got = take(other, lambda: True)
    sender.join()
    assert head == {"op": "ask", "n": 3} and bytes(got) == body
    one.sendall(struct.pack("<IQ", 4, 100) + b"{}")
    one.close()
    with pytest.raises(EOFError, match="broke off"):
        take(other, lambda: True)


@pytest.mark.parametrize("body", [b"", b"abc"])
def test_an_answer_that_is_there_before_the_question_is_off_the_desk_is_taken(body):
    """The other end has everything, answers and closes before this end's last call of `sendall` comes back."""
    one, other = pair()

    def answer():
        head, got = take(other, lambda: True)
        put(other, head, got)
        other.close()

    answered = threading.Thread(target=answer)
    answered.start()

    class Late:
        sent = 0

        def sendall(self, data):
            one.sendall(data)
            self.sent += len(data)
            if self.sent == 12 + len(b'{"n": 3}') + len(body):
                answered.join(5)

    put(Late(), {"n": 3}, body)
    assert take(one, lambda: True) == ({"n": 3}, body)


def test_lengths_that_nobody_may_send_are_refused_before_anything_is_read():
    one, other = pair()
    one.sendall(struct.pack("<IQ", ENVELOPE + 1, 0))
    with pytest.raises(EOFError, match="allowed are"):
        take(other, lambda: True)


def test_a_wait_ends_when_nobody_wants_the_answer():
    _, other = pair()
    ends = time.monotonic() + 0.3
    with pytest.raises(EOFError, match="nobody waits"):
        take(other, lambda: time.monotonic() < ends)
    assert time.monotonic() - ends < 30


class Here(Near):
    """Its sites are threads of this process, which load nothing."""

    def __init__(self, folder, names):
        self.folder, self.processes = str(folder), dict.fromkeys(names, threading.main_thread())
        self._paths = {n: self.path(i) for i, n in enumerate(names)}
        for i, n in enumerate(names):
            threading.Thread(target=serve, args=(lambda name: SiteHost(lambda head: None), n, self.path(i)),
                             daemon=True).start()


def test_a_site_answers_on_its_socket_and_one_that_is_not_there_is_silent(tmp_path):
    near = Here(tmp_path, ["a"])
    near.meet(Sites(near, ["a"]), 60)  # a socket that is there may not listen yet
    head, body = near.call("a", {"op": "probe", "protocol": PROTOCOL}, b"", 30)
    assert head["open"] is False and not body
    head, body = near.call("a", {"op": "echo", "protocol": PROTOCOL, "size": 4}, b"abcdef", 30)
    assert head["got"] == 6 and bytes(body) == b"abcd"
    near._paths["b"] = near.path(7)
    with pytest.raises(Silence, match="does not answer"):
        near.call("b", {"op": "probe", "protocol": PROTOCOL}, b"", 1)
    over = threading.Event()
    over.set()
    with pytest.raises(Silence):
        near.call("a", {"op": "probe", "protocol": PROTOCOL}, b"", 5, over)
