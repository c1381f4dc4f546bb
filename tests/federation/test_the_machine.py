"""The machine a run or a site lives on: folders, locks, signatures, ports, proxies, the network, received folders."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from fedllm.api import resume, run
from fedllm.cli.chat import Speaker
from fedllm.cli.main import app
from fedllm.cli.said import printable
from fedllm.core.errors import RecipeError, RunError
from fedllm.engines.far.reasons import Refused
from fedllm.federation import process
from fedllm.federation.identity import keep_identity
from fedllm.federation.operate import announced, serving
from fedllm.federation.process import free_port, need_port, no_proxy
from fedllm.methods.baselines import fedavg
from fedllm.runs.audit_key import make_key
from fedllm.runs.folder import RunFolder
from fedllm.runs.received import received
from fedllm.runs.recipe import load_recipe
from fedllm.runs.signature import against_signature, sign


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("done")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "response": "red"}) + "\n"
                                               for i in range(24)))
    spec = {"name": "dp", "model": tiny_llama_folder, "rounds": 1, "local": {"steps": 1, "batch_size": 4},
            "space": {"name": "lora", "rank": 2}, "layers": [{"name": "dp_fedavg", "noise_multiplier": 1.0}],
            "data": {"source": str(folder / "rows.jsonl"), "partition": {"kind": "iid", "clients": 3}, "test": 0.0},
            "evaluate": {"exact_match": False, "samples": 0, "clients": False}}
    return run(spec, root=folder / "runs").folder


def copied(folder, to):
    import shutil

    return shutil.copytree(folder, to)


def test_only_the_owner_may_open_a_run(done):
    for path in [done, *done.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_secret_of_the_noise_is_gone_when_the_run_ends(done):
    for path in (done / "checkpoints").glob("*.json"):
        assert '"secret"' not in path.read_text()
    assert RunFolder(done).load()[1]["layers"][0]["releases"]  # what was paid stays


def test_one_process_works_on_a_run(tmp_path, done):
    folder = RunFolder(copied(done, tmp_path / "r"))
    code = ("import sys, time, pathlib; from fedllm.runs.folder import RunFolder\n"
            "with RunFolder(pathlib.Path(sys.argv[1])).held():\n print('here', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"here\n" and folder.is_held()
        with pytest.raises(RunError, match=f"is being worked on by process {other.pid}"), folder.held(0.1):
            pass
        (folder.path / "result.json").unlink()
        with pytest.raises(RunError, match="is being worked on"):
            resume(folder.path)
    finally:
        other.kill()  # killed in the middle: the lock is free again
        other.wait(10)
    assert not folder.is_held()
    with folder.held(0.1), pytest.raises(RunError), folder.held(0.1):
        pass


def test_stop_signals_nobody_whom_a_received_folder_names(tmp_path, done):
    folder = copied(done, tmp_path / "r")
    import psutil

    me = psutil.Process()
    (folder / "serving.json").write_text(json.dumps({"pid": me.pid, "began": me.create_time()}))
    assert serving(folder) is None
    with announced(folder):
        assert serving(folder) == me.pid


def test_a_signed_run_cannot_be_rewritten(tmp_path, done):
    folder = copied(done, tmp_path / "r")
    key = make_key(tmp_path)
    public, other = tmp_path / "audit.pub", tmp_path / "other"
    other.mkdir()
    make_key(other)
    assert key.stat().st_mode & 0o077 == 0
    with pytest.raises(RunError, match="never overwritten"):
        make_key(tmp_path)
    verify = ["audit", "verify", str(folder), "--key", str(public)]
    assert "nobody has signed" in CliRunner().invoke(app, verify).output
    sign(folder, key)
    assert CliRunner().invoke(app, verify).exit_code == 0
    wrong = CliRunner().invoke(app, [*verify[:-1], str(other / "audit.pub")])
    assert wrong.exit_code == 1 and "not signed with this key" in wrong.output
    for name in ("report.html", "model_card.md", "privacy_statement.md", "result.json", "events.jsonl"):
        again = copied(folder, tmp_path / name)
        (again / name).write_text((again / name).read_text() + " ")
        assert any(name in f for f in against_signature(again, public, "")), name
    forged = copied(folder, tmp_path / "forged")  # finding 15: one event more, and a new head beside it
    from fedllm.runs.seal import verify as look

    result = json.loads((forged / "result.json").read_text())
    lines = (forged / "events.jsonl").read_text().splitlines(keepends=True)[:-1]
    (forged / "events.jsonl").write_text("".join(lines))
    result["audit"] = {"events": len(lines), "head": look(forged).head}
    (forged / "result.json").write_text(json.dumps(result))
    assert against_signature(forged, public, look(forged).head)
    (forged / "result.json").unlink()
    assert "result.json is missing since the run was sealed" in against_signature(forged, public, "")
    (folder / "added.md").write_text("x")
    assert against_signature(folder, public, look(folder).head) == ["added.md was added since the run was sealed"]
    assert CliRunner().invoke(app, ["audit", "seal", str(folder), "--key", str(key)]).exit_code == 0
    assert CliRunner().invoke(app, verify).exit_code == 0


def test_a_received_folder_runs_no_code(tmp_path, done):
    folder = copied(done, tmp_path / "r")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["trust_remote_code"] = True
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="give --trust-remote-code"):
        Speaker(folder)
    (folder / "result.json").unlink()
    with pytest.raises(RecipeError, match="give --trust-remote-code"):
        resume(folder)
    assert CliRunner().invoke(app, ["resume", str(folder)]).exit_code != 0
    assert received(folder, trust_remote_code=True).model.trust_remote_code


TAKES_A_RUN = {"resume": (), "replay": (), "report": (), "export": ("--merge",), "chat": (), "ask": ("Who?",),
               "serve": ("--federation", "."), "status": (), "logs": (), "stop": (), "audit run": (),
               "audit verify": (), "audit seal": ("--key", "k"), "evaluate": ("--data", "rows.jsonl"),
               "track": ("--to", "tensorboard"), "compliance": (), "origin": ("--nobody", "rows.jsonl"),
               "judge": ("base", "--data", "rows.jsonl", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m")}
BEFORE = {"origin": ("rows.jsonl",)}
"""What stands before the run's folder."""
TAKES_NONE = {"run", "plan", "compare", "advise", "dashboard", "methods", "recipe", "group", "demo", "bench", "claims",
              "schema", "join", "keys new", "keys add", "keys suspend", "keys restore", "keys revoke", "audit key"}
