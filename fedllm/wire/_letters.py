"""Letters between clients that pass through the server and that it cannot read: X25519, HKDF, AES-GCM.

Each round has keys of its own, which wait in the client's memory until its letters are read. Without identities the
relay is trusted to hand keys on unchanged (it reads nothing, but could put itself in the middle); with a folder of
identity keys (`make_identity`) it is not.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.layer import name_of
from fedllm.core.payload import Payload, non_finite
from fedllm.wire import _keys as keys
from fedllm.wire import codec

KEY = "letters/key"
"""Where the round's private key waits in the client's memory."""


def closed_to(method: str, layers: Sequence[Any]) -> None:
    """CompositionError for a layer that would have to read what is sealed."""
    for layer in layers:
        if layer.algebra.kind not in ("plain", "dp", "line"):
            raise CompositionError(f"{method} and layer '{name_of(layer)}' do not fit together: no layer can "
                                   "read sealed letters; dp_sgd works, which acts inside training")


def greet(client: Any, sid: str, folder: str | None) -> list[bytes]:
    """A fresh key for this session: [public key, signature (empty without identities)]."""
    key = X25519PrivateKey.generate()
    client.memory[KEY] = key.private_bytes_raw()
    public = key.public_key().public_bytes_raw()
    if folder is None:
        return [public, b""]
    return [public, keys.make_seat(folder, client.id).identity.sign(keys.said("letters", sid, client.id, public))]


def check_key(row: Sequence[bytes]) -> None:
    """PayloadError unless a row is a usable public key and a signature, as `greet` gives it."""
    if len(row) != 2 or not keys.is_usable(row[0]):
        raise PayloadError("'key' is no public key that anybody could seal to, with a signature")


def seal(client: Any, sid: str, to: Mapping[str, Sequence[bytes]], letter: Payload,
         folder: str | None) -> tuple[Tensor, list[bytes]]:
    """The letter, sealed once (uint8 [bytes]), and for each reader its key in an envelope."""
    content = secrets.token_bytes(32)
    body = _lock(content, codec.encode(letter), keys.said("letter", sid, client.id))
    envelopes = [_lock(_pair(client, sid, peer, advert, folder), content, keys.said("envelope", sid, client.id, peer))
                 for peer, advert in to.items()]
    return torch.frombuffer(bytearray(body), dtype=torch.uint8), envelopes


def unseal(client: Any, sid: str, sender: str, advert: Sequence[bytes], body: Tensor, envelope: bytes,
           folder: str | None, like: Payload) -> dict[str, Any]:
    """The letter; PayloadError where its seal is broken, where it is not this sender's or of another session, or where
    it does not hold tensors of the names and shapes of `like`."""
    try:
        content = _unlock(_pair(client, sid, sender, advert, folder), envelope,
                          keys.said("envelope", sid, sender, client.id))
        letter = codec.decode(_unlock(content, body.numpy().tobytes(), keys.said("letter", sid, sender)))
    except (InvalidTag, ValueError, AttributeError) as error:
        raise PayloadError(f"client '{client.id}' cannot open the letter of '{sender}': it was changed on its way, or "
                           f"is of another round ({type(error).__name__})") from None
    bad = non_finite(letter)
    if bad or {k: getattr(v, "shape", None) for k, v in letter.items()} != {k: v.shape for k, v in like.items()}:
        what = "names or shapes that are not those of one's own model" if not bad else f"a NaN or infinity in '{bad}'"
        raise PayloadError(f"client '{client.id}' cannot use the letter of '{sender}': it holds {what}")
    return letter


def forget(client: Any) -> None:
    """The round's key ends here."""
    client.memory.pop(KEY, None)


def _pair(client: Any, sid: str, peer: str, advert: Sequence[bytes], folder: str | None) -> bytes:
    public, signature = advert
    if folder is not None and not _signed(sid, peer, public, signature, folder):
        raise PayloadError(f"client '{client.id}' refuses the key of '{peer}': its signature does not verify")
    if KEY not in client.memory:
        raise PayloadError(f"client '{client.id}' has no key for this round's letters: it missed the round's start")
    return keys.agree(X25519PrivateKey.from_private_bytes(client.memory[KEY]), public, "letters", sid, 32)


def _signed(sid: str, peer: str, public: bytes, signature: bytes, folder: str) -> bool:
    identity = keys.public_of(folder, peer)
    return identity is not None and keys.verify(identity, signature, keys.said("letters", sid, peer, public))


def _lock(key: bytes, text: bytes | bytearray, about: bytes) -> bytes:
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def _unlock(key: bytes, box: bytes, about: bytes) -> bytes:
    return AESGCM(key).decrypt(box[:12], box[12:], about)
