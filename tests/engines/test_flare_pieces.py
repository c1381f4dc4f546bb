"""Long bodies in pieces: whole on arrival, damaged and lost pieces alone sent again, nothing oversized fetched."""

import os
import threading

import pytest

from fedllm.core.errors import PayloadError
from fedllm.engines.far import pieces as flare_pieces
from fedllm.engines.far.line import Silence
from fedllm.engines.far.pieces import HELD, LONGEST, InPieces, Pieces
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL


class Line:
    """A site's real host in this process; `trouble(head, data)` may damage what it carries, or raise."""

    def __init__(self, trouble=lambda way, head, data: data):
        self.host, self.trouble, self.carried = SiteHost(lambda head: None), trouble, []

    def call(self, site, head, body, seconds, over=None):
        self.carried.append((head["op"], head.get("at"), len(body)))
        said, data = self.host.answer(head, self.trouble("down", head, bytes(body)))
        return said, self.trouble("up", head, bytes(data))

    def revive(self, site):
        pass


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(flare_pieces, "PIECE", 1000)


def echo(line, body, size=None, **more):
    head = {"op": "echo", "protocol": PROTOCOL, "size": len(body) if size is None else size, **more}
    return InPieces(line).call("s", head, body, 20.0)


@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 5000, 12_345])
def test_there_and_back(length):
    line, body = Line(), os.urandom(length)
    head, back = echo(line, body)
    assert bytes(back) == body and head["got"] == length
    assert max(n for _, _, n in line.carried) <= 1000


def test_a_damaged_piece_alone_is_sent_again():
    hurt = set()

    def once(way, head, data):
        if head["op"] in ("piece_put", "piece_get") and head["at"] == 3000 and way not in hurt and data:
            hurt.add(way)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    line, body = Line(once), os.urandom(7500)
    assert bytes(echo(line, body)[1]) == body and hurt == {"down", "up"}
    puts = [at for op, at, _ in line.carried if op == "piece_put"]
    assert sorted(puts) == sorted([*range(0, 7500, 1000), 3000])


def test_one_that_is_always_damaged_is_given_up():
    line = Line(lambda way, head, data: data[:-1] if head["op"] == "piece_put" else data)
    with pytest.raises(Silence, match="damaged 4 times"):
        echo(line, os.urandom(3000))


def test_a_message_that_broke_off_goes_on_where_it_was():
    broken = threading.Event()

    def cut(way, head, data):
        if head["op"] == "piece_put" and head["at"] == 8000 and not broken.is_set():
            broken.set()
            raise Silence("the call broke off")
        return data

    line, body = Line(cut), os.urandom(10_000)
    with pytest.raises(Silence):
        echo(line, body, attempt="a", phase="p", visit=1)
    first = [at for op, at, _ in line.carried if op == "piece_put" and at != 8000]
    line.carried.clear()
    assert bytes(echo(line, body, attempt="a", phase="p", visit=1)[1]) == body
    second = [at for op, at, _ in line.carried if op == "piece_put"]
    assert set(second) == set(range(0, 10_000, 1000)) - set(first) and 8000 in second


def test_an_oversized_reply_is_not_fetched():
    line = Line()
    head, body = echo(line, os.urandom(5000), most=4000)
    assert head["oversized"] == "5000 bytes, allowed are 4000" and body == b""
    assert not [op for op, _, _ in line.carried if op == "piece_get"]


def test_a_site_holds_few_bodies_and_no_absurd_one():
    pieces = Pieces()
    for k in range(5):
        pieces.serve({"op": "pieces_begin", "token": f"t{k}", "length": 3000}, b"")
    assert len(pieces._coming) == HELD
    for length in (0, -1, LONGEST + 1):
        with pytest.raises(PayloadError, match=f"a body of {length} bytes"):
            pieces.serve({"op": "pieces_begin", "token": "x", "length": length}, b"")
    with pytest.raises(PayloadError, match="0 pieces of a body of 3000 bytes are here"):
        pieces.taken({"pieces": "t4"}, b"")
    with pytest.raises(PayloadError, match="no such body"):
        pieces.taken({"pieces": "t0"}, b"")
    for at in (-1000, 17, 3000, 10**12):
        assert pieces.serve({"op": "piece_put", "token": "t4", "at": at, "crc": 0}, b"") == ({"again": at}, b"")


def test_a_long_reply_goes_whole_to_one_who_does_not_fetch():
    said, body = SiteHost(lambda head: None).answer({"op": "echo", "protocol": PROTOCOL, "size": 5000}, bytes(5000))
    assert len(body) == 5000 and "pieces" not in said