"""All commands: with a run's folder, and without one."""


def commands(at, *words):
    for name, inner in at.commands.items():
        yield from commands(inner, *words, name) if isinstance(inner, click.Group) else [" ".join((*words, name))]


def test_every_command_is_known_to_take_a_run_or_none():
    assert set(commands(typer.main.get_command(app))) == set(TAKES_A_RUN) | TAKES_NONE


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("key, value", [
    ("plugins", [{"file": "evil.py"}]), ("evaluate", {"metric": "call:evil:judge"}),
    ("method", {"name": "fed_bbpt", "policy": True, "endpoint": "http://127.0.0.1:9/v1", "api_key_env": "HOME"})])
def test_no_command_runs_what_a_received_folder_names(tmp_path, done, monkeypatch, key, value, ended):
    folder = copied(done, tmp_path / "r")
    code = inspect.getsource(fedavg).replace("class FedAvg(", "class Evil(")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "evil.py").write_text(f"{code}\nopen({str(tmp_path / 'ran')!r}, 'w')\ndef judge(said, wanted): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe[key] = {**recipe[key], **value} if key == "evaluate" else value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if not ended:
        (folder / "result.json").unlink()
    said = {}
    for words, more in TAKES_A_RUN.items():
        got = CliRunner().invoke(app, [*words.split(), *BEFORE.get(words, ()), str(folder), *more])
        said[words] = f"{got.output} {got.exception}"
        assert not (tmp_path / "ran").exists() and "evil" not in sys.modules, words
    refused = [w for w, text in said.items() if "--trust-remote-code" in text]
    assert {"ask"} | ({"chat", "audit run"} if ended else {"resume", "serve"}) <= set(refused)
    if key == "plugins":
        assert "report" in refused or not ended
        load_recipe(folder / "recipe.yaml")  # as a recipe of one's own it runs: the file works
        assert (tmp_path / "ran").exists()


def test_a_port_in_use_is_found_at_once():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port} of this machine cannot be had for NVFlare's server"):
            need_port(port, "NVFlare's server")
    need_port(port, "NVFlare's server")


