"""The server's half of secure aggregation: five questions, and the masks of the sum taken off at the end."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.errors import QuorumError
from fedllm.core.form import Form
from fedllm.core.layer import name_of
from fedllm.core.sums import LEAST
from fedllm.privacy import _shamir as shamir
from fedllm.privacy._ring import RingSum, decode, mask_
from fedllm.wire import _keys as keys
from fedllm.wire._blame import blame, staying_out

log = logging.getLogger(__name__)
OWN = "_secagg/"
MASKED = Form.of("ring?: whole, layout?: code, refused?: code")
"""Of a masked reply, or why there is none."""


ANOTHER = ("its identity key is another than the one that it first came with, as of a client that was started again: "
           "stop the run and `fedllm resume` it, and give clients a folder of identity keys (keys), which outlive them")
"""Whoever hides behind a new key may be anyone: nobody takes it for the old one by itself."""


class Halves(Protocol):
    """The client's half of a session, and what the layer says of it."""

    keys: str | None
    advertise: Any
    share: Any
    consent: Any
    unmask: Any

    def needed(self, n: int) -> int: ...
    def neighbors(self, clients: Sequence[str], seed: bytes) -> Mapping[str, Sequence[str]]: ...


class Server:
    """One session: a question of the method, asked so that only the sum of its answers can be read."""

    def __init__(self, layer: Halves, ask: Ask, state: Any, lift: bool, f: int) -> None:
        self.layer, self.ask, self.state, self.lift, self.f = layer, ask, state, lift, f
        self.sid = secrets.token_hex(16)
        self.lost: dict[str, str] = {}
        self.threshold = max(layer.needed(len(ask.msgs)), *(int(m.get(LEAST, 0)) for m in ask.msgs.values()))
        state["sessions"] = state.get("sessions", 0) + 1
        self.lost |= staying_out(state, ask.msgs, self.threshold, "a sum")

    def run(self) -> Program:
        """All phases; raises QuorumError below the threshold, before anything is opened."""
        self.adverts = yield from self._adverts()
        seed = hashlib.sha256(repr(sorted(self.adverts.items())).encode()).digest()
        self.near = self.layer.neighbors(sorted(self.adverts), seed)
        mail = yield from self._mail()
        got = yield from self._masked(mail)
        alive = sorted(got.answered)
        self._connected(alive)
        signatures = yield from self._consents(alive)
        shares = yield from self._shares(alive, signatures)
        ring = got.value["ring"]
        self._unmask(ring, alive, shares)
        total = decode(ring, got.value["layout"], self.f, len(alive))
        missing = {c: self.lost.get(c, "fell silent") for c in self.ask.msgs if c not in alive}
        return Replies({}, self.ask.reducer.done(total), tuple(c for c in self.ask.msgs if c in alive), missing)

    def _control(self, fn: Any, msgs: Mapping[str, Mapping[str, Any]]) -> Ask:
        return Ask(fn, {c: {"sid": self.sid, **m} for c, m in msgs.items()}, quorum=self.threshold,
                   deadline=self.ask.deadline)

    def _enough(self, left: Any, phase: str) -> None:
        if len(left) < self.threshold:
            why = "; ".join(f"{c}: {w}" for c, w in list(self.lost.items())[:5])
            raise QuorumError(f"{name_of(self.layer)} gives up {self.ask.phase} in its phase '{phase}': "
                              f"{len(left)} of {len(self.ask.msgs)} clients are left and {self.threshold} are needed; "
                              f"nothing was opened ({why})")

    def _adverts(self) -> Iterator[Any]:
        out = yield self._control(self.layer.advertise, {c: {} for c in self.ask.msgs if c not in self.lost})
        self.lost |= out.missing
        pins, good = self.layer.__dict__["_pins"], {}
        for c, reply in out.items():
            row = reply.get("advert", ())
            if not keys.is_advert(row, c, self.sid):
                self.lost[c] = "its key does not verify"
            elif not keys.is_known(pins, self.layer.keys, c, row[2]):
                self.lost[c] = ANOTHER if self.layer.keys is None else \
                    f"its identity key is not the one in keys = {self.layer.keys}"
            else:
                good[c] = list(row)
                continue
            log.warning("client '%s' is left out of this round: %s", c, self.lost[c])
        self._enough(good, "advertise")
        return good

    def _mail(self) -> Iterator[Any]:
        """To whom each client sealed what; a client that shared is in the round and must be unmasked."""
        out = yield self._control(self.layer.share, {
            c: {"peers": near, "adverts": [self.adverts[v] for v in near]} for c, near in self.near.items()})
        self.lost |= out.missing
        mail = {c: dict(zip(r["to"], r["mail"], strict=True)) for c, r in out.items() if r["to"] == self.near[c]}
        self.commits = {c: out[c]["commit"] for c in mail}
        self._enough(mail, "share")
        return mail

    def _masked(self, mail: Mapping[str, Mapping[str, bytes]]) -> Iterator[Any]:
        self.shared = set(mail)
        msgs = {}
        for c in mail:
            peers = [v for v in self.near[c] if v in mail]
            msgs[c] = {**self.ask.msgs[c], OWN + "sid": self.sid, OWN + "count": len(self.ask.msgs),
                       OWN + "lift": self.lift, OWN + "from": peers, OWN + "mail": [mail[v][c] for v in peers]}
        quorum = None if self.ask.quorum is None else self.ask.needed()
        out = yield replace(self.ask, msgs=msgs, reduce=RingSum(), quorum=quorum, form=MASKED,
                            hidden={type(self.layer).__name__: frozenset({"ring"})})
        self.lost |= out.missing
        self._enough(out.answered, "masked input")
        return out

    def _connected(self, alive: list[str]) -> None:
        """In a sparse graph survivors may fall into parts; each part's sum would then stand open."""
        reached, edge = {alive[0]}, [alive[0]]
        while edge:
            c = edge.pop()
            new = [v for v in self.near[c] if v in alive and v not in reached]
            reached.update(new)
            edge += new
        if len(reached) < len(alive):
            raise QuorumError(f"{name_of(self.layer)} gives up {self.ask.phase}: the survivors fall into parts "
                              "that no longer hide behind each other; nothing was opened")

    def _consents(self, alive: list[str]) -> Iterator[Any]:
        out = yield self._control(self.layer.consent, {c: {"alive": alive} for c in alive})
        text, good = keys.said("alive", self.sid, alive), {}
        self.lost |= out.missing
        for c, reply in out.items():
            if keys.verify(self.adverts[c][2], reply.get("signature", b""), text):
                good[c] = reply["signature"]
            else:
                self.lost[c] = "its signature does not verify"
        self._enough(good, "consistency")
        return good

    def _shares(self, alive: list[str], signatures: Mapping[str, bytes]) -> Iterator[Any]:
        """Owner of a secret -> holder -> share."""
        msgs = {c: [v for v in signatures if v in self.near[c]] for c in signatures}
        out = yield self._control(self.layer.unmask, {
            c: {"signers": v, "signatures": [signatures[x] for x in v]} for c, v in msgs.items()})
        shares: dict[str, dict[str, bytes]] = {c: {} for c in self.shared}
        for holder, reply in out.items():
            for owner, share in zip(reply["of"], reply["shares"], strict=True):
                if owner in shares:
                    shares[owner][holder] = share
        return shares

    def _unmask(self, ring: Tensor, alive: list[str], shares: Mapping[str, Mapping[str, bytes]]) -> None:
        """Take off the survivors' own masks, and the pair masks that they shared with who dropped out."""
        off: list[tuple[bytes, int]] = []
        for c in alive:
            seed = self._open(c, shares[c], lambda s, c=c: hashlib.sha256(s).digest() == self.commits[c])
            off.append((keys.derive(seed, "self", self.sid), -1))
        for c in sorted(self.shared - set(alive)):
            near = [v for v in self.near[c] if v in alive]
            if near:
                secret = self._open(c, shares[c], lambda s, c=c: _public(s) == self.adverts[c][1])
                key = X25519PrivateKey.from_private_bytes(secret)
                # v added +PRG(s_vc) when v < c, and -PRG otherwise
                off += [(keys.agree(key, self.adverts[v][1], "pair", self.sid), -1 if v < c else 1) for v in near]
        mask_(ring, off)

    def _open(self, owner: str, shares: Mapping[str, bytes], good: Any) -> bytes:
        """The owner's secret from its holders' shares; wrong shares are passed over, and their holders named."""
        holders = sorted([*self.near[owner], owner])
        t = self.layer.needed(len(holders))
        by_x = {holders.index(h) + 1: s for h, s in shares.items() if h in holders and len(s) == shamir.SIZE}
        found = shamir.recover(by_x, t, good) if len(by_x) >= t else None
        if found is None:
            if len(by_x) > t:  # one wrong share would have been passed over: it dealt what is not what it committed to
                blame(self.state, owner)
            raise QuorumError(f"{name_of(self.layer)} gives up {self.ask.phase} in its phase 'unmask': "
                              f"{len(by_x)} shares of a secret of '{owner}' came back and {t} right ones are needed; "
                              "the sum stays masked")
        secret, wrong = found
        for x in wrong:
            name = holders[x - 1]
            if name not in self.state.setdefault("suspects", []):
                self.state["suspects"].append(name)
                log.warning("client '%s' sent a wrong share; the round goes on without it", name)
        return secret


def _public(secret: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    except ValueError:
        return b""


