"""Keys of a Flower federation: one CA for the SuperLink's certificate, and a key pair for each SuperNode."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.core.errors import RecipeError
from fedllm.runs.audit_key import AUDIT_KEY, AUDIT_PUB, make_key

YEARS = 2
KIT = "flower.json"
"""In a site's kit: the address and the site's name."""


@dataclass(frozen=True)
class FlowerFederation:
    """A folder of keys: `federation.yaml`, the SuperLink's own, and a kit for each site."""

    folder: Path

    @property
    def spec(self) -> dict[str, Any]:
        """Host, port and the sites' public keys."""
        try:
            spec = yaml.safe_load((self.folder / "federation.yaml").read_text())
        except OSError:
            raise RecipeError(f"{self.folder} holds no federation; make one with `fedllm keys new --engine flower`"
                              ) from None
        if spec.get("engine") != "flower":
            raise RecipeError(f"{self.folder} holds keys for NVFlare, and the recipe's engine is flower; make others "
                              "with `fedllm keys new --engine flower`")
        return spec

    def barred(self, site: str) -> str | None:
        """Why nobody may talk to this site, as the file says now; None: one may."""
        spec = _read(self.folder / "federation.yaml", (self.folder / "federation.yaml").stat().st_mtime_ns)
        if site in spec.get("suspended", ()):
            return "it is suspended"
        return "it is struck off" if site in spec.get("revoked", ()) else None

    def kit(self, name: str) -> Path:
        """What a site needs: its private key, the CA's certificate, the address."""
        path = self.folder / "kits" / name
        if not path.is_dir():
            raise RecipeError(f"{self.folder} has no kit '{name}'; it has {', '.join(self.spec['sites']) or 'none'}")
        return path


def is_flower(folder: Path) -> bool:
    """Whether a folder holds the keys of a Flower federation."""
    return (folder / "server" / "ca.crt").exists()


def new_flower_federation(folder: Path, sites: Sequence[str], host: str = "localhost", port: int = 9092
                          ) -> FlowerFederation:
    """Make a CA, the SuperLink's certificate, and a kit for each site."""
    folder = folder.resolve()
    if (folder / "federation.yaml").exists():
        raise RecipeError(f"{folder} already holds a federation; add sites with `fedllm keys add`")
    for private in (folder, folder / "server"):
        private.mkdir(parents=True, exist_ok=True)
        private.chmod(0o700)
    _certificates(folder / "server", host)
    _secret(folder / "server" / "secret", secrets.token_bytes(32))
    return _with(folder, {"engine": "flower", "host": host, "port": port, "sites": {}}, sites)


def add_flower_sites(folder: Path, sites: Sequence[str]) -> FlowerFederation:
    """Kits for further sites; the next `fedllm serve` admits them."""
    return _with(folder.resolve(), FlowerFederation(folder).spec, sites)


def suspend_flower_site(folder: Path, site: str) -> FlowerFederation:
    """Nothing is sent to this site and nothing of it is taken, also in a run that goes on, until it is restored."""
    spec = _spec_with(folder, site)
    return _saved(folder, {**spec, "suspended": sorted({*spec.get("suspended", ()), site})})


def restore_flower_site(folder: Path, site: str) -> FlowerFederation:
    """A suspended site may take part again."""
    spec = _spec_with(folder, site)
    return _saved(folder, {**spec, "suspended": [s for s in spec.get("suspended", ()) if s != site]})


def revoke_flower_site(folder: Path, site: str) -> FlowerFederation:
    """Strike a site off, also in a run that goes on: key and kit are deleted, and its name is not given again."""
    spec = _spec_with(folder, site)
    made = _saved(folder, {**spec, "sites": {s: key for s, key in spec["sites"].items() if s != site},
                           "revoked": [*spec.get("revoked", ()), site]})
    shutil.rmtree(made.folder / "kits" / site, ignore_errors=True)
    return made


def _spec_with(folder: Path, site: str) -> dict[str, Any]:
    spec = FlowerFederation(folder.resolve()).spec
    if site not in spec["sites"]:
        raise RecipeError(f"'{site}' is no site of {folder}; it has {', '.join(spec['sites']) or 'none'}")
    return spec


def _saved(folder: Path, spec: dict[str, Any]) -> FlowerFederation:
    """Written in one move, since a coordinator may be reading."""
    path = folder.resolve() / "federation.yaml"
    fresh = path.with_suffix(".fresh")
    fresh.write_text(yaml.safe_dump(spec, sort_keys=False))
    fresh.replace(path)
    return FlowerFederation(folder.resolve())


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _with(folder: Path, spec: dict[str, Any], sites: Sequence[str]) -> FlowerFederation:
    if not (folder / AUDIT_KEY).exists():
        make_key(folder)
    for name in sites:
        if not name.replace("-", "").isalnum() or not name[:1].isalpha() or name in (
                *spec["sites"], *spec.get("revoked", ())):
            raise RecipeError(f"'{name}' cannot be a new site's name: letters, digits and '-', starting with a letter, "
                              "and not taken or revoked")
        kit = folder / "kits" / name
        (kit / "local").mkdir(parents=True)
        kit.chmod(0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        _secret(kit / "node.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                                    serialization.NoEncryption()))
        (kit / "ca.crt").write_bytes((folder / "server" / "ca.crt").read_bytes())
        (kit / AUDIT_PUB).write_bytes((folder / AUDIT_PUB).read_bytes())
        (kit / KIT).write_text(json.dumps({"site": name, "address": f"{spec['host']}:{spec['port']}"}))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        spec["sites"][name] = public.decode()
    return _saved(folder, spec)


def _certificates(folder: Path, host: str) -> None:
    """`ca.crt`, `server.crt` and `server.key`. The CA signs once and its key is not kept."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm federation")])

    def begin(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
                .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(days=365 * YEARS)))

    ca = (begin(ca_name, ca_key.public_key())
          .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
          .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
          .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True).sign(ca_key, hashes.SHA384()))
    own = (begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), key.public_key())
           .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
           .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
           .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
           .add_extension(_usage(digital_signature=True), critical=True)
           .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
           .sign(ca_key, hashes.SHA384()))
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(own.public_bytes(serialization.Encoding.PEM))
    _secret(folder / "server.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                                     serialization.NoEncryption()))


def _names(host: str) -> list[x509.GeneralName]:
    """The host, and what this machine calls itself: `serve` reaches its SuperLink that way."""
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
    return names


def _usage(**on: bool) -> x509.KeyUsage:
    flags = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{flag: on.get(flag, False) for flag in flags})


def _secret(path: Path, data: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(data)
