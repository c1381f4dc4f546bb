"""Keys of an Academy federation: the exchange's certificate, and a mailbox and a key for each site's agent."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.core.errors import RecipeError
from fedllm.federation.keyring import Keyring, secret

KIT = "academy.json"
"""In a site's kit: the address, the site's name, and its agent's mailbox."""
KEY = "site.key"
COORDINATOR = "coordinator"
"""Who holds the token of `server/secret`; no site has this name."""


@dataclass(frozen=True)
class AcademyFederation(Keyring):
    """A folder of keys: `federation.yaml` with the agents' mailboxes, the coordinator's own, and a kit a site."""

    engine = "academy"

    def key(self, site: str) -> bytes:
        """What the coordinator and this site alone know."""
        return read(self.folder / "server" / "sites" / site)

    def own(self) -> bytes:
        """What the coordinator and its exchange alone know."""
        return read(self.folder / "server" / "secret")

    def agents(self) -> dict[str, uuid.UUID]:
        """The mailbox of each site's agent."""
        return {site: uuid.UUID(found) for site, found in self.spec["sites"].items()}

    def who(self, header: str) -> str | None:
        """Whose token an `Authorization` header holds; None: nobody's, or of a site that is barred now."""
        path = self.folder / "federation.yaml"
        site = _by_token(self.folder, path.stat().st_mtime_ns).get(_told(header.removeprefix("Bearer ")))
        return site if site in (None, COORDINATOR) or self.barred(site) is None else None


def token(key: bytes) -> str:
    """By which the exchange knows who asks; it tells nothing of the key."""
    return hmac.new(key, b"fedllm academy token", hashlib.sha256).hexdigest()


def _told(said: str) -> bytes:
    """What a token is looked up by: how long that takes tells nothing of a token."""
    return hashlib.sha256(said.encode()).digest()


@functools.lru_cache(maxsize=8)
def _by_token(folder: Path, changed: int) -> dict[bytes, str]:
    keys = AcademyFederation(folder)
    return {_told(token(keys.own())): COORDINATOR, **{_told(token(keys.key(s))): s for s in keys.spec["sites"]}}


def new_academy_federation(folder: Path, sites: Sequence[str], host: str = "localhost", port: int = 8700
                           ) -> AcademyFederation:
    """Make a CA, the exchange's certificate, and a kit for each site."""
    folder = AcademyFederation.new(folder, host, port)
    secret(folder / "server" / "secret", secrets.token_bytes(32))
    (folder / "server" / "sites").mkdir(mode=0o700)
    return add_academy_sites(folder, sites)


def add_academy_sites(folder: Path, sites: Sequence[str]) -> AcademyFederation:
    """Kits for further sites; the next `fedllm serve` admits them."""
    keys = AcademyFederation(folder.resolve())
    for name in sites:
        if name == COORDINATOR:
            raise RecipeError(f"'{name}' cannot be a new site's name: the coordinator is called so")
        kit, spec, key = keys.new_kit(name), keys.spec, secrets.token_bytes(32)
        mailbox = str(uuid.uuid4())
        for path in (kit / KEY, keys.folder / "server" / "sites" / name):
            secret(path, key)
        (kit / KIT).write_text(json.dumps({"site": name, "address": f"{spec['host']}:{spec['port']}",
                                           "agent": mailbox}))
        spec["sites"][name] = mailbox
        keys.save(spec)
    return keys


def read(path: Path) -> bytes:
    """A file of the keys."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
