"""The key that a coordinator seals its runs with. Imports no model code: who makes keys needs none."""

from __future__ import annotations

import os
from pathlib import Path

from fedllm.core.errors import RunError

AUDIT_KEY, AUDIT_PUB = "audit.key", "audit.pub"


def make_key(folder: Path) -> Path:
    """Write `audit.key` (keep it) and `audit.pub` (give it to everybody who verifies), in hex; the key's path."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, path = Ed25519PrivateKey.generate(), folder / AUDIT_KEY
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(key.private_bytes_raw().hex())
    except FileExistsError:
        raise RunError(f"{path} is there already, and a key is never overwritten") from None
    (folder / AUDIT_PUB).write_text(key.public_key().public_bytes_raw().hex())
    return path
