"""What crosses Academy: an envelope and a body, sealed under the site's own key, as text. Nothing is pickled.

The exchange sees who writes to whom, when and how much. A message is bound to its site, its way and its number, so that
none counts as another, and a reply is one to the very question that was asked.
"""

from __future__ import annotations

import base64
import binascii
import importlib.metadata
import json
import secrets
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedllm.core.errors import FedLLMError, PayloadError

if TYPE_CHECKING:  # what `join` imports loads no model code
    from fedllm.engines.far.line import Head

SIZE = 256 << 10
"""Bytes of a piece of a long body. As text it is 4/3 of that; the exchange takes no message above 512 KiB."""
NONCE, LENGTH = 12, 4
RANGE = ("1.0", "1.1")


def seal(key: bytes, about: str, head: Head, body: bytes | bytearray | memoryview = b"") -> str:
    """An envelope and a body as text that `key` alone opens, and only as what it is `about`."""
    told, nonce = json.dumps(dict(head)).encode(), secrets.token_bytes(NONCE)
    plain = len(told).to_bytes(LENGTH, "big") + told + bytes(body)
    return base64.b64encode(nonce + AESGCM(key).encrypt(nonce, plain, about.encode())).decode("ascii")


def unseal(key: bytes, about: str, text: Any) -> tuple[dict[str, Any], memoryview]:
    """Envelope and body; PayloadError for what is not sealed under this key, or about something else."""
    try:
        data = base64.b64decode(text, validate=True)
        plain = memoryview(AESGCM(key).decrypt(data[:NONCE], data[NONCE:], about.encode()))
        long = int.from_bytes(plain[:LENGTH], "big")
        head = json.loads(bytes(plain[LENGTH : LENGTH + long]))
    except (InvalidTag, binascii.Error, ValueError, TypeError) as error:
        raise PayloadError(f"a message that is none of ours ({type(error).__name__})") from None
    if not isinstance(head, dict):
        raise PayloadError("a message whose envelope is no mapping")
    return head, plain[LENGTH + long :]


def down(site: str, number: str) -> str:
    """What a question is about."""
    return f"down {site} {number}"


def up(site: str, number: str) -> str:
    """What its answer is about."""
    return f"up {site} {number}"


def trusting(ca: Path) -> ssl.SSLContext:
    """TLS to an exchange whose certificate this file's CA has signed, and to no other."""
    return ssl.create_default_context(cafile=str(ca))


def check_academy() -> None:
    """Refuse an Academy that is missing or was not tested."""
    try:
        have = importlib.metadata.version("academy-py")
    except importlib.metadata.PackageNotFoundError:
        raise FedLLMError("engine.kind = 'academy' needs Academy; pip install 'fedlm[academy]'") from None
    least, below = ([int(x) for x in v.split(".")] for v in RANGE)
    if not least <= [int(x) for x in have.split(".")[:2]] < below:
        raise FedLLMError(f"academy-py {have} is installed; allowed is >={RANGE[0]},<{RANGE[1]}, which this engine "
                          "knows")
