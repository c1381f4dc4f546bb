"""What `serve` and `join` say while other processes work, and that a site left alone fills no log."""

import json
import logging
import socket

import pytest

from fedllm.federation import watching
from fedllm.federation.watching import SiteWatch, Teller
from fedllm.runs.follow import Follower, following
from fedllm.runs.progress import JsonLines, Lines
from tests.federation.test_a_site_protects_itself import Asker, code


@pytest.fixture
def listening():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        yield door, f"127.0.0.1:{door.getsockname()[1]}"


def test_join_says_what_happens_at_its_site(tmp_path, caplog, listening, tiny_llama_folder):
    """A real host behind it: opened, asked, answered, refused with the site's own reason, closed."""
    caplog.set_level(logging.INFO, "fedllm.progress")
    _, address = listening
    (tmp_path / "process.log").write_text("an old line: registered\n")
    watch = SiteWatch(tmp_path, address, "process.log", "registered")
    watch.look()
    assert not caplog.messages  # what was said in an earlier life is no connection
    with (tmp_path / "process.log").open("a") as file:
        file.write("... regis")
        file.flush()
        watch.look()
        file.write("tered site-a\n")
        file.flush()
        watch.look()
    far = Asker(tmp_path, tiny_llama_folder)
    far.host.tell = Teller(tmp_path)
    assert "refused" not in far.open() and "reply" in far.ask() and code(far.ask(stack=["x"])) == "stack"
    far.said({"op": "close", "settled": [], "dropped": []})
    watch.look()
    said = [r.getMessage() for r in caplog.records if r.name == "fedllm.progress"]
    assert said[0] == f"connected to {address}; waiting for a run"
    assert said[1].endswith("FedAvg, 2 rounds, 11 rows of this site") and said[2] == "round 1: asked for local"
    assert said[3].startswith("round 1: answered local in ")
    assert said[5].startswith("round 1: refused FedAvg.local: it was asked")
    assert said[-1] == "the run is over; waiting for the next"
    assert (tmp_path / watching.FILE).stat().st_mode & 0o777 == 0o600


def test_a_site_whose_coordinator_has_gone_is_alone_and_waits_for_it(tmp_path, monkeypatch, caplog, listening):
    caplog.set_level(logging.INFO, "fedllm.progress")
    door, address = listening
    monkeypatch.setattr(watching, "PROBE", 0.0)
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: door.listen() if not watching.there(address) else None)
    watch = SiteWatch(tmp_path, address, "process.log", "registered")
    assert not watch.alone  # nothing is over yet
    Teller(tmp_path)("closed")
    watch.look()
    assert not watch.alone and not watch.alone  # it is there
    door.close()
    assert not watch.alone and watch.alone  # gone twice
    again = socket.socket()
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    again.bind(("127.0.0.1", int(address.split(":")[1])))
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: again.listen())
    watch.wait(lambda: False)
    assert "waiting for it" in caplog.messages[-1] and not watch.alone
    again.close()


def test_serve_tells_what_the_record_of_another_process_says(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fedllm.progress")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("rounds: 2\nclients: {per_round: 1.0}\n")
    (tmp_path / "clients.json").write_text(json.dumps([{"id": "a"}, {"id": "b"}]))
    wire = {"kind": "wire", "round": 0, "phase": "FedAvg.local", "bytes": 1}
    events = [{"kind": "evaluation", "round": 0, "global": {"loss": 2.0}, "clients": {}},
              {**wire, "client": "a", "direction": "down"}, {**wire, "client": "a", "direction": "up"},
              {"kind": "missing", "round": 0, "client": "b", "why": "no \x1b[31msign"},
              {"kind": "round", "round": 0, "cohort": ["a", "b"], "loss": 1.5, "seconds": 1.0}]
    with following(tmp_path, Lines()):
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"kind": "rou')
    assert caplog.messages[0] == "test after round 0: loss 2.000"
    assert caplog.messages[1:] == [
        "round 1 of 2 begins with 2 clients", "b gives no answer: no ?[31msign",
        "round 1 of 2 is done; training loss 1.500; 1 of 2 clients answered, 1 missing; 0:00:00 left"]
    (tmp_path / "checkpoints" / "000001.json").write_text("{}")
    out = (tmp_path / "lines").open("w+")
    Follower(tmp_path, JsonLines(out)).look()  # what was there before it looked was told by another
    out.seek(0)
    assert [json.loads(line) for line in out] == [{"event": "begin", "rounds": 2, "done": 1}]
