"""A running federation over mutual TLS: it refuses strangers, impostors, old keys and broken messages, and works.

All processes and certificates are real. What takes minutes is in test_flare_real.py and test_flare_faults.py.
"""

import contextlib
import datetime
import importlib.util
import json
import shutil
import socket
import ssl
import struct
import threading
import time

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from fedllm.api import run
from fedllm.core.errors import RunError
from fedllm.federation.nvflare import serve as federate
from fedllm.federation.nvflare.keys import new_federation
from fedllm.federation.nvflare.loopback import loopback, until
from fedllm.federation.nvflare.process import kit_process

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_llama_folder):
    """A server, and the one site of three that has joined."""
    folder = tmp_path_factory.mktemp("federation").resolve()
    with loopback(folder, tiny_llama_folder, join=False) as rig, rig.serving_session():
        rig.join("site-a")
        until(lambda: here(rig) == ["site-a"], 90, "site-a's joining")
        yield rig


def here(rig):
    return sorted(c.name for c in rig.session.get_system_info().client_info)


def context(startup, cert="client.crt", key="client.key"):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(startup / "rootCA.pem")
    if cert:
        made.load_cert_chain(startup / cert, startup / key)
    return made


@contextlib.contextmanager
def dialed(rig, tls, port=None):
    with socket.create_connection(("localhost", port or rig.port), 10) as raw, tls.wrap_socket(raw) as line:
        line.settimeout(10)
        yield line


def refusal(rig, tls, port=None):
    """What the server's TLS says to this certificate; TLS 1.3 says it after the client's half of the handshake.

    A line that is let in hears nothing until it speaks: `recv` runs into its limit, which is no refusal.
    """
    with pytest.raises((ssl.SSLError, ConnectionError)) as caught, dialed(rig, tls, port) as line:
        line.recv(4096)
        raise ConnectionResetError("closed by the server")
    return str(caught.value).lower()


def test_a_site_of_the_federation_is_let_in(rig):
    """Without this the refusals below would prove nothing."""
    with pytest.raises(TimeoutError), dialed(rig, context(rig.keys.kit("site-b") / "startup")) as line:
        line.settimeout(2.0)
        line.recv(4096)


def test_a_stranger_without_a_certificate_is_refused(rig):
    assert "certificate" in refusal(rig, context(rig.keys.kit("site-b") / "startup", cert=None))


def test_another_federations_site_is_refused(rig, tmp_path):
    other = new_federation(tmp_path / "other", ["site-b"], port=rig.port).kit("site-b") / "startup"
    shutil.copy(rig.keys.kit("site-b") / "startup" / "rootCA.pem", other / "rootCA.pem")  # it trusts our server
    assert refusal(rig, context(other))  # the CAs' names are the same, so it is the signature that fails


def expired(rig, folder):
    """A certificate for site-b's own key, signed by the real CA, that ended yesterday."""
    startup = rig.keys.kit("site-b") / "startup"
    state = json.loads(next((rig.keys.folder / "ca").rglob("cert.json")).read_text())
    secret = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    good = x509.load_pem_x509_certificate((startup / "client.crt").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    old = (x509.CertificateBuilder().subject_name(good.subject).issuer_name(good.issuer).public_key(good.public_key())
           .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(30))
           .not_valid_after(now - datetime.timedelta(1)).sign(secret, hashes.SHA256()))
    for name in ("rootCA.pem", "client.key"):
        shutil.copy(startup / name, folder / name)
    (folder / "client.crt").write_bytes(old.public_bytes(serialization.Encoding.PEM))
    return folder


def test_an_expired_certificate_is_refused(rig, tmp_path):
    assert "expired" in refusal(rig, context(expired(rig, tmp_path)))


def test_a_certificate_is_of_no_use_without_its_key(rig, tmp_path):
    for name in ("rootCA.pem", "client.crt"):
        shutil.copy(rig.keys.kit("site-b") / "startup" / name, tmp_path / name)
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "client.key").write_bytes(key)
    with pytest.raises(ssl.SSLError, match=r"(?i)mismatch"):  # no TLS library signs with another key
        context(tmp_path)
    kit = tmp_path / "kit"
    shutil.copytree(rig.keys.kit("site-b"), kit)
    (kit / "startup" / "client.key").write_bytes(key)
    with kit_process(kit, "client", "fed_client.json", "uid=site-b", "org=site_b") as process:
        until(lambda: process.poll() is not None or "error" in (kit / "process.log").read_text().lower(), 60)
        assert here(rig) == ["site-a"]


def test_a_site_cannot_claim_anothers_name(rig, tmp_path):
    """With site-b's own certificate and key, under the name of site-c."""
    kit = tmp_path / "kit"
    shutil.copytree(rig.keys.kit("site-b"), kit)
    with kit_process(kit, "client", "fed_client.json", "uid=site-c", "org=site_c") as process:
        until(lambda: process.poll() is not None or "site-c" in (kit / "process.log").read_text(), 60)
        time.sleep(8.0)  # time enough to register: site-a took less
        assert here(rig) == ["site-a"]
    said = (rig.keys.kit("server") / "process.log").read_text()
    assert "authenticated as 'site-b' but claimed endpoint 'site-c'" in said


