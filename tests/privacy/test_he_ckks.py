"""CKKS addition: the mean is the plain mean, the server holds no key, and what does not fit is refused."""

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import pack
from fedllm.core.program import drive, serve
from fedllm.core.reduce import Mean
from fedllm.privacy.he_ckks import HECKKS, CipherSum, split
from fedllm.wire import _keys as keys
from fedllm.wire import codec

ts = pytest.importorskip("tenseal")


class Ship:
    def round(self, state, clients):
        return (yield Ask(self.local, {c: {} for c in clients}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"x": client.x, "y": client.x[:3].double()}, n=client.n, loss=0.5)


def run(layer, clients, loop, silent=None):
    engine = loop((Ship(), layer), clients, silent)
    return drive(Ship().round(None, clients), engine, [layer]), engine


def test_the_mean_is_the_plain_mean_and_bytes_are_as_said(loop, people):
    clients, layer = people(4, size=6139), HECKKS()
    out, engine = run(layer, clients, loop)
    n = sum(c.n for c in clients.values())
    mean = sum(c.x * c.n for c in clients.values()) / n
    torch.testing.assert_close(out.value["delta/x"], mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.value["delta/y"], mean[:3].double(), atol=1e-6, rtol=1e-5)
    assert out.value["n"] == pytest.approx(n) and out.value["loss"] == pytest.approx(0.5, abs=1e-5)
    sent = next(r for p, _, r in engine.seen if p == "Ship.local")
    assert 28 < codec.size(sent) / 6144 < 31
    again, engine = run(layer, clients, loop, {"local": ["c01"]})  # keys are there; a drop-out costs nothing
    assert len(again.answered) == 3 and not any(p.endswith("make_key") for p, _, _ in engine.seen)


def test_many_rows_do_not_use_up_the_modulus(loop, people):
    clients = people(3, size=50)
    for c in clients.values():
        c.n *= 5000
    layer = HECKKS().bind(Facts(rows={c: v.n for c, v in clients.items()}, cohort=3, rounds=1))
    out, _ = run(layer, clients, loop)
    n = sum(c.n for c in clients.values())
    torch.testing.assert_close(out.value["delta/x"], sum(c.x * c.n for c in clients.values()) / n, atol=1e-5, rtol=1e-4)
    with pytest.raises(PayloadError, match="lower scale_bits"):
        run(HECKKS(), clients, loop)


def test_the_server_cannot_open_what_it_adds(loop, people):
    clients, layer = people(3), HECKKS()
    _, engine = run(layer, clients, loop)
    public = ts.context_from(layer.__dict__["_live"]["public"])
    assert not public.is_private()
    reply = next(r for p, c, r in engine.seen if p == "Ship.local")
    with pytest.raises(ValueError, match="secret"):
        ts.ckks_vector_from(public, split(reply)[0]).decrypt()
    boxes = next(r["boxes"] for p, _, r in engine.seen if p.endswith("make_key"))
    with pytest.raises(Exception):  # noqa: B017 - sealed: no context at all
        ts.context_from(boxes[0])
    assert "context" not in repr(layer) and len(layer.init()) == 0


def test_what_does_not_fit_is_refused(loop, people):
    clients = people(3)
    clients["c01"].x[0] = 5000.0
    with pytest.raises(PayloadError, match=r"client 'c01': a reply holds 10000 and CKKS .* room for 2730"):
        run(HECKKS(), clients, loop)
    with pytest.raises(RecipeError, match="poly_modulus_degree = 2048"):
        HECKKS(poly_modulus_degree=2048)
    with pytest.raises(CompositionError, match=r"he_ckks.*'Ship.each' needs every single reply"):
        HECKKS().check(Ship(), {"each": None})
    with pytest.raises(PayloadError, match="malformed"):
        CipherSum(b"no context").plus({}, {"cipher": torch.zeros(3, dtype=torch.uint8), "sizes": [3]})


def test_what_a_server_that_lies_can_do_is_said_and_no_more_works(loop, people):
    """It hands on a key of its own, and has one client open another's ciphertext: the statement names both. What a
    client can see to be wrong it refuses."""
    clients = people(3)
    layer = HECKKS().bind(Facts(rows={c: v.n for c, v in clients.items()}, cohort=3, rounds=1))
    ask = lambda fn, c, msg: serve((Ship(), layer), f"HECKKS.{fn}", msg, clients[c])  # noqa: E731
    adverts = {c: ask("advertise", c, {})["key"] for c in clients}
    mine = X25519PrivateKey.generate()
    public = mine.public_key().public_bytes_raw()
    made = ask("make_key", "c00", {"to": ["c01", "c02"], "keys": [public, adverts["c02"]]})
    box = made["boxes"][0]
    text = AESGCM(keys.agree(mine, adverts["c00"], "he", "c01", 32)).decrypt(box[:12], box[12:], b"c01")
    assert ts.context_from(text).is_private()
    ask("take", "c02", {"box": made["boxes"][1], "key": adverts["c00"]})
    told = {"_he/lift": False, "_he/count": 3, "_he/unit": 1.0}
    reply = {c: serve((Ship(), layer), "Ship.local", told, clients[c]) for c in ("c00", "c02")}
    opened = ask("open", "c00", reply["c02"])
    torch.testing.assert_close(opened["sum"][:40], clients["c02"].x.double(), atol=1e-5, rtol=1e-4)
    says = layer.statement({})["hides"]
    assert "can hand on keys of its own" in says and "have a client open another's update" in says
    with pytest.raises(PayloadError, match="client 'c00' opens one sum for each reply of its own"):
        ask("open", "c00", reply["c02"])
    with pytest.raises(PayloadError, match="refuses a sum of 1: fewer than 3"):
        serve((Ship(), layer), "Ship.local", {**told, "_he/count": 1}, clients["c00"])
    own = ts.context(ts.SCHEME_TYPE.CKKS, 4096, -1, [54, 55], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC)
    own.global_scale = 2.0**40
    for secret, scale in ((False, 40), (True, 30)):  # a box of the server's own, of another run's CKKS
        own.global_scale = 2.0**scale
        text = own.serialize(save_public_key=False, save_secret_key=secret)
        sealed = AESGCM(keys.agree(mine, adverts["c02"], "he", "c02", 32)).encrypt(bytes(12), text, b"c02")
        with pytest.raises(PayloadError, match="holds no secret key of this run's CKKS"):
            ask("take", "c02", {"box": bytes(12) + sealed, "key": public})


def test_a_key_that_its_maker_gives_away_and_a_sum_of_too_few_are_refused(loop, people):
    clients = people(4)
    layer = HECKKS().bind(Facts(rows={c: v.n for c, v in clients.items()}, cohort=4, rounds=1))
    seats = layer.__dict__["_seats"]

    def spoil(phase, c, reply):
        if not (c == "c00" and phase.endswith("make_key")):
            return reply
        return {**reply, "public": seats["c00"]["context"].serialize(save_secret_key=True)}

    engine = loop((Ship(), layer), clients, spoil=spoil)
    drive(Ship().round(None, clients), engine, [layer])
    assert [c for p, c, _ in engine.told if p.endswith("make_key")] == ["c00", "c01"]  # another one makes it
    assert not ts.context_from(layer.__dict__["_live"]["public"]).is_private()
    with pytest.raises(QuorumError, match="2 of the 3 clients answered among whom one must hide"):
        drive(Ship().round(None, clients), loop((Ship(), layer), clients, {"local": ["c00", "c01"]}), [layer])
