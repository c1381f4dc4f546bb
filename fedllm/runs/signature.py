"""A run's record under a signature: who does not hold the coordinator's key can change nothing of it unseen.

`seal.json` holds the head of the event chain and the sha256 of every file that people read of a run, signed with
Ed25519. Whoever can write the folder but has no key can neither change these files nor put others in their place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedllm.core.errors import RunError
from fedllm.runs.audit_key import AUDIT_PUB
from fedllm.runs.folder import RunFolder
from fedllm.runs.store import read_json

SEAL = "seal.json"
ABOUT = b"fedllm run seal 1\n"
OUTSIDE = (SEAL, "serving.json", "failed.txt")
"""Files that the seal does not speak of, beside hidden ones, checkpoints and kept replies."""


def sign(path: str | Path, key: str | Path) -> dict[str, Any]:
    """Seal a finished run's folder as it stands, with the key in the file `key`; gives what was written."""
    folder = RunFolder.open(Path(path))
    if not (folder.path / "result.json").is_file():
        raise RunError(f"{folder.path} is not finished, so there is nothing to seal yet")
    secret = _private(Path(key))
    said = {"head": read_json(folder.path / "result.json").get("audit"), "files": digests(folder.path)}
    doc = {**said, "public": secret.public_key().public_bytes_raw().hex(), "signature": secret.sign(_text(said)).hex()}
    folder.write_json(SEAL, doc)
    return doc


def against_signature(path: str | Path, key: str | Path, head: str) -> list[str]:
    """One sentence for each thing that is not as the holder of this key sealed it; `head` is the chain's last hash."""
    folder, public = Path(path), _public(Path(key))
    if not (folder / SEAL).is_file():
        return [f"{SEAL} is missing: nobody has signed this run (`fedllm audit seal`)"]
    try:
        doc = read_json(folder / SEAL)
        said = {"head": doc["head"], "files": doc["files"]}
        public.verify(bytes.fromhex(doc["signature"]), _text(said))
        files, kept = {str(k): str(v) for k, v in said["files"].items()}, said["head"]["head"]
    except InvalidSignature:
        return [f"{SEAL} was not signed with this key, or was changed since"]
    except (KeyError, TypeError, ValueError, AttributeError, RunError):
        return [f"{SEAL} is no seal"]
    now = digests(folder)
    out = [f"{name} {'is missing' if name not in now else 'was changed'} since the run was sealed"
           for name, was in files.items() if now.get(name) != was]
    out += [f"{name} was added since the run was sealed" for name in now if name not in files]
    return out + ([] if kept == head else ["the chain of events does not end where the seal says"])


def digests(path: Path) -> dict[str, str]:
    """sha256 of every file of a run that the seal speaks of, by its path in the folder."""
    out = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and name.parts[0] not in ("checkpoints", "replies", *OUTSIDE):
            h = hashlib.sha256()
            with file.open("rb") as data:
                while chunk := data.read(1 << 20):
                    h.update(chunk)
            out[name.as_posix()] = h.hexdigest()
    return out


def _text(said: Mapping[str, Any]) -> bytes:
    return ABOUT + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} holds no key to sign with ({type(error).__name__}); `fedllm audit key FOLDER` makes "
                       "one") from None


def _public(path: Path) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(path.read_text().strip()))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} holds no public key ({type(error).__name__}); it is the {AUDIT_PUB} beside the key "
                       "that the run was sealed with") from None
