"""Keys of a federation: NVFlare's provisioning (one CA, mutual TLS), with policies that admit installed code only."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.federation.keyring import NAMES
from fedllm.runs.audit_key import AUDIT_KEY, AUDIT_PUB, make_key

log = logging.getLogger(__name__)
ADMIN = "admin@fedllm.org"
NODES = "fedllm.federation.nvflare.nodes"
REVIVER = "fedllm.federation.nvflare.reviver.Reviver"
SERVER_CLASSES = [f"{NODES}.Conductor", f"{NODES}.CoordinatorNode", REVIVER]
SITE_CLASSES = [f"{NODES}.Resident", f"{NODES}.SiteNode"]
PERMISSIONS = {
    "format_version": "1.0",
    "permissions": {"project_admin": {
        "submit_job": "any", "clone_job": "none", "manage_job": "any", "download_job": "none", "view": "any",
        "operate": "any", "shell_commands": "none", "byoc": "none", "server-predeployed-flwr": "none"}}}
"""Nobody may bring code (`byoc`) or run shell commands at a site, the coordinator's own administrator included."""


@dataclass(frozen=True)
class Federation:
    """A folder of keys: `federation.yaml` and a kit for the server, the administrator and each site."""

    folder: Path

    @property
    def spec(self) -> dict[str, Any]:
        """Host, ports and sites."""
        try:
            spec = yaml.safe_load((self.folder / "federation.yaml").read_text())
        except OSError:
            raise RecipeError(f"{self.folder} holds no federation; make one with `fedllm keys new`") from None
        if (other := spec.get("engine", "flare")) != "flare":
            raise RecipeError(f"{self.folder} holds keys for {NAMES[other]}, and the recipe's engine is not; say "
                              f"engine.kind={other}, or make others with `fedllm keys new`")
        return spec

    def kit(self, name: str) -> Path:
        """The startup kit of `server`, `admin` or a site."""
        path, _ = self.folder / "kits" / name, self.spec
        if not path.is_dir():
            have = sorted(p.name for p in (self.folder / "kits").glob("*"))
            raise RecipeError(f"{self.folder} has no kit '{name}'; it has {', '.join(have) or 'none'}")
        return path


def new_federation(folder: Path, sites: Sequence[str], host: str = "localhost", port: int = 8002) -> Federation:
    """Make a CA and a kit for the server, the administrator and each site."""
    folder = folder.resolve()
    if (folder / "federation.yaml").exists():
        raise RecipeError(f"{folder} already holds a federation; add sites with `fedllm keys add`")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return _write(folder, {"host": host, "port": port, "sites": []}, list(sites))


def add_sites(folder: Path, sites: Sequence[str]) -> Federation:
    """Kits for further sites, signed by the same CA; the running server admits them without a restart."""
    return _write(folder.resolve(), Federation(folder).spec, list(sites))


