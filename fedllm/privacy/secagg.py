"""Secure aggregation: masks that cancel in the sum, so the server learns the sum and no single update."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedllm.core.ask import on_client
from fedllm.core.errors import PayloadError, RecipeError, Withheld
from fedllm.core.form import aligned, need
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer, name_of
from fedllm.core.sums import LEAST, SMALLEST, is_control, must_lift, need_sums, without
from fedllm.privacy import _shamir as shamir
from fedllm.privacy._ring import encode, fraction_bits, mask_, within
from fedllm.privacy._secagg_server import OWN, Server
from fedllm.privacy._shared import need_company
from fedllm.wire import _keys as keys

SURE = 0.05
"""Fewer lost rounds than this share are not worth a word."""


@dataclass(frozen=True)
class SecAgg(Knobs, Layer):
    """Bonawitz et al., CCS 2017: double masking, Shamir shares, signed keys, one consistent set of survivors.

    Works on any Sum: replies are lifted on the client, turned to fixed point (each entry off by at most quantum / 2
    per client) and masked in the ring of 2^32. Clients may fall silent in any phase; below the threshold the round is
    given up and nothing is opened. The server sees the sum, who answered, and sizes. It gives no differential privacy
    (put `dp_fedavg` above it), and a sum of one honest client and others that collude hides nothing.
    """

    algebra = Algebra("secagg", needs="sum", reveals="sum", ring=True,
                      instead="dp_fedavg, which clips replies and hides none")
    session = (OWN + "sid",)

    clip: float = knob(1024.0, "largest |entry| of a lifted reply (a change times the client's rows); more is refused",
                       gt=0)
    quantum: float | None = knob(None, "declared fixed-point step, rounded down to a power of two; None: the finest "
                                       "that cannot overflow", gt=0)
    threshold: float = knob(2 / 3, "a secret opens for more than this share of its holders", ge=0.5, lt=1)
    keys: str | None = knob(None, "folder of identity keys (<client>.key, <client>.pub); None: first come, then pinned")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_seats", {})  # secrets: no field, so in no repr, no recipe and no checkpoint
        object.__setattr__(self, "_tried", None)  # of a plan's trial: the largest entry so far
        object.__setattr__(self, "_pins", {})  # of this process too: one that starts again meets its clients anew

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)

    def bind(self, facts: Facts) -> SecAgg:
        self.fraction(min(facts.cohort or len(facts.rows), len(facts.rows)))
        return self

    def unlimited(self) -> SecAgg:
        """A plan's trial: what is beyond the clip is noted, and no client is lost by it."""
        free = replace(self)
        object.__setattr__(free, "_tried", [0.0])
        return free

    def doubts(self, asked: int, odds: float) -> list[str]:
        least = self.needed(asked)
        lost = sum(math.comb(asked, k) * odds**k * (1 - odds) ** (asked - k) for k in range(least))
        if lost < SURE:
            return []
        return [f"of {asked} clients asked {asked * odds:.3g} answer on average (availability, dropout), and a sum "
                f"opens where {least} do: {100 * lost:.0f} % of the rounds would be lost; ask more "
                f"(clients.per_round), or lower threshold = {self.threshold:.3g}"]

    def warns(self, steps: float, tried: int) -> list[str]:
        most = (self.__dict__["_tried"] or [0.0])[0]
        foreseen = most * max(1.0, steps / tried)
        if foreseen <= self.clip:
            return []
        return [f"an entry of what a client adds to the sum came to {most:.3g} in {tried} local steps, so to about "
                f"{foreseen:.3g} in the {steps:.0f} of a round, and clip = {self.clip:g} is the most that the ring has "
                f"room for: rounds would be lost; set clip to {2 ** math.ceil(math.log2(2 * foreseen)):g}, or lower "
                "local.lr"]

    def fraction(self, count: int) -> int:
        """f of the quantum 2^-f for so many clients; refuses too few, and what may overflow."""
        need_company(self, count)
        return fraction_bits(self.clip, count, self.quantum, name_of(self))

    def needed(self, holders: int) -> int:
        """How many of so many holders it takes to open a secret."""
        t = math.floor(self.threshold * holders + 1e-9) + 1
        if t > holders:
            raise RecipeError(f"{name_of(self)}.threshold = {self.threshold} of {holders} is above the cohort")
        return t

    def neighbors(self, clients: Sequence[str], seed: bytes) -> dict[str, list[str]]:
        """Who shares masks with whom: here all with all."""
        return {c: [d for d in clients if d != c] for c in clients}

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift, f = must_lift(ask, self), self.fraction(len(ask.msgs))
        return (yield from Server(self, ask, state, lift, f).run())

    @on_client(gives="advert: blobs")
    def advertise(self, msg: Any, client: Any) -> dict[str, Any]:
        """Phase 0: fresh keys for this session, signed."""
        seat = self._seat(client.id)
        if msg["sid"] in seat.seen:
            raise PayloadError(f"client '{client.id}' was asked for the keys of a session that it has seen (replayed)")
        seat.seen.add(msg["sid"])
        s = seat.session = keys.Session(msg["sid"], X25519PrivateKey.generate(), X25519PrivateKey.generate(),
                                        secrets.token_bytes(32))
        mail, mask = (k.public_key().public_bytes_raw() for k in (s.mail_key, s.mask_key))
        signature = seat.identity.sign(keys.said("advert", s.sid, client.id, mail, mask))
        return {"advert": [mail, mask, seat.identity.public_key().public_bytes_raw(), signature]}

    def shared(self, msg: Any, reply: Any) -> None:
        """A sealed box for each neighbor."""
        need(list(reply["to"]) == list(msg["peers"]), "'to' does not name the neighbors that it was told")
        aligned(reply, ("mail",), len(msg["peers"]))

    @on_client(gives="to: names, mail: blobs, commit: bytes", fits=shared)
    def share(self, msg: Any, client: Any) -> dict[str, Any]:
        """Phase 1: check the neighbors' keys, and send each its sealed shares of my two secrets."""
        seat = self._seat(client.id)
        s = seat.at(msg["sid"])
        if s.roster:
            raise PayloadError(f"client '{client.id}' was asked twice for shares in one session")
        roster = {peer: row for peer, row in zip(msg["peers"], msg["adverts"], strict=True)}
        for peer, row in roster.items():
            if not keys.is_advert(row, peer, s.sid) or not keys.is_known(seat.pins, self.keys, peer, row[2]):
                raise PayloadError(f"client '{client.id}' refuses the round: the key of '{peer}' does not verify")
        s.roster = {peer: list(row) for peer, row in roster.items()}
        holders = sorted([*roster, client.id])
        if len(holders) < SMALLEST:
            raise PayloadError(f"client '{client.id}' refuses the round: it would hide among {len(holders)} clients, "
                               f"and fewer than {SMALLEST} hide nothing")
        t = self.needed(len(holders))
        secret = s.mask_key.private_bytes_raw()
        split = dict(zip(holders, zip(shamir.split(secret, t, len(holders)), shamir.split(s.seed, t, len(holders)),
                                      strict=True), strict=True))
        s.own = split.pop(client.id)
        mail = {peer: self._seal(s, client.id, peer, b"".join(both)) for peer, both in split.items()}
        return {"to": list(mail), "mail": list(mail.values()), "commit": hashlib.sha256(s.seed).digest()}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        """Phase 2: lift, turn to fixed point, mask."""
        if OWN + "sid" not in msg:
            return call(msg)
        s = self._seat(client.id).at(msg[OWN + "sid"])
        for peer, box in zip(msg[OWN + "from"], msg[OWN + "mail"], strict=True):
            s.got[peer] = self._open(s, client.id, peer, box)
        if len(s.got) + 1 < self.needed(len(s.roster) + 1):
            raise Withheld(f"only {len(s.got)} of its {len(s.roster)} neighbors shared, too few to hide among")
        s.least = int(msg.get(LEAST, 0))
        lifted = self._lifted(fn, msg, client, call)
        if self.__dict__["_tried"] is not None:
            lifted = within(lifted, self.clip, self.__dict__["_tried"])
        ring, layout = encode(lifted, self.fraction(msg[OWN + "count"]), self.clip, f"client '{client.id}'")
        # y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)  mod 2^32
        pairs = [(keys.agree(s.mask_key, s.roster[v][1], "pair", s.sid), 1 if client.id < v else -1) for v in s.got]
        return {"ring": mask_(ring, [(keys.derive(s.seed, "self", s.sid), 1), *pairs]), "layout": layout}

    def _lifted(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        """What is masked: the reply, as it enters the sum."""
        reply = call(without(msg, OWN))
        return fn.__dict__["reduce"].lift(reply) if msg[OWN + "lift"] else reply

    @on_client(gives="signature?: bytes, refused?: name")
    def consent(self, msg: Any, client: Any) -> dict[str, Any]:
        """Phase 3: sign the one set of survivors for which I am going to open shares."""
        seat = self._seat(client.id)
        s, alive = seat.at(msg["sid"]), sorted(msg["alive"])
        mine = [v for v in s.got if v in alive]
        if s.alive not in (None, alive):
            raise PayloadError(f"client '{client.id}' was told two sets of survivors in one session")
        if client.id not in alive or len(mine) + 1 < self.needed(len(s.roster) + 1):
            raise Withheld(f"{len(mine) + 1} of {len(s.roster) + 1} survive around it, below the threshold")
        if len(set(alive)) < s.least:
            raise Withheld(f"{len(set(alive))} survive, and the noise of {s.least} at least must be in the sum")
        s.alive = alive
        return {"signature": seat.identity.sign(keys.said("alive", s.sid, alive))}

    def told(self, msg: Any, reply: Any) -> None:
        """A share of each secret, once."""
        aligned(reply, ("of", "shares"))
        need(len(set(reply["of"])) == len(reply["of"]), "'of' names one client twice")

    @on_client(gives="of: names, shares: blobs", fits=told)
    def unmask(self, msg: Any, client: Any) -> dict[str, Any]:
        """Phase 4: for each neighbor one share, of its seed if it survived and of its mask key if it dropped out."""
        s = self._seat(client.id).at(msg["sid"])
        if s.alive is None or s.told:
            raise PayloadError(f"client '{client.id}' was asked to open shares twice, or without a set of survivors")
        text = keys.said("alive", s.sid, s.alive)
        signed = [v for v, sign in zip(msg["signers"], msg["signatures"], strict=True)
                  if v in s.roster and v in s.alive and keys.verify(s.roster[v][2], sign, text)]
        if len(set(signed)) + 1 < self.needed(len(s.roster) + 1):
            raise PayloadError(f"client '{client.id}' refuses to open shares: only {len(set(signed)) + 1} signed its "
                               "set of survivors")
        s.told = True
        shares = {v: both[v in s.alive] for v, both in s.got.items() if both[0]} | {client.id: s.own[1]}
        self._seat(client.id).session = None  # the session's secrets end here
        return {"of": list(shares), "shares": list(shares.values())}

    def statement(self, state: Any) -> dict[str, Any]:
        return {"layer": name_of(self), "hides": "single updates from the server",
                "threshold": self.threshold, "identities": self.keys or "pinned when first seen",
                "sessions": state.get("sessions", 0),
                "not_covered": "the sum itself, who answered, declared sizes; no differential privacy of its own",
                "wrong_shares": list(state.get("suspects", ())), "void": []}

    def _seat(self, client: str) -> keys.Seat:
        seats: dict[str, keys.Seat] = self.__dict__["_seats"]
        if client not in seats:
            seats[client] = keys.make_seat(self.keys, client)
        return seats[client]

    def _seal(self, s: keys.Session, me: str, peer: str, text: bytes) -> bytes:
        nonce, key = secrets.token_bytes(12), keys.agree(s.mail_key, s.roster[peer][0], "mail", s.sid, 32)
        return nonce + AESGCM(key).encrypt(nonce, text, keys.said("mail", s.sid, me, peer))

    def _open(self, s: keys.Session, me: str, peer: str, box: bytes) -> tuple[bytes, bytes]:
        """A box that does not open holds no shares; its sender still hides behind the pair mask."""
        if peer not in s.roster:
            raise PayloadError(f"client '{me}' got shares of '{peer}', which is no neighbor")
        key = keys.agree(s.mail_key, s.roster[peer][0], "mail", s.sid, 32)
        try:
            text = AESGCM(key).decrypt(box[:12], box[12:], keys.said("mail", s.sid, peer, me))
        except (InvalidTag, ValueError):
            return b"", b""
        return text[: shamir.SIZE], text[shamir.SIZE :]


