"""Keys of a Flower federation: one CA for the SuperLink's certificate, and a key pair for each SuperNode."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.federation.keyring import Keyring, secret

KIT = "flower.json"
"""In a site's kit: the address and the site's name."""


@dataclass(frozen=True)
class FlowerFederation(Keyring):
    """A folder of keys: `federation.yaml` with the sites' public keys, the SuperLink's own, and a kit for each site."""

    engine = "flower"


def new_flower_federation(folder: Path, sites: Sequence[str], host: str = "localhost", port: int = 9092
                          ) -> FlowerFederation:
    """Make a CA, the SuperLink's certificate, and a kit for each site."""
    folder = FlowerFederation.new(folder, host, port)
    secret(folder / "server" / "secret", secrets.token_bytes(32))
    return add_flower_sites(folder, sites)


def add_flower_sites(folder: Path, sites: Sequence[str]) -> FlowerFederation:
    """Kits for further sites; the next `fedllm serve` admits them."""
    keys = FlowerFederation(folder.resolve())
    for name in sites:
        kit, spec = keys.new_kit(name), keys.spec
        key = ec.generate_private_key(ec.SECP384R1())
        secret(kit / "node.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                                   serialization.NoEncryption()))
        (kit / KIT).write_text(json.dumps({"site": name, "address": f"{spec['host']}:{spec['port']}"}))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        spec["sites"][name] = public.decode()
        keys.save(spec)
    return keys
