"""What the dashboard shows of run folders, and that it follows a run that is going on."""

import json
import os
import time

import pytest

from fedllm.dashboard.shelf import places
from fedllm.dashboard.tail import Odd, Tail
from fedllm.privacy.accountant import spent
from fedllm.runs.event_log import EventLog
from fedllm.runs.store import freeze
from tests.dashboard.conftest import Run, runs, whole

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


def test_a_run_with_its_curves_clients_bytes_and_trouble(root, web):
    run = Run(root, "one").test(0)
    run.record.emit("left_out", client="empty", why="it has no training rows")
    run.round(0).test(1, exact_match=0.5)
    run.record.crossed("down", "FedAvg.local", "b", 1000, 1, "FedAvg")
    run.record.emit("missing", round=1, phase="FedAvg.local", client="b", why="it was silent until the deadline")
    run.round(1, ["a"], loss=None, skipped="1 of 2 clients answered")
    run.record.crossed("down", "FedAvg.score", "a", 70, 2, "FedAvg")
    run.log.close()
    found = whole(web, "one")
    assert found["done"] == 2 and found["rounds"] == 3 and found["loss"] == 2.0 and found["method"] == "fedavg"
    assert (found["up"], found["down"], found["tested"]) == (3000, 4000, {"down": 70})  # a test is counted apart
    assert [p["loss"] for p in found["curve"]] == [2.0, None] and found["curve"][1]["skipped"]
    assert [(t["round"], t["exact_match"]) for t in found["tests"]] == [(0, 0.25), (1, 0.5)]
    clients = {c["id"]: c for c in found["clients"]}
    assert clients["a"]["state"] == "answered" and (clients["a"]["answered"], clients["a"]["missing"]) == (2, 0)
    assert clients["b"]["state"] == "missing" and clients["b"]["why"] == "it was silent until the deadline"
    assert clients["empty"]["state"] == "left out"
    assert found["trouble"] == 3 and [n["kind"] for n in found["news"]] == ["round skipped", "missing", "left out"]
    assert found["state"] == "stopped" and "name: one" in found["recipe"]


def test_who_was_asked_and_has_not_answered_is_at_work_and_then_late(root, web):
    run = Run(root, "one")
    run.record.crossed("down", "FedAvg.local", "slow", 1000, 0, "FedAvg")
    run.log.flush()
    (slow,) = whole(web, "one")["clients"]
    assert slow["state"] == "asked" and slow["since"] <= time.time()
    run.record.emit("round", round=0, cohort=["slow"], loss=None, seconds=1.0)
    time.sleep(0.8)
    (slow,) = whole(web, "one")["clients"]
    assert slow["state"] == "no answer" and slow["why"] == "round 1 ended without its answer"


def test_a_stream_follows_a_run_that_is_going_on(root, web):
    run = Run(root, "one").round(0)
    with run.folder.held(), web.stream("GET", f"/api/stream?run={runs(web)['one']['id']}") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines, seen = stream.iter_lines(), []
        while len(seen) < 3:
            if next(lines) == "event: run":
                found = json.loads(next(lines).removeprefix("data: "))
                assert found["state"] == "running"
                seen.append((found["done"], found["up"]))
                run.round(found["done"])
    assert seen == [(1, 2000), (2, 4000), (3, 6000)]


