"""Folders of keys that fedllm makes itself (Flower's, Academy's): who is in, who is barred, certificates for TLS."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.core.errors import RecipeError
from fedllm.runs.audit_key import AUDIT_KEY, AUDIT_PUB, make_key

YEARS = 2


@dataclass(frozen=True)
class Keyring:
    """A folder of keys: `federation.yaml`, the coordinator's own in `server/`, and a kit for each site."""

    folder: Path
    engine: ClassVar[str] = ""

    @property
    def spec(self) -> dict[str, Any]:
        """Host, port and the sites."""
        try:
            spec = yaml.safe_load((self.folder / "federation.yaml").read_text())
        except OSError:
            raise RecipeError(f"{self.folder} holds no federation; make one with `fedllm keys new --engine "
                              f"{self.engine}`") from None
        if spec.get("engine", "flare") != self.engine:
            raise RecipeError(f"{self.folder} holds keys for {NAMES[spec.get('engine', 'flare')]}, and the recipe's "
                              f"engine is {self.engine}; make others with `fedllm keys new --engine {self.engine}`")
        return spec

    def barred(self, site: str) -> str | None:
        """Why nobody may talk to this site, as the file says now; None: one may."""
        spec = self.now()
        if site in spec.get("suspended", ()):
            return "it is suspended"
        return "it is struck off" if site in spec.get("revoked", ()) else None

    def now(self) -> dict[str, Any]:
        """What the file says now, read again when it has changed."""
        path = self.folder / "federation.yaml"
        return _read(path, path.stat().st_mtime_ns)

    def kit(self, name: str) -> Path:
        """What a site needs, to be sent to it alone."""
        path = self.folder / "kits" / name
        if not path.is_dir():
            raise RecipeError(f"{self.folder} has no kit '{name}'; it has {', '.join(self.spec['sites']) or 'none'}")
        return path

    # -- changes -------------------------------------------------------------------------------------------------------

    @classmethod
    def new(cls, folder: Path, host: str, port: int) -> Path:
        """An empty federation: folders that are their owner's alone, and the coordinator's certificate."""
        folder = folder.resolve()
        if (folder / "federation.yaml").exists():
            raise RecipeError(f"{folder} already holds a federation; add sites with `fedllm keys add`")
        for private in (folder, folder / "server"):
            private.mkdir(parents=True, exist_ok=True)
            private.chmod(0o700)
        certificates(folder / "server", host)
        make_key(folder)
        cls(folder).save({"engine": cls.engine, "host": host, "port": port, "sites": {}})
        return folder

    def new_kit(self, name: str) -> Path:
        """A kit for a further site, with what every site gets; RecipeError for a name that is none, or taken."""
        spec = self.spec
        if not name.replace("-", "").isalnum() or not name[:1].isalpha() or name in (
                *spec["sites"], *spec.get("revoked", ())):
            raise RecipeError(f"'{name}' cannot be a new site's name: letters, digits and '-', starting with a letter, "
                              "and not taken or revoked")
        if not (self.folder / AUDIT_KEY).exists():
            make_key(self.folder)
        kit = self.folder / "kits" / name
        (kit / "local").mkdir(parents=True)
        kit.chmod(0o700)
        (kit / "ca.crt").write_bytes((self.folder / "server" / "ca.crt").read_bytes())
        (kit / AUDIT_PUB).write_bytes((self.folder / AUDIT_PUB).read_bytes())
        return kit

    def suspend(self, site: str) -> None:
        """Nothing is sent to this site and nothing of it is taken, also in a run that goes on, until it is restored."""
        spec = self._with(site)
        self.save({**spec, "suspended": sorted({*spec.get("suspended", ()), site})})

    def restore(self, site: str) -> None:
        """A suspended site may take part again."""
        spec = self._with(site)
        self.save({**spec, "suspended": [s for s in spec.get("suspended", ()) if s != site]})

    def revoke(self, site: str) -> None:
        """Strike a site off, also in a run that goes on: key and kit are deleted, and its name is not given again."""
        spec = self._with(site)
        self.save({**spec, "sites": {s: key for s, key in spec["sites"].items() if s != site},
                   "revoked": [*spec.get("revoked", ()), site]})
        shutil.rmtree(self.folder / "kits" / site, ignore_errors=True)

    def _with(self, site: str) -> dict[str, Any]:
        spec = self.spec
        if site not in spec["sites"]:
            raise RecipeError(f"'{site}' is no site of {self.folder}; it has {', '.join(spec['sites']) or 'none'}")
        return spec

    def save(self, spec: dict[str, Any]) -> None:
        """Written in one move, since a coordinator may be reading."""
        path = self.folder / "federation.yaml"
        fresh = path.with_suffix(".fresh")
        fresh.write_text(yaml.safe_dump(spec, sort_keys=False))
        fresh.replace(path)


NAMES = {"flare": "NVFlare", "flower": "Flower", "academy": "Academy"}


def made_for(folder: Path) -> str:
    """The engine that a folder's keys were made for."""
    try:
        return str(yaml.safe_load((folder / "federation.yaml").read_text()).get("engine", "flare"))
    except OSError:
        return "flare"


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def certificates(folder: Path, host: str) -> None:
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
    secret(folder / "server.key", key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                                     serialization.NoEncryption()))


def _names(host: str) -> list[x509.GeneralName]:
    """The host, and what this machine calls itself: `serve` reaches its own server that way."""
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


def secret(path: Path, data: bytes) -> None:
    """A file that is its owner's alone."""
    path.touch(0o600)
    path.write_bytes(data)
