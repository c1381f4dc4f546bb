"""CKKS on TenSEAL: contexts, ciphertexts as payloads, and their sum under a context without a secret key."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.payload import Payload
from fedllm.core.reduce import Sum


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
        raise CompositionError("layer 'he_ckks' and this installation do not fit together: it needs TenSEAL (pip "
                               "install 'fedlm[he]'); secagg hides updates without it") from None
    return ts
