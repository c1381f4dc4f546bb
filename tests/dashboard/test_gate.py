"""Who gets in, who may act, and what is said when the dashboard cannot start."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from fedllm.cli.main import main
from fedllm.core.errors import RecipeError, RunError
from fedllm.dashboard.serve import server
from tests.dashboard.conftest import Run, csrf, runs, served

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(str(os.getpid()))
file.flush()
print("held", flush=True)
time.sleep(60)
"""
"""Takes a run's lock as `RunFolder.held` does, without the seconds of importing torch."""


def holding(run, **how):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path / ".lock")], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, **how)
    assert process.stdout.readline() == b"held\n"
    return process


def post(web, act, id, **headers):
    own = str(web.base_url).rstrip("/")
    return web.post(f"/api/run/{id}/{act}", headers={"Origin": own, "X-FedLLM-CSRF": csrf(web), **headers})


@pytest.mark.parametrize("how", [{}, {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}])
def test_stop_ends_the_process_that_holds_the_run(root, web, how):
    run = Run(root, "one").round(0)
    with holding(run, **how) as process:
        assert runs(web)["one"]["state"] == "running"
        answer = post(web, "stop", runs(web)["one"]["id"])
        assert answer.status_code == 200 and str(process.pid) in answer.json()["says"]
        assert process.wait(60) != 0
    time.sleep(0.8)
    assert runs(web)["one"]["state"] == "stopped"


def test_a_lock_that_names_another_process_ends_nobody(root, web):
    run = Run(root, "one")
    with holding(run) as process:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
            (run.path / ".lock").write_text(str(other.pid))
            answer = post(web, "stop", runs(web)["one"]["id"])
            assert answer.status_code == 409 and "can be told" in answer.json()["error"]
            assert other.poll() is None and process.poll() is None
            other.kill()
        process.kill()


@pytest.mark.parametrize("headers, why", [
    ({"Origin": "http://elsewhere.example"}, "Origin"), ({"Origin": "null"}, "Origin"), ({"Origin": ""}, "Origin"),
    ({"X-FedLLM-CSRF": "wrong"}, "load it again"), ({"X-FedLLM-CSRF": ""}, "load it again"),
    ({"Sec-Fetch-Site": "cross-site"}, "Sec-Fetch-Site")])
def test_an_action_that_another_page_asks_for_is_refused(root, web, headers, why):
    run = Run(root, "one")
    with holding(run) as process:
        answer = post(web, "stop", runs(web)["one"]["id"], **headers)
        assert answer.status_code == 403 and why in answer.text and process.poll() is None
        process.kill()


def test_what_cannot_be_done_is_said(root, web):
    Run(root, "far", data={"source": "each site's own"}).round(0)
    Run(root, "done").folder.write_json("result.json", {"rounds": 1})
    found = runs(web)
    assert "fedllm serve" in post(web, "resume", found["far"]["id"]).json()["error"]
    assert "nothing to resume" in post(web, "resume", found["done"]["id"]).json()["error"]
    assert "nobody works on" in post(web, "stop", found["far"]["id"]).json()["error"]
    assert "no such run" in post(web, "stop", "0" * 16).json()["error"]
    assert post(web, "stop", "../../etc").status_code == 404 and post(web, "erase", "x").status_code == 404
    assert web.get("/api/run/nothing").status_code == 409 and web.get("/file/app.py").status_code == 404
    assert web.get("/api/stream", params={"run": list("abcdefghijklm")}).status_code == 400
    assert web.get(f"/api/run/{found['done']['id']}/stop").status_code == 405  # an action is never a link


def test_on_loopback_only_loopback_names_are_answered(root, web):
    assert web.get("/api/runs", headers={"Host": "rebound.example"}).status_code == 421
    assert web.get("/api/runs", headers={"Host": "localhost:1"}).status_code == 200
    assert web.get("/api/runs", headers={"Host": "[::1]:1"}).status_code == 200


def test_on_another_host_a_token_is_needed_everywhere(root, caplog):
    Run(root, "one")
    with caplog.at_level(0), served(root, host="0.0.0.0") as address:
        base, _, token = address.partition("?token=")
        assert len(token) > 30
        with httpx.Client(base_url=base) as web:
            for path in ("/", "/api/runs", "/api/stream", "/file/dashboard.js", "/?token=wrong", "/?token="):
                assert web.get(path).status_code == 401
            assert web.post("/api/run/x/stop").status_code == 401
            assert web.get("/api/runs", headers={"Authorization": "Bearer é".encode()}).status_code == 401
            assert list(runs(httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}))) == ["one"]
            entered = web.get(f"/?token={token}")
            assert entered.status_code == 303 and entered.headers["location"] == "/"
            assert all(x in entered.headers["set-cookie"] for x in ("HttpOnly", "SameSite=strict"))
            assert token not in entered.headers["set-cookie"]
            assert list(runs(web)) == ["one"]
    assert token not in "".join(r.getMessage() for r in caplog.records if not r.name.startswith("httpx"))


def test_a_port_in_use_and_folders_that_are_not_there(root, tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        why = f"port {port} of 127.0.0.1 cannot be opened: Address already in use"
        with pytest.raises(RunError, match=why), server([root], host="127.0.0.1", port=port):
            pass
    with pytest.raises(RunError, match="is no folder"), server([root / "no"], host="127.0.0.1", port=0):
        pass
    nowhere = "no.such.host.invalid"
    with pytest.raises(RecipeError, match="no address of this machine"), server([root], host=nowhere, port=0):
        pass
    with pytest.raises(RecipeError, match="allowed is 0"), server([root], host="127.0.0.1", port=70000):
        pass
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(SystemExit) as ended:
        main(["dashboard"])
    assert ended.value.code == 2 and "neither runs/ nor comparisons/" in capsys.readouterr().err


def test_without_the_extra_its_name_is_said(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RecipeError, match=r"fedlm\[dashboard\]"), server([root], host="127.0.0.1", port=0):
        pass


def test_resume_begins_a_process_of_its_own_and_says_how_it_failed(root, web):
    run = Run(root, "one", rounds="many").round(0)  # no recipe that can run: `fedllm resume` refuses it
    assert post(web, "resume", runs(web)["one"]["id"]).status_code == 200
    assert "begun already" in post(web, "resume", runs(web)["one"]["id"]).json()["error"]
    ends = time.monotonic() + 120
    while (told := web.get(f"/api/run/{runs(web)['one']['id']}").json()["resume"])["code"] is None:
        assert time.monotonic() < ends
        time.sleep(0.3)
    assert told["code"] == 2 and "rounds" in told["said"]
    assert os.stat(run.path / "resume.log").st_mode & 0o777 == 0o600
