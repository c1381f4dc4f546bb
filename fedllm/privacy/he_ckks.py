"""Homomorphic encryption: the server adds what it cannot read, and the clients open the sum."""

from __future__ import annotations

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
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, Withheld
from fedllm.core.form import Form, aligned, need
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer, name_of
from fedllm.core.payload import Payload
from fedllm.core.reduce import wide
from fedllm.core.sums import SMALLEST, is_control, must_lift, need_sums, without
from fedllm.privacy._ckks import CipherSum, joined, no_openfhe, serialized, split, tenseal
from fedllm.privacy._shared import need_company
from fedllm.wire import _keys as keys
from fedllm.wire.codec import DTYPES, NAMES

__all__ = ["HECKKS", "CipherSum", "split", "tenseal"]

OWN = "_he/"
SEALED = Form.of("cipher: whole, sizes: numbers, tensors: layout, names: names")
"""Of an encrypted reply."""
PRIMES = {4096: [54, 55], 8192: [60, 60], 16384: [60, 60]}
"""Additions alone need one level; 109, 218 and 438 bits are the limits of 128-bit security."""
HONEST = ("a server that follows the protocol, unless a client colludes with it; one that lies can hand on keys of its "
          "own, or have a client open another's update")
GIVERS = 3
"""Holders that are asked to hand the key on, one after another: all but one may have been started again."""


