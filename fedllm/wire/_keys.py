"""Keys of one client in secure aggregation: who it is, with whom it shares what. Nothing here is ever printed.

Secrets live in the process, on the layer, and not in the client's `memory`, which is checkpointed: a client that
restarts in the middle of a round is a client that dropped out of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.core.errors import PayloadError, RecipeError


def agree(mine: X25519PrivateKey, theirs: bytes, purpose: str, sid: str, size: int = 16) -> bytes:
    """A key that both ends of the pair can make, bound to its purpose and to the session."""
    shared = mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    return derive(shared, purpose, sid, size)


def derive(secret: bytes, purpose: str, sid: str, size: int = 16) -> bytes:
    """HKDF-SHA256 of a secret for one purpose in one session."""
    return HKDF(hashes.SHA256(), size, sid.encode(), b"fedllm secagg " + purpose.encode()).derive(secret)


def said(purpose: str, *parts: object) -> bytes:
    """The bytes that are signed: a digest of unambiguous JSON."""
    text = json.dumps([f"fedllm secagg {purpose}", *[p.hex() if isinstance(p, bytes) else p for p in parts]])
    return hashlib.sha256(text.encode()).digest()


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the holder of this Ed25519 key signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass
class Session:
    """One client's secrets in one round of the protocol."""

    sid: str
    mail_key: X25519PrivateKey
    mask_key: X25519PrivateKey
    seed: bytes
    roster: dict[str, list[bytes]] = field(default_factory=dict)
    """Neighbor -> [mail key, mask key, identity]."""
    own: tuple[bytes, bytes] = (b"", b"")
    """My own shares of my mask key and of my seed."""
    got: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    least: int = 0
    """The fewest survivors whose sum I help to open."""
    alive: list[str] | None = None
    told: bool = False

    def __repr__(self) -> str:
        return "Session(...)"


@dataclass
class Seat:
    """What one client keeps in this process: its identity, whom it knows, which sessions it has seen."""

    identity: Ed25519PrivateKey
    pins: dict[str, bytes] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    session: Session | None = None

    def __repr__(self) -> str:
        return "Seat(...)"

    def at(self, sid: str) -> Session:
        """The session of this name, which must be the present one."""
        if self.session is None or self.session.sid != sid:
            raise PayloadError("secure aggregation: a message of another session (replayed, or late) is refused")
        return self.session


def make_seat(folder: str | None, client: str) -> Seat:
    """With a folder of keys the identity is `<client>.key` in it (64 hex digits); without, it is made up here."""
    if folder is None:
        return Seat(Ed25519PrivateKey.generate())
    path = Path(folder) / f"{quote(client, safe='')}.key"
    try:
        return Seat(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip())))
    except (OSError, ValueError) as error:
        raise RecipeError(f"secagg.keys: {path} holds no identity key of client '{client}' ({type(error).__name__}); "
                          "make_identity writes one") from None


def make_identity(folder: str | Path, client: str) -> bytes:
    """Write `<client>.key` and `<client>.pub` (hex); give the first to the client alone and the second to all."""
    key, stem = Ed25519PrivateKey.generate(), Path(folder) / quote(client, safe="")
    public = key.public_key().public_bytes_raw()
    stem.with_name(stem.name + ".key").touch(0o600)
    stem.with_name(stem.name + ".key").write_text(key.private_bytes_raw().hex())
    stem.with_name(stem.name + ".pub").write_text(public.hex())
    return public


def is_known(pins: dict[str, bytes], folder: str | None, client: str, public: bytes) -> bool:
    """Whether this is the client's identity: as the folder says, or else as it was when it first came."""
    return (pins.setdefault(client, public) if folder is None else public_of(folder, client)) == public


def public_of(folder: str, client: str) -> bytes | None:
    """The client's identity as the folder has it; None where it has none."""
    try:
        return bytes.fromhex((Path(folder) / f"{quote(client, safe='')}.pub").read_text().strip())
    except (OSError, ValueError):
        return None


def is_usable(public: bytes) -> bool:
    """Whether a secret can be agreed with this X25519 key; points of small order give none."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def is_advert(row: Sequence[object], client: str, sid: str) -> bool:
    """Whether a row is [mail key, mask key, identity, signature over all of it] of this client in this session."""
    if len(row) != 4 or not all(isinstance(x, bytes) for x in row):
        return False
    mail, mask, identity, signature = row
    if not (is_usable(mail) and is_usable(mask)):  # type: ignore[arg-type]
        return False
    return verify(identity, signature, said("advert", sid, client, mail, mask))  # type: ignore[arg-type]
