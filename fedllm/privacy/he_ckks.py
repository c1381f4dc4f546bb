"""Homomorphic encryption: the server adds what it cannot read, and the clients open the sum."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError, QuorumError
from fedllm.core.form import Form, aligned, need
from fedllm.core.layer import Algebra, Facts, Layer
from fedllm.core.method import Knobs, knob
from fedllm.core.payload import Payload
from fedllm.core.reduce import Sum, wide
from fedllm.core.sums import is_control, must_lift, need_sums, without
from fedllm.wire import _keys as keys
from fedllm.wire.codec import DTYPES, NAMES

OWN = "_he/"
SEALED = Form.of("cipher: whole, sizes: numbers, tensors: layout, names: names")
"""Of an encrypted reply."""
PRIMES = {4096: [54, 55], 8192: [60, 60], 16384: [60, 60]}
"""Additions alone need one level; 109, 218 and 438 bits are the limits of 128-bit security."""


@dataclass(frozen=True)
class HECKKS(Knobs, Layer):
    """CKKS addition on TenSEAL (an optional extra): the key is the clients', who all share it; never the server's.

    The first client asked makes the key and seals it to the others (X25519, AES-GCM; the server carries boxes that it
    cannot open). Replies are lifted and encrypted; the server adds ciphertexts; one client opens the sum, rounds it
    (CKKS noise may tell about the key) and hands it back. The server sees the sum alone; a client that colludes with
    it opens everything. No threshold key: that would need OpenFHE. About 30 bytes a value.
    """

    algebra = Algebra("he", needs="sum", reveals="sum", instead="secagg, at 4 bytes a value")
    session = (OWN + "lift",)

    poly_modulus_degree: Literal[4096, 8192, 16384] = knob(4096, "N; N/2 values a ciphertext",
                                                           options=(4096, 8192, 16384))
    scale_bits: int = knob(40, "bits after the point", ge=20, le=44)
    round_bits: int = knob(20, "bits after the point that are kept of an opened sum", ge=4, le=30)

    largest: int = knob(1, "weight of the heaviest client (its rows); found out by the run", ge=1)

    backend: Literal["tenseal", "openfhe"] = knob("tenseal", "the library", options=("tenseal", "openfhe"))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_seats", {})  # contexts with secret keys: no field, so in no recipe or checkpoint
        object.__setattr__(self, "_live", {"holders": [], "public": b""})  # of this process: a restart makes new keys

    @property
    def most(self) -> float:
        """Largest |entry| of the sum: what the modulus leaves above the scale."""
        return 2.0 ** (PRIMES[self.poly_modulus_degree][0] - self.scale_bits - 1)

    @property
    def unit(self) -> float:
        """What numbers are divided by, so that a mean's weights do not use up the modulus: a power of 2."""
        return 2.0 ** (self.largest - 1).bit_length()

    def bind(self, facts: Facts) -> HECKKS:
        return replace(self, largest=max(facts.rows.values(), default=1))

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)
        if self.backend == "openfhe":
            raise CompositionError(no_openfhe(type(self).__name__))
        tenseal()

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift, live = must_lift(ask, self), self.__dict__["_live"]
        if new := [c for c in ask.msgs if c not in live["holders"]]:
            yield from self._ceremony(new, live)
        told = {OWN + "lift": lift, OWN + "count": len(ask.msgs), OWN + "unit": self.unit}
        msgs = {c: {**ask.msgs[c], **told} for c in ask.msgs if c in live["holders"]}
        out = yield replace(ask, msgs=msgs, reduce=CipherSum(live["public"]), form=SEALED,
                            hidden={type(self).__name__: frozenset({"cipher"})})
        reply = yield from self._first(self.open, out.answered, out.value)
        total: dict[str, Any] = self._numbers(reply)
        at = 0
        for key, dtype, *shape in reply["tensors"]:
            n = int(np.prod(shape))
            total[key] = (reply["sum"][at : at + n] * self.unit).view(tuple(shape)).to(DTYPES[dtype])
            at += n
        return replace(out, value=ask.reducer.done(total))

    def _first(self, fn: Any, holders: Sequence[str], msg: Payload) -> Any:
        """What the first of the key's holders says that answers as it should; one that does not harms nobody."""
        missing: dict[str, str] = {}
        for holder in holders:
            out = yield Ask(fn, {holder: msg}, quorum=0)
            if holder in out:
                return out[holder]
            missing |= out.missing
        who = "; ".join(f"{c}: {why}" for c, why in list(missing.items())[:5])
        raise QuorumError(f"{type(self).__name__} gives the round up: none of {len(holders)} clients did "
                          f"'{fn.__name__}' ({who})")

    def _numbers(self, opened: Payload) -> dict[str, Any]:
        """The sum's entries that are no tensors, by name."""
        return {k: v * self.unit for k, v in zip(opened["names"], opened["numbers"], strict=True)}

    def _ceremony(self, new: list[str], live: dict[str, Any]) -> Any:
        """Public keys up, the boxes with the secret context down; the server keeps the part without a secret."""
        holders = live["holders"]
        adverts = yield Ask(self.advertise, {c: {} for c in [*new, *holders[:1]]})
        for maker in holders[:1] or list(adverts):
            others = [c for c in adverts if c != maker]
            told = {"to": others, "keys": [adverts[c]["key"] for c in others]}
            made = yield Ask(self.make_key, {maker: told}, quorum=0)
            if maker not in made:
                continue
            boxes = dict(zip(others, made[maker]["boxes"], strict=True))
            got = yield Ask(self.take, {c: {"box": box, "key": adverts[maker]["key"]} for c, box in boxes.items()},
                            quorum=0)
            if holders or 2 * len(got) >= len(others):  # else it is the maker whose boxes do not open
                live["public"] = made[maker]["public"]
                holders += ([] if holders else [maker]) + list(got)
                return
        if not holders:
            raise QuorumError(f"{type(self).__name__} gives the round up: none of {len(adverts)} clients made a key "
                              "that the others could take")

    def usable(self, msg: Payload, reply: Payload) -> None:
        need(keys.is_usable(reply["key"]), "'key' is no public key that anybody could seal to")

    @on_client(gives="key: bytes", fits=usable)
    def advertise(self, msg: Payload, client: Any) -> Payload:
        """A fresh public key to seal the context to."""
        seat = self._seat(client.id)
        seat["key"] = X25519PrivateKey.generate()
        return {"key": seat["key"].public_key().public_bytes_raw()}

    def made(self, msg: Payload, reply: Payload) -> None:
        """A context that the server can add under, and a box for each."""
        aligned(reply, ("boxes",), len(msg["to"]))
        try:
            tenseal().context_from(bytes(reply["public"]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise PayloadError(f"'public' is no CKKS context: {error}") from None

    @on_client(gives="boxes: blobs, public: bytes", fits=made)
    def make_key(self, msg: Payload, client: Any) -> Payload:
        """Make the key (once), and seal it to each of the others."""
        seat = self._seat(client.id)
        if "context" not in seat:
            ts, n = tenseal(), self.poly_modulus_degree
            made = ts.context(ts.SCHEME_TYPE.CKKS, n, -1, PRIMES[n], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC)
            made.global_scale = 2.0**self.scale_bits
            seat["context"] = made
        text = serialized(seat["context"], secret=True)
        boxes = []
        for peer, public in zip(msg["to"], msg["keys"], strict=True):
            nonce = secrets.token_bytes(12)
            box = AESGCM(keys.agree(seat["key"], public, "he", peer, 32)).encrypt(nonce, text, peer.encode())
            boxes.append(nonce + box)
        return {"boxes": boxes, "public": serialized(seat["context"], secret=False)}

    @on_client(gives="ok: count")
    def take(self, msg: Payload, client: Any) -> Payload:
        """Open my box."""
        seat = self._seat(client.id)
        key = keys.agree(seat["key"], msg["key"], "he", client.id, 32)
        try:
            text = AESGCM(key).decrypt(msg["box"][:12], msg["box"][12:], client.id.encode())
        except InvalidTag:
            raise PayloadError(f"client '{client.id}': the box with the HE key does not open") from None
        seat["context"] = tenseal().context_from(text)
        return {"ok": 1}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "lift" not in msg:
            return call(msg)
        reply = call(without(msg, OWN))
        lifted = fn.__dict__["reduce"].lift(reply) if msg[OWN + "lift"] else reply
        tensors = {k: wide(v) for k, v in lifted.items() if isinstance(v, Tensor)}
        numbers = {k: float(v) for k, v in lifted.items() if not isinstance(v, Tensor)}
        flat = torch.cat([*(t.reshape(-1).double() for t in tensors.values()),
                          torch.tensor(list(numbers.values()), dtype=torch.float64)]).numpy()
        names = [[k, NAMES[t.dtype], *t.shape] for k, t in tensors.items()]
        return {**self._encrypted(client.id, flat, msg), "tensors": names, "names": list(numbers)}

    def _encrypted(self, who: str, flat: np.ndarray, told: Payload) -> dict[str, Any]:
        """Ciphertexts of these numbers in the unit that all were told, if the sum of so many clients has room."""
        unit = told.get(OWN + "unit", 1.0)
        room = self.most * unit / told[OWN + "count"]
        if not np.abs(flat).max(initial=0) < room:
            raise PayloadError(f"client '{who}': a reply holds {np.abs(flat).max():.6g} and CKKS with scale 2^"
                               f"{self.scale_bits} has room for {room:g} of each client; lower scale_bits")
        context, slots = self._seat(who)["context"], self.poly_modulus_degree // 2
        parts = [tenseal().ckks_vector(context, flat[i : i + slots] / unit) for i in range(0, len(flat), slots)]
        return joined([p.serialize() for p in parts])

    def opened(self, msg: Payload, reply: Payload) -> None:
        """The names and shapes that it was told, and as many numbers as these have."""
        for key in ("names", "tensors"):
            need(list(reply[key]) == list(msg[key]), f"'{key}' is not as it was told")
        aligned(reply, ("numbers",), len(msg["names"]))
        size = sum(int(np.prod(shape)) for _, _, *shape in msg["tensors"]) if msg["tensors"] else None
        need(reply["sum"].dim() == 1 and size in (None, len(reply["sum"])), f"'sum' has {len(reply['sum'])} entries")

    @on_client(gives="sum: tensor, numbers: numbers, names: names, tensors: layout", fits=opened)
    def open(self, msg: Payload, client: Any) -> Payload:
        """Decrypt the sum, and round it before it leaves."""
        context = self._seat(client.id)["context"]
        parts = [tenseal().ckks_vector_from(context, b) for b in split(msg)]
        values = np.concatenate([p.decrypt() for p in parts])
        values = np.round(values * 2.0**self.round_bits) / 2.0**self.round_bits
        n = len(values) - len(msg["names"])
        return {"sum": torch.from_numpy(values[:n]), "numbers": values[n:].tolist(), "names": msg["names"],
                "tensors": msg["tensors"]}

    def statement(self, state: Any) -> dict[str, Any]:
        return {"layer": "he_ckks", "hides": "single updates from the server, unless a client colludes with it",
                "not_covered": "the sum itself, who answered; no differential privacy of its own", "void": []}

    def _seat(self, client: str) -> dict[str, Any]:
        return self.__dict__["_seats"].setdefault(client, {})


@dataclass(frozen=True)
class CipherSum(Sum):
    """Adds ciphertexts under a context that holds no secret key."""

    ragged = staticmethod(lambda reply: frozenset((k, repr(reply.get(k))) for k in ("tensors", "names")))

    public: bytes

    def lift(self, reply: Payload) -> Payload:
        return reply

    def plus(self, acc: dict[str, Any], lifted: Payload) -> dict[str, Any]:
        try:
            context = tenseal().context_from(self.public)
            parts = [tenseal().ckks_vector_from(context, b) for b in split(lifted)]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PayloadError(f"an encrypted reply is malformed: {error}") from None
        form = {"tensors": lifted["tensors"], "names": lifted["names"]}
        if not acc:
            return {"parts": parts, **form}
        if form != {k: acc[k] for k in form} or len(parts) != len(acc["parts"]):
            raise PayloadError("an encrypted reply's names or shapes differ from the others'")
        for mine, theirs in zip(acc["parts"], parts, strict=True):
            mine.add_(theirs)
        return acc

    def done(self, total: Payload) -> Payload:
        return {**joined([p.serialize() for p in total["parts"]]), "tensors": total["tensors"], "names": total["names"]}


def joined(blobs: list[bytes]) -> dict[str, Any]:
    """Ciphertexts as one tensor of bytes: bytes proper would cross the wire as text, a third longer."""
    return {"cipher": torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8), "sizes": [len(b) for b in blobs]}


def split(payload: Payload) -> list[bytes]:
    """The ciphertexts of `joined`."""
    return [bytes(t.numpy()) for t in payload["cipher"].split([int(n) for n in payload["sizes"]])]


def serialized(context: Any, secret: bool) -> bytes:
    """A CKKS context with its secret key, or without."""
    return context.serialize(save_public_key=False, save_secret_key=secret, save_galois_keys=False,
                             save_relin_keys=False)


def no_openfhe(layer: str) -> str:
    """Why there are no threshold keys here."""
    try:
        import openfhe  # noqa: F401
    except ImportError as error:
        why = f"it does not import under Python {platform.python_version()} ({error})"
    else:
        why = "it imports, and fedllm has no protocol for it yet"
    return (f"layer '{layer}' and the backend 'openfhe' do not fit together: {why}; backend: tenseal works, with one "
            "key that all clients share")


def tenseal() -> Any:
    """The library, which is an optional extra."""
    try:
        import tenseal as ts
    except ImportError:
        raise CompositionError("layer 'HECKKS' and this installation do not fit together: it needs TenSEAL (pip "
                               "install 'fedlm[he]'); secagg hides updates without it") from None
    return ts