@dataclass(frozen=True)
class HECKKS(Knobs, Layer):
    """CKKS addition on TenSEAL (an optional extra): the key is the clients', who all share it; never the server's.

    The first client asked makes the key and seals it to the others (X25519, AES-GCM; the server carries boxes that it
    cannot open). Replies are lifted and encrypted; the server adds ciphertexts; one client opens the sum, rounds it
    (CKKS noise may tell about the key) and hands it back. A server that follows the protocol sees the sum alone. One
    that lies can hand on keys of its own as the clients', or give a client another's ciphertext to open: what a
    ciphertext is the sum of nobody can see, so clients open once for each reply of theirs and check no more. A client
    that colludes with it opens everything. No threshold key: that would need OpenFHE. About 30 bytes a value.
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
        object.__setattr__(self, "_least", 1)

    @property
    def most(self) -> float:
        """Largest |entry| of the sum: what the modulus leaves above the scale."""
        return 2.0 ** (PRIMES[self.poly_modulus_degree][0] - self.scale_bits - 1)

    @property
    def unit(self) -> float:
        """What numbers are divided by, so that a mean's weights do not use up the modulus: a power of 2."""
        return 2.0 ** (self.largest - 1).bit_length()

    def bind(self, facts: Facts) -> HECKKS:
        bound, n = replace(self, largest=max(facts.rows.values(), default=1)), facts.cohort or len(facts.rows)
        if n:
            need_company(self, n)
        object.__setattr__(bound, "_least", min(SMALLEST, n))
        return bound

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)
        if self.backend == "openfhe":
            raise CompositionError(no_openfhe(name_of(self)))
        tenseal()

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift, here = must_lift(ask, self), (yield from self._keyed(ask))
        told = {OWN + "lift": lift, OWN + "count": len(ask.msgs), OWN + "unit": self.unit}
        out = yield from self._asked(replace(
            ask, msgs={c: {**ask.msgs[c], **told} for c in here}, reduce=CipherSum(self.__dict__["_live"]["public"]),
            form=SEALED, hidden={type(self).__name__: frozenset({"cipher"})}))
        self._enough(out.answered)
        reply = yield from self._first(self.open, out.answered, out.value)
        total: dict[str, Any] = self._numbers(reply)
        at = 0
        for key, dtype, *shape in reply["tensors"]:
            n = int(np.prod(shape))
            total[key] = (reply["sum"][at : at + n] * self.unit).view(tuple(shape)).to(DTYPES[dtype])
            at += n
        return replace(out, value=ask.reducer.done(total))

    def _enough(self, answered: Sequence[str]) -> None:
        """A sum of too few is one that nobody hides in: it stays closed."""
        if len(answered) < (least := self.__dict__["_least"]):
            raise QuorumError(f"{name_of(self)} gives the round up: {len(answered)} of the {least} clients "
                              "answered among whom one must hide")

    def _first(self, fn: Any, holders: Sequence[str], msg: Payload) -> Any:
        """What the first of the key's holders says that answers as it should; one that does not harms nobody."""
        missing: dict[str, str] = {}
        for holder in holders:
            out = yield Ask(fn, {holder: msg}, quorum=0)
            if holder in out:
                return out[holder]
            missing |= out.missing
        who = "; ".join(f"{c}: {why}" for c, why in list(missing.items())[:5])
        raise QuorumError(f"{name_of(self)} gives the round up: none of {len(holders)} clients did "
                          f"'{fn.__name__}' ({who})")

    def _numbers(self, opened: Payload) -> dict[str, Any]:
        """The sum's entries that are no tensors, by name."""
        return {k: v * self.unit for k, v in zip(opened["names"], opened["numbers"], strict=True)}

    def _keyed(self, ask: Ask) -> Any:
        """Whom of the ask the key is known to, once it was handed on to those who lack it."""
        live = self.__dict__["_live"]
        while live.get("handing"):  # another question of this trip hands the key on: one after another, one key
            yield []
        if new := [c for c in ask.msgs if c not in live["holders"]]:
            live["handing"] = True
            try:
                yield from self._ceremony(new, live)
            finally:
                live["handing"] = False
        return [c for c in ask.msgs if c in live["holders"]]

    def _asked(self, ask: Ask) -> Any:
        """The answers of holders. Who gives none may have been started again and lack the key: it is handed on to it
        before it is asked again, also where the round is given up here."""
        live, answered = self.__dict__["_live"], ()
        try:
            out = yield ask
            answered = out.answered
            return out
        finally:
            live["holders"] = [c for c in live["holders"] if c not in ask.msgs or c in answered]

    def _ceremony(self, new: list[str], live: dict[str, Any]) -> Any:
        """Public keys up, the boxes with the secret context down; the server keeps the part without a secret.

        One of the first holders hands the key on; those who cannot were started again and hold it no longer. A new one
        is made where nobody holds it, never beside one that is in use: sums of both would open to noise.
        """
        holders, first = live["holders"], live["holders"][:GIVERS]
        adverts = yield Ask(self.advertise, {c: {} for c in [*new, *first]}, quorum=0 if holders else None)
        lost: list[str] = []
        for maker in [c for c in first or adverts if c in adverts]:
            others = [c for c in adverts if c != maker and c in (*new, *lost)]
            told = {"to": others, "keys": [adverts[c]["key"] for c in others], "held": int(bool(holders))}
            made = yield Ask(self.make_key, {maker: told}, quorum=0)
            lost.append(maker)
            if maker not in made:
                continue
            boxes = dict(zip(others, made[maker]["boxes"], strict=True))
            got = yield Ask(self.take, {c: {"box": box, "key": adverts[maker]["key"]} for c, box in boxes.items()},
                            quorum=0)
            if 2 * len(got) >= len(others):  # else it is the maker whose boxes do not open
                live["public"] = made[maker]["public"]
                kept = [c for c in holders if c not in lost[:-1]] or [maker]
                live["holders"] = [*dict.fromkeys([*kept, *got])]
                return
        live["holders"] = holders[len(first):]
        if not live["holders"]:
            raise QuorumError(f"{name_of(self)} gives the round up: none of {len(adverts)} clients made a key "
                              "that the others could take; the next round begins with a new one")

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
            private = tenseal().context_from(bytes(reply["public"])).is_private()
        except (TypeError, ValueError, RuntimeError) as error:
            raise PayloadError(f"'public' is no CKKS context: {error}") from None
        need(not private, "'public' holds the secret key, which is the clients' alone")

    @on_client(gives="boxes: blobs, public: bytes", fits=made)
    def make_key(self, msg: Payload, client: Any) -> Payload:
        """Make the key (once, and only where no other client holds one), and seal it to each of the others."""
        seat = self._seat(client.id)
        if "context" not in seat and not msg.get("held"):
            ts, n = tenseal(), self.poly_modulus_degree
            made = ts.context(ts.SCHEME_TYPE.CKKS, n, -1, PRIMES[n], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC)
            made.global_scale = 2.0**self.scale_bits
            seat["context"] = made
        text = serialized(self._context(client.id), secret=True)
        boxes = [nonce + AESGCM(keys.agree(seat["key"], public, "he", peer, 32)).encrypt(nonce, text, peer.encode())
                 for peer, public in zip(msg["to"], msg["keys"], strict=True) for nonce in (secrets.token_bytes(12),)]
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
        context = tenseal().context_from(text)
        if not context.is_private() or context.global_scale != 2.0**self.scale_bits:
            raise PayloadError(f"client '{client.id}': the box holds no secret key of this run's CKKS")
        seat["context"] = context
        return {"ok": 1}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "lift" not in msg:
            return call(msg)
        self._context(client.id)  # before the work, which would be in vain
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
        if told[OWN + "count"] < (least := self.__dict__["_least"]):
            raise PayloadError(f"client '{who}' refuses a sum of {told[OWN + 'count']}: fewer than {least} hide too "
                               "little")
        unit = told.get(OWN + "unit", 1.0)
        room = self.most * unit / told[OWN + "count"]
        if not np.abs(flat).max(initial=0) < room:
            raise PayloadError(f"client '{who}': a reply holds {np.abs(flat).max():.6g} and CKKS with scale 2^"
                               f"{self.scale_bits} has room for {room:g} of each client; lower scale_bits")
        seat, context, slots = self._seat(who), self._context(who), self.poly_modulus_degree // 2
        seat["may_open"] = True
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
        values = self._decrypted(client.id, msg)
        values = np.round(values * 2.0**self.round_bits) / 2.0**self.round_bits
        n = len(values) - len(msg["names"])
        return {"sum": torch.from_numpy(values[:n]), "numbers": values[n:].tolist(), "names": msg["names"],
                "tensors": msg["tensors"]}

    def _decrypted(self, who: str, msg: Payload) -> np.ndarray:
        """What is in a ciphertext; a client that added nothing since it last opened one opens none."""
        seat = self._seat(who)
        if not seat.pop("may_open", False):
            raise PayloadError(f"client '{who}' opens one sum for each reply of its own, and has none in this one")
        parts = [tenseal().ckks_vector_from(self._context(who), b) for b in split(msg)]
        return np.concatenate([p.decrypt() for p in parts])

    def statement(self, state: Any) -> dict[str, Any]:
        return {"layer": "he_ckks", "hides": f"single updates from {HONEST}",
                "not_covered": "the sum itself, who answered; no differential privacy of its own", "void": []}

    def _context(self, client: str) -> Any:
        """The key, which lives as long as the client's process."""
        if "context" not in (seat := self._seat(client)):
            raise Withheld(f"client '{client}' was started again and holds the key of {name_of(self)} no longer; "
                           "it is handed on to it when it is asked the next time, and nobody has to do anything")
        return seat["context"]

    def _seat(self, client: str) -> dict[str, Any]:
        return self.__dict__["_seats"].setdefault(client, {})