def test_a_recorded_conversation_played_again_is_refused(rig):
    """A listener between site-b and the server keeps every byte, and sends the site's again later."""
    kept, stop = bytearray(), threading.Event()
    with socket.create_server(("localhost", 0)) as door:
        def relay():
            near, _ = door.accept()
            far = socket.create_connection(("localhost", rig.port), 10)
            def pump(one, other, keep):
                with contextlib.suppress(OSError):
                    while (data := one.recv(65536)) and not stop.is_set():
                        kept.extend(data if keep else b"")
                        other.sendall(data)
            threading.Thread(target=pump, args=(far, near, False), daemon=True).start()
            pump(near, far, True)

        threading.Thread(target=relay, daemon=True).start()
        with socket.create_connection(door.getsockname(), 10) as raw:
            line = context(rig.keys.kit("site-b") / "startup").wrap_socket(raw)
            line.sendall(b"\0" * 200)
            time.sleep(0.5)
            stop.set()
    assert len(kept) > 1000
    with socket.create_connection(("localhost", rig.port), 10) as raw:
        raw.settimeout(10)
        raw.sendall(kept)
        answer = bytearray()
        with contextlib.suppress(OSError):
            while data := raw.recv(65536):
                answer += data
    # the server's fresh random makes the old handshake's proof worthless: it answers with an alert, or hangs up
    assert here(rig) == ["site-a"] and b"HTTP" not in answer


@pytest.mark.parametrize("junk", [
    b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 0x7FFFFFFF) + b"x" * 100,
    struct.pack(">IIHBB", 1 << 30, 1, 1, 1, 0) + b"{}"], ids=["zeros", "http", "a length of 2 GB", "cut off"])
def test_broken_messages_of_a_site_with_good_keys_change_nothing(rig, junk):
    with contextlib.suppress(OSError), dialed(rig, context(rig.keys.kit("site-b") / "startup")) as line:
        line.sendall(junk)
        line.settimeout(1.0)
        line.recv(4096)
    with socket.create_connection(("localhost", rig.port), 10) as raw:
        raw.sendall(junk)  # and without TLS
    assert here(rig) == ["site-a"]


def test_logs_hold_no_secret(rig):
    secrets = [p.read_text().splitlines()[3] for p in rig.keys.folder.rglob("*.key") if p.name != "audit.key"]
    secrets.append((rig.keys.folder / "audit.key").read_text())
    state = json.loads(next((rig.keys.folder / "ca").rglob("cert.json")).read_text())
    secrets.append(state["root_pri_key"].splitlines()[3])
    logs = [p for name in ("*.log", "*log*.txt", "log.json") for p in rig.keys.folder.rglob(name)]
    assert len(secrets) >= 5 and len(logs) >= 4
    for path in logs:
        text = path.read_text(errors="replace")
        assert "PRIVATE KEY" not in text and not [s for s in secrets if s in text], path


def test_a_run_gives_the_simulations_result_and_a_killed_join_leaves_nothing_behind(rig):
    for site in ("site-b", "site-c"):
        rig.join(site)
    spec = rig.recipe("scaffold", local={"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4})
    here, far = run(spec, root=rig.folder / "here"), rig.run(spec)
    assert far.state_digest == here.state_digest and far.bytes == here.bytes
    assert all(s["loads"] == 1 for s in json.loads((far.folder / "sites.json").read_text()).values())
    join = rig.joins.pop("site-c")
    assert rig.processes("client_train", "site-c")
    join.kill()
    join.wait(10)
    until(lambda: not rig.processes("", "site-c"), 20, "the end of what the killed join had started")


def test_inner_lines_ask_other_users_of_the_machine_for_a_certificate(rig):
    """NVFlare's main and job processes talk on loopback, and where stands in `ps`: a key of the federation is asked."""
    pids = rig.all_processes()
    ports = {c.laddr.port for pid in pids for c in psutil.Process(pid).net_connections("tcp")
             if c.status == psutil.CONN_LISTEN} - {rig.port}
    assert ports
    startup = rig.keys.kit("site-b") / "startup"
    for port in ports:
        assert "certificate" in refusal(rig, context(startup, cert=None), port), port
        with socket.create_connection(("localhost", port), 10) as raw:  # in the clear, as NVFlare has it by default
            raw.settimeout(10)
            raw.sendall(bytes(64))
            try:
                said = raw.recv(4096)
            except ConnectionError:
                said = b""
            assert said == b"" or said[0] == 21, said  # closed, or TLS's alert


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(federate, "TRY", 2.0)
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        silent.listen(8)
        keys = new_federation(tmp_path / "keys", ["site-a"], host="localhost", port=silent.getsockname()[1])
        started = time.monotonic()
        with pytest.raises(RunError, match=r"does not answer \(TimeoutError: NVFlare's own call has not come back"), (
                federate.admin(keys, 1.0)):
            pass
        assert time.monotonic() - started < 30