def revoke_site(folder: Path, site: str) -> Federation:
    """Strike a site off: its kit is deleted, and every coordinator that starts from here on refuses it."""
    made = Federation(folder.resolve())
    spec = made.spec
    if site not in spec["sites"]:
        raise RecipeError(f"'{site}' is no site of {folder}; it has {', '.join(spec['sites']) or 'none'}")
    spec["sites"].remove(site)
    spec["revoked"] = [*spec.get("revoked", ()), site]
    (made.folder / "federation.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    shutil.rmtree(made.folder / "kits" / site, ignore_errors=True)
    return made


def _write(folder: Path, spec: dict[str, Any], sites: list[str]) -> Federation:
    for name in sites:
        if not name.replace("-", "").isalnum() or not name[:1].isalpha() or name in (
                "server", "admin", *spec["sites"], *spec.get("revoked", ())):
            raise RecipeError(f"'{name}' cannot be a new site's name: letters, digits and '-', starting with a letter, "
                              "not server or admin, and not taken or revoked")
    spec = {**spec, "sites": [*spec["sites"], *sites]}
    made = _provision(folder / "ca", spec)
    kits = folder / "kits"
    kits.mkdir(exist_ok=True)
    fresh = {"server": spec["host"], "admin": ADMIN} if not (kits / "server").exists() else {}
    for name, source in {**fresh, **{s: s for s in sites}}.items():
        shutil.copytree(made / source, kits / name)
        (kits / name).chmod(0o700)
    if not (folder / AUDIT_KEY).exists():
        make_key(folder)
    for name in [*fresh, *sites]:
        shutil.copy(folder / AUDIT_PUB, kits / name / AUDIT_PUB)
    shutil.rmtree(made)  # no second copy of the private keys
    if fresh:
        _server_policy(kits / "server")
    for site in sites:
        site_policy(kits / site)
    (folder / "federation.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return Federation(folder)


def _provision(root: Path, spec: dict[str, Any]) -> Path:
    """Run NVFlare's provisioner; its state in `root` keeps the CA and every key made before."""
    try:
        from nvflare.lighter.prov_utils import prepare_builders
        from nvflare.lighter.provision import prepare_project
        from nvflare.lighter.provisioner import Provisioner
    except ImportError as error:
        raise FedLLMError(f"a real federation needs NVFlare ({error}); pip install 'fedlm[federation]'") from None
    impl = "nvflare.lighter.impl"
    people: list[dict[str, Any]] = [
        {"name": spec["host"], "type": "server", "org": "coordinator", "fed_learn_port": spec["port"],
         "admin_port": spec["port"]},
        {"name": ADMIN, "type": "admin", "org": "coordinator", "role": "project_admin"},
        *({"name": s, "type": "client", "org": s.replace("-", "_")} for s in spec["sites"])]
    project = {"api_version": 3, "name": "fedllm", "description": "fedllm", "participants": people, "builders": [
        {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
        {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "tcp"}},
        {"path": f"{impl}.cert.CertBuilder"}, {"path": f"{impl}.signature.SignatureBuilder"}]}
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)
    context = Provisioner(str(root), prepare_builders(project)).provision(prepare_project(project), logger=log)
    made = Path(context.get_result_location())
    if not made.is_dir():
        raise FedLLMError(f"NVFlare's provisioning failed; its state is in {root}")
    return made


def _server_policy(kit: Path) -> None:
    """Our classes only, stores inside of the kit, jobs scheduled at once."""
    local = kit / "local"
    raw = json.loads((local / "resources.json.default").read_text())
    raw["class_allow_list"] = SERVER_CLASSES
    raw["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    raw["servers"][0].update(heart_beat_timeout=60)
    for part in raw["components"]:
        if part["id"] == "job_manager":
            part["args"]["uri_root"] = str(kit / "jobs")
        if part["id"] == "job_scheduler":
            part["args"] = {"max_jobs": 1, "min_schedule_interval": 0.5, "max_schedule_interval": 2.0}
    raw["components"].append({"id": "reviver", "path": REVIVER, "args": {}})
    _save(local / "resources.json", raw)
    _save(local / "authorization.json", PERMISSIONS)
    inner_lines(kit)


def inner_lines(kit: Path) -> None:
    """NVFlare's main process and its job processes prove to each other who they are: without a key of the federation
    no other user of this machine can talk to them. (Left to itself NVFlare lets anybody in on loopback.)"""
    _save(kit / "local" / "comm_config.json", {"allow_adhoc_conns": False, "backbone_conn_gen": 2, "internal": {
        "scheme": "tcp", "resources": {"host": "localhost", "connection_security": "mtls"}}})


def site_policy(kit: Path) -> None:
    """A site admits our two classes and nothing else: no code comes with a job, no shell command, no other job."""
    local, kind = kit / "local", "nvflare.app_common.resource"
    raw = json.loads((local / "resources.json.default").read_text())
    raw["class_allow_list"] = SITE_CLASSES
    raw["allow_log_streaming"] = False
    launcher = next(c for c in raw["components"] if c["id"] == "process_launcher")
    raw["components"] = [
        {"id": "resource_manager",
         "path": f"{kind}_managers.passthrough_resource_manager.PassthroughResourceManager"},
        {"id": "resource_consumer",
         "path": f"{kind}_consumers.passthrough_resource_consumer.PassthroughResourceConsumer"}, launcher]
    _save(local / "resources.json", raw)
    _save(local / "authorization.json", PERMISSIONS)
    inner_lines(kit)


def _save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