def test_a_record_is_read_only_where_it_grew_and_afresh_where_it_was_cut(root, monkeypatch):
    run = Run(root, "one").round(0).round(1)
    tail = Tail(run.path / "events.jsonl")
    assert [e["kind"] for e in tail.look()].count("round") == 2
    at = tail.at
    run.round(2)
    assert all(e["round"] == 2 for e in tail.look()) and tail.at > at
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b'{"kind":"round","rou')
    assert list(tail.look()) == [] and tail.behind == 20  # half a line waits
    run.log.close()
    run.record.sink = EventLog(run.path / "events.jsonl", run.log.length // 3).append  # a run is resumed from there
    for n in (1, 2, 3, 4):
        run.round(n, loss=9.0)
    events = list(tail.look())
    assert events[0] is None and [e["loss"] for e in events[1:] if e["kind"] == "round"] == [2.0, 9.0, 9.0, 9.0, 9.0]


def test_a_long_record_comes_in_pieces(root, monkeypatch):
    monkeypatch.setattr("fedllm.dashboard.tail.PIECE", 2000)
    run = Run(root, "one")
    for n in range(40):
        run.round(n)
    tail, looks, rounds = Tail(run.path / "events.jsonl"), 0, 0
    while tail.behind or not looks:
        rounds += sum(e["kind"] == "round" for e in tail.look())
        looks += 1
    assert rounds == 40 and looks > 1
    monkeypatch.setattr("fedllm.dashboard.tail.LONGEST", 4000)
    (run.path / "long.jsonl").write_bytes(b"x" * 5000)
    with pytest.raises(Odd, match="line 1 has no end"):
        list(Tail(run.path / "long.jsonl").look())


def test_hostile_text_is_sent_as_data_and_the_page_runs_no_script_but_its_own(root, web):
    run = Run(root, "one", model={"name": HOSTILE}, method={"name": HOSTILE}).round(0, [HOSTILE])
    run.record.emit("refused", round=0, phase="x", client=HOSTILE, why=HOSTILE + "\n</script>")
    run.log.flush()
    answer = web.get(f"/api/run/{runs(web)['one']['id']}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "\x1b" not in answer.json()["clients"][0]["id"]
    page = web.get("/")
    assert "onerror" not in page.text and "<script>" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    script = web.get("/file/dashboard.js").text
    assert not any(word in script for word in ("innerHTML", "insertAdjacentHTML", "outerHTML", "document.write"))


def test_half_written_and_damaged_folders_are_shown_as_such(root, web):
    (root / "made" / "checkpoints").mkdir(parents=True)
    Run(root, "named").log.close()
    (root / "named" / "events.jsonl").unlink()
    Run(root, "torn")
    (root / "torn" / "recipe.yaml").write_text("name: [")
    bad = Run(root, "bad").round(0)
    with (bad.path / "events.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    Run(root, "cut").round(0)
    (root / "cut" / "result.json").write_text('{"rounds": ')
    (root / "list").mkdir()
    (root / "list" / "recipe.yaml").write_text("- 1\n")
    found = runs(web)
    assert found["made"]["state"] == "half written" and "no recipe.yaml" in found["made"]["why"]
    assert found["named"]["state"] == "half written" and "no events" in found["named"]["why"]
    assert found["torn"]["state"] == "damaged" and "no YAML" in found["torn"]["why"]
    assert found["bad"]["state"] == "damaged" and "events.jsonl is damaged on line 6" in found["bad"]["why"]
    assert found["cut"]["state"] == "damaged" and "result.json" in found["cut"]["why"]
    assert found["list"]["state"] == "damaged" and "half written" in found["list"]["why"]
    (root / "cut" / "result.json").write_text('{"rounds": 1}')  # what is mended is shown so
    time.sleep(0.8)
    assert runs(web)["cut"]["state"] == "finished"


def test_links_and_pipes_in_a_folder_are_not_followed(root, web, tmp_path):
    (tmp_path / "secret.yaml").write_text("name: secret\n")
    Run(root, "linked")
    (root / "linked" / "recipe.yaml").unlink()
    (root / "linked" / "recipe.yaml").symlink_to(tmp_path / "secret.yaml")
    Run(root, "piped").log.close()
    (root / "piped" / "events.jsonl").unlink()
    os.mkfifo(root / "piped" / "events.jsonl")
    (root / "away").symlink_to(tmp_path)
    assert "secret" not in web.get("/api/runs").text
    assert runs(web)["piped"]["state"] == "damaged" and "no plain file" in runs(web)["piped"]["why"]


def test_no_runs_yet_and_then_one(root, web):
    told = web.get("/api/runs").json()
    assert told["roots"] == [str(root)] and told["runs"] == [] and "exact_match" in told["shares"]
    Run(root, "first")
    time.sleep(3.1)
    assert list(runs(web)) == ["first"]


def test_stages_and_comparisons_hold_their_runs(root):
    Run(root, "chain").log.close()
    Run(root / "chain" / "stages", "one")
    (root / "versus").mkdir()
    (root / "versus" / "comparison.yaml").write_text("recipe: {}\n")
    Run(root / "versus", "fedavg-seed0")
    found = {p.label: p for p in places([root])}
    assert {k: p.kind for k, p in found.items()} == {
        "runs/chain": "stages", "runs/chain/stages/one": "run", "runs/versus": "comparison",
        "runs/versus/fedavg-seed0": "run"}
    assert found["runs/versus/fedavg-seed0"].within == found["runs/versus"].id
    assert [p.kind for p in places([root / "chain" / "stages" / "one"])] == ["run"]  # a run's folder itself


def test_sites_of_a_real_federation_with_their_health(root, web):
    run = Run(root, "far", data={"source": "each site's own"}).round(0, ["north", "south"])
    run.record.emit("suspect", round=1, client="south", why="it was silent until the deadline")
    run.log.flush()
    found = whole(web, "far")
    assert found["of_sites"] and [(c["id"], c["state"]) for c in found["clients"]] == [
        ("south", "suspect"), ("north", "answered")]
    run.record.emit("back", round=2, client="south", after=5.0)
    time.sleep(0.8)
    assert {c["id"]: c["state"] for c in whole(web, "far")["clients"]}["south"] == "here"


def test_epsilon_of_a_run_under_way_and_of_one_that_ended(root, web):
    run = Run(root, "one", layers=[{"name": "dp_fedavg", "delta": 1e-6}]).round(0)
    run.folder.write_json("clients.json", [{"id": "a"}, {"id": "b"}])
    row = [1.5, "none", 1.0, 0, 7]
    value = {"state": {}, "layers": [{"clip": 0.1, "releases": [row], "unbooked": []}]}
    (run.path / "checkpoints" / "000001.json").write_text(json.dumps(freeze(value, run.folder.blobs)))
    told = whole(web, "one")["privacy"]
    assert told["so_far"] and told["layers"][0]["epsilon"] == spent((tuple(row),), 1e-6, "rdp") > 1
    run.folder.write_json("result.json", {"privacy": {"layers": [
        {"layer": "dp_fedavg", "epsilon": float("inf"), "unit": "client", "delta": 1e-6}]}})
    time.sleep(0.8)
    assert runs(web)["one"]["epsilon"] == "infinite" and not whole(web, "one")["privacy"]["so_far"]