def test_a_port_for_later_is_none_that_the_kernel_gives_away():
    """It was one of those, which whoever connects anywhere may have by the time that the server begins."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.socket() as anyone:
        anyone.bind(("127.0.0.1", 0))
        assert anyone.getsockname()[1] > max(ports) or process._ephemeral() < 11_001


def test_whoever_needs_a_port_for_later_asks_for_it_there():
    """A socket that is bound to any port, and neither listens nor stays."""
    slip = re.compile(r"as (\w+):\n\s+\1\.bind\(\(.*, 0\)\)\n(?!\s+\1\.listen)")
    root = Path(__file__).parents[2]
    files = [f for room in ("fedllm", "tests", "evidence", "benchmarks") for f in (root / room).rglob("*.py")]
    assert [f.name for f in files if slip.search(f.read_text())] == ["test_the_machine.py"]  # the one above


def test_proxies_are_not_for_loopback(monkeypatch):
    """Through a proxy that answers nobody, this machine is reached all the same."""
    import httpx

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://localhost:{server.getsockname()[1]}/"

        def answer():
            line, _ = server.accept()
            line.recv(4096)
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            line.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, timeout=5)
        with no_proxy("coordinator.example"):
            assert "coordinator.example" in os.environ["no_proxy"] and httpx.get(url, timeout=5).text == "ok"
    assert "no_proxy" not in os.environ


REACH = """
import socket, sys
from fedllm.federation.network import close
from fedllm.federation.settings import SiteSettings
from fedllm.engines.far.reasons import Refused
from fedllm.federation import process
close(SiteSettings(data="d", store="s", hosts=["named.example"]), ["localhost"])
for where in (("93.184.216.34", 80), ("evil.example", 80)):
    try:
        socket.create_connection(where, 0.5)
    except Refused as error:
        print("refused", error.code)
try:
    import httpx
    httpx.get("http://evil.example/", timeout=0.5)
except Refused as error:
    print("refused", error.code)
try:
    socket.getaddrinfo("named.example", 80)
except OSError:
    pass
with socket.socket() as server:
    server.bind(("127.0.0.1", 0)); server.listen()
    socket.create_connection(server.getsockname(), 1).close()
    socket.create_connection(("localhost", server.getsockname()[1]), 1).close()
import os
import re
print("open", os.environ["HF_HUB_OFFLINE"])
"""


def test_a_sites_process_reaches_only_the_hosts_that_its_settings_name():
    said = subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True, timeout=120)
    assert said.stdout.splitlines() == ["refused network"] * 3 + ["open 1"], said.stderr


def test_what_a_site_is_is_compared_with_what_it_was(tmp_path):
    keep_identity(tmp_path, {"weights": "a", "tokenizer": "b", "rows": "c", "packages": "d"})
    keep_identity(tmp_path, {"weights": "a", "tokenizer": "b", "rows": "c", "packages": "d"})
    for name, code in (("weights", "weights_differ"), ("tokenizer", "tokenizer_differs"), ("rows", "rows_differ"),
                       ("packages", "packages_differ")):
        with pytest.raises(Refused) as caught:
            keep_identity(tmp_path, {"weights": "a", "tokenizer": "b", "rows": "c", "packages": "d", name: "x"})
        assert caught.value.code == code


def test_what_a_terminal_is_shown_holds_no_escapes_and_has_an_end():
    assert printable("a\x1b[2Jb") == "a?[2Jb" and len(printable("x" * 10**6)) == 4000
    assert load_recipe({}).model.trust_remote_code is False
