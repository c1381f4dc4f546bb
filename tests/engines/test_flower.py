"""The Flower engine: its pieces, a short real run over TLS with node keys, and (slow) more methods and killed nodes."""

import asyncio
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

if importlib.util.find_spec("flwr") is None:
    pytest.skip("flwr is not installed (pip install 'fedlm[flower]')", allow_module_level=True)

from fedllm.api import run
from fedllm.cli.main import app
from fedllm.core.errors import FedLLMError, PayloadError, RecipeError, RunError
from fedllm.engines.far.desk import Desk
from fedllm.engines.far.line import Patience, Silence
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.federation.flower import internals, wire
from fedllm.federation.flower import link as flower_link
from fedllm.federation.flower.join import join_flower
from fedllm.federation.flower.keys import (
    FlowerFederation,
    add_flower_sites,
    new_flower_federation,
)
from fedllm.federation.flower.link import FlowerLink
from fedllm.federation.flower.loopback import flower_loopback
from fedllm.federation.flower.superlink import FromHere
from fedllm.federation.nvflare.loopback import events, until

SGD = {"local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}}
CASES = {
    "fedkseed": {"knobs": {"K": 64, "steps": 4, "lr": 1e-4}}, "scaffold": SGD, "fedex_lora": {}, "local_only": {},
    "hetlora": {"space": {"name": "lora", "rank": 8, "scaling": "shared"}, "clients": {"ranks": [2, 4, 8]}},
    "fedbuff": {"knobs": {"buffer_size": 2, "concurrency": 1}},  # one at work at a time: the order is the simulation's
    "fed_sp_sc": {"rounds": 1, "knobs": {"max_new_tokens": 16, "embed": "tfidf"}}}


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_a_message_keeps_its_body_bit_for_bit():
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    body = bytearray(os.urandom((5 << 20) + 17))
    record = wire.to_record({"op": "ask", "round": 3}, body)
    objects = get_all_nested_objects(record)
    assert len(objects) > 4  # a long body travels in chunks
    again = inflate_object_from_contents(record.object_id, {k: v.deflate() for k, v in objects.items()})
    head, got = wire.from_record(again)
    assert head == {"op": "ask", "round": 3} and bytes(got) == bytes(body)
    assert wire.from_record(wire.to_record({"a": 1}, b"")) == ({"a": 1}, b"")


def test_a_message_that_is_none_of_ours_is_refused():
    from flwr.app import ConfigRecord, RecordDict

    for record in (RecordDict(), RecordDict({"head": ConfigRecord({"json": "["})}),
                   RecordDict({"head": ConfigRecord({"json": "[1]"})})):
        with pytest.raises(PayloadError, match="a message"):
            wire.from_record(record)


def test_what_is_touched_of_flwr_is_still_there():
    """The contract with flwr's insides: sleeps, back-off, the SuperLink's middleware, the app bundle."""
    from flwr.superlink import main

    internals.check_flower()
    assert internals.hasten_pulls()
    from flwr.supercore.inflatable import inflatable_utils as pulls

    for pull in (pulls.pull_objects, pulls.pull_and_inflate_object_from_tree):  # each passes its own wait down
        assert pull.__kwdefaults__["initial_backoff"] == 0.02
    node = importlib.import_module("flwr.supernode.start_client_internal")
    before = node.time
    try:
        assert internals.hasten(node, 0.01)
        started = time.monotonic()
        node.time.sleep(60)
        assert time.monotonic() - started < 30 and node.time.monotonic() > 0
    finally:
        node.time = before
    assert callable(main._get_middleware)
    assert vars(internals.inside()).keys() == {n for names in internals.INSIDE.values() for n in names}
    assert internals.fab()[1] == internals.fab()[1]


def test_a_release_that_lacks_a_part_is_refused_by_its_name():
    with pytest.raises(FedLLMError, match=r"changed inside .*NotThere.* tried with >=1.41,<1.43"):
        internals.part("flwr.supercore.fab", "NotThere")


def test_flwr_is_touched_in_one_file():
    """Beside it, `flwr.app` alone is used, which is public."""
    home = Path(internals.__file__).parents[2]
    users = {p.name for p in home.rglob("*.py") for line in p.read_text().splitlines()
             if "import" in line and "flwr" in line.split("#")[0] and "from flwr.app" not in line and '"' not in line}
    assert users <= {"internals.py"}, users


def test_a_token_that_no_longer_counts_fails_its_call_and_interrupts_nobody(monkeypatch):
    import httpx
    from flwr.supercore.retry import http_retry

    killed = []
    monkeypatch.setattr(http_retry.os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(http_retry, "FORCE_EXIT_TIMEOUT_SECONDS", -1)

    def refused():
        request = httpx.Request("POST", "https://localhost/")
        raise httpx.HTTPStatusError("401", request=request, response=httpx.Response(401, request=request))

    with pytest.raises(httpx.HTTPStatusError):
        internals.gentle(http_retry.make_simple_http_retry_invoker()).invoke(refused)
    assert not killed
    with pytest.raises(httpx.HTTPStatusError):  # what flwr does by itself
        http_retry.make_simple_http_retry_invoker().invoke(refused)
    assert killed


def test_controls_answer_this_machine_alone():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    def ask(path, host):
        said = []

        async def send(message):
            said.append(message)

        asyncio.run(FromHere(app)({"type": "http", "path": path, "client": (host, 1)}, None, send))
        return said[0]["status"] if said else 200

    assert ask("/v1/control/start-run", "203.0.113.9") == 403 and ask("/v1/runtime/acquire-task", "fe80::1") == 403
    assert ask("/docs", "203.0.113.9") == 403 and reached == []
    assert ask("/v1/fleet/pull-messages", "203.0.113.9") == 200 and ask("/v1/control/x", "127.0.0.1") == 200
    assert ask("/v1/control/x", "::1") == 200 and ask("/v1/control/x", "::ffff:127.0.0.1") == 200


class Slow:
    """Stands in for a run that takes a while."""

    info, stack = SimpleNamespace(n=3), (None,)

    def __init__(self):
        self.go, self.asked = threading.Event(), 0

    def ask(self, head, body):
        self.asked += 1
        self.go.wait(60)
        return {"boot": "b"}, b"done"


def test_long_work_is_fetched_and_signs_of_life_come_meanwhile():
    slow = Slow()
    desk = Desk(lambda head: (slow, {"n": 3}), hold=0.1)
    head = {"protocol": PROTOCOL, "incarnation": "i", "run": "r"}
    assert desk.answer({**head, "op": "open", "ticket": "t0"}, b"")[0]["n"] == 3
    assert desk.answer({**head, "op": "ask", "ticket": "t1"}, b"")[0]["pending"]
    assert desk.answer({**head, "op": "probe", "ticket": "t2"}, b"")[0]["open"]
    assert desk.answer({**head, "op": "fetch", "ticket": "t1"}, b"")[0]["pending"]
    slow.go.set()
    assert desk.answer({**head, "op": "fetch", "ticket": "t1"}, b"") == ({"boot": "b"}, b"done")
    assert desk.answer({**head, "op": "fetch", "ticket": "t1"}, b"")[0]["unknown"] and slow.asked == 1


def test_who_asks_twice_at_once_for_an_answer_gets_it_twice():
    slow = Slow()
    desk = Desk(lambda head: (slow, {"n": 3}), hold=30.0)
    head = {"protocol": PROTOCOL, "incarnation": "i", "run": "r", "ticket": "t"}
    desk.answer({**head, "op": "open"}, b"")
    work, both, said = Future(), threading.Barrier(3), []
    desk.work["t"] = SimpleNamespace(result=lambda hold: (both.wait(60), work.result(hold))[1])
    asking = [threading.Thread(target=lambda: said.append(desk.answer({**head, "op": "fetch"}, b""))) for _ in range(2)]
    for thread in asking:
        thread.start()
    both.wait(60)
    work.set_result(({"boot": "b"}, b"done"))
    for thread in asking:
        thread.join(60)
    assert said == [({"boot": "b"}, b"done")] * 2


class Post:
    """A Grid of function calls: each node is a desk, which may be away; messages are real flwr records."""

    def __init__(self, desks):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.desks, self.away, self.answers, self.ops = desks, set(), {}, []

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            numbers.append(f"m{len(self.ops)}")
            node, (head, body) = message.metadata.dst_node_id, wire.from_record(message.content)
            self.ops.append(head["op"])
            if node not in self.away:
                threading.Thread(target=self._work, args=(numbers[-1], node, head, body), daemon=True).start()
        return numbers

    def _work(self, number, node, head, body):
        said = wire.to_record(*self.desks[node].answer(head, body))
        self.answers[number] = SimpleNamespace(content=said, has_error=lambda: False, metadata=SimpleNamespace(
            reply_to_message_id=number))

    def pull_messages(self, numbers):
        return [self.answers.pop(n) for n in list(numbers) if n in self.answers]


@pytest.fixture
def line():
    slow = Slow()
    post = Post({7: Desk(lambda head: (slow, {"n": 3}), hold=0.1)})
    link = FlowerLink(post, {"site-a": 7})
    link.call("site-a", {"op": "open", "protocol": PROTOCOL, "incarnation": "i", "run": "r"}, b"", 10)
    yield link, post, slow
    slow.go.set()
    link.close()


def once(condition, then):
    """`then()` on a thread, as soon as the condition holds."""
    threading.Thread(target=lambda: (until(condition, 60), then()), daemon=True).start()


def test_the_link_fetches_long_work_and_knows_that_the_site_lives(line, monkeypatch):
    link, post, slow = line
    monkeypatch.setattr(flower_link, "FRESH", 600.0)
    once(lambda: post.ops.count("fetch") >= 2, slow.go.set)
    _, body = link.call("site-a", {"op": "ask", "protocol": PROTOCOL}, bytearray(b"x" * 100), 20)
    assert bytes(body) == b"done" and post.ops.count("ask") == 1 and post.ops.count("fetch") >= 2
    before = len(post.ops)
    assert link.call("site-a", {"op": "probe", "protocol": PROTOCOL}, b"", 1)[0]["boot"] and len(post.ops) == before


def test_the_link_gives_up_at_the_deadline_and_when_nobody_waits(line):
    link, post, _ = line
    post.away.add(7)
    for seconds, over in ((0.3, None), (60, threading.Event())):
        started = time.monotonic()
        if over is not None:
            threading.Timer(0.3, over.set).start()
        with pytest.raises(Silence, match="no answer came in time"):
            link.call("site-a", {"op": "ask", "protocol": PROTOCOL}, b"", seconds, over)
        assert time.monotonic() - started < 40


def test_nothing_is_sent_to_a_barred_site_and_rounds_do_not_wait_for_it(line):
    link, post, slow = line
    barred = {}
    link.barred = barred.get
    sites = Sites(link, ["site-a"], Patience(every=0.1, grace=60.0))
    once(lambda: slow.asked, lambda: barred.update({"site-a": "it is suspended"}))
    started = time.monotonic()
    for _ in range(2):  # in the middle of its work, and then before it is asked
        with pytest.raises(Silence, match="it is suspended"):
            sites.ask("site-a", {"op": "ask", "protocol": PROTOCOL}, b"", 60.0)
    sent = len(post.ops)
    assert sites.probe("site-a") is None and len(post.ops) == sent and time.monotonic() - started < 50
    barred.clear()
    slow.go.set()
    assert bytes(sites.ask("site-a", {"op": "ask", "protocol": PROTOCOL}, b"", 20.0)[1]) == b"done"


def test_a_process_started_again_in_the_middle_of_work_is_said(line):
    link, post, slow = line
    once(lambda: slow.asked, lambda: post.desks.update({7: Desk(lambda head: (slow, {}), hold=0.1)}))
    with pytest.raises(Silence, match="was started again in the middle of its work"):
        link.call("site-a", {"op": "ask", "protocol": PROTOCOL}, b"", 60)


def test_a_suspended_site_may_come_back_and_a_revoked_one_may_not(tmp_path):
    made = new_flower_federation(tmp_path / "keys", ["site-a", "site-b"], "localhost", 9999)
    words = ["--federation", str(made.folder)]
    for what, why in (("suspend", "it is suspended"), ("restore", None), ("revoke", "it is struck off")):
        assert CliRunner().invoke(app, ["keys", what, "site-b", *words]).exit_code == 0
        assert made.barred("site-b") == why and made.barred("site-a") is None
    assert list(made.spec["sites"]) == ["site-a"] and not (made.folder / "kits" / "site-b").exists()
    with pytest.raises(RecipeError, match="not taken or revoked"):
        add_flower_sites(made.folder, ["site-b"])
    with pytest.raises(RecipeError, match=r"'site-b' is no site of .*; it has site-a"):
        made.suspend("site-b")


def test_keys_are_private_and_what_is_wrong_is_said(tmp_path):
    made = new_flower_federation(tmp_path / "keys", ["site-a"], "localhost", 9999)
    assert (made.kit("site-a") / "node.key").stat().st_mode & 0o77 == 0
    assert (made.folder / "server" / "server.key").stat().st_mode & 0o77 == 0
    add_flower_sites(made.folder, ["site-b"])
    assert list(made.spec["sites"]) == ["site-a", "site-b"]
    for name in ("site-a", "../up", "1a", ""):
        with pytest.raises(RecipeError, match="cannot be a new site's name"):
            add_flower_sites(made.folder, [name])
    with pytest.raises(RecipeError, match="already holds a federation"):
        new_flower_federation(tmp_path / "keys", ["site-c"])
    with pytest.raises(RecipeError, match=r"the kit .* was made for 'localhost:9999'"):
        join_flower("elsewhere:1", tmp_path, kit=made.kit("site-a"))
    (tmp_path / "flare").mkdir()
    (tmp_path / "flare" / "federation.yaml").write_text("host: localhost\nport: 1\nsites: [a]\n")
    with pytest.raises(RecipeError, match="holds keys for NVFlare"):
        _ = FlowerFederation(tmp_path / "flare").spec


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(280)
def test_a_real_run_has_the_simulations_digest(tmp_path, tiny_llama_folder):
    """SuperLink and 2 SuperNodes, TLS, node keys: the same state, bytes and scores; one model load; nothing left."""
    with flower_loopback(tmp_path, tiny_llama_folder, sites=("site-a", "site-b")) as rig, rig.serving_session():
        spec = rig.recipe("scaffold", **SGD)
        far = rig.run(spec)
        processes = rig.all_processes()
    here = run(spec, root=tmp_path / "here")
    assert far.engine == "flower" and far.state_digest == here.state_digest and far.bytes == here.bytes
    assert far.evaluation["clients"] == here.evaluation["clients"]
    assert [s["loads"] for s in json.loads((far.folder / "sites.json").read_text()).values()] == [1, 1]
    assert len(processes) >= 5 and not rig.all_processes()


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_llama_folder):
    with flower_loopback(tmp_path_factory.mktemp("flower"), tiny_llama_folder) as rig, rig.serving_session():
        yield rig


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", CASES)
def test_the_digest_is_the_simulations(rig, method):
    spec = rig.recipe(method, **CASES[method])
    here, far = run(spec, root=rig.folder / "here"), rig.run(spec)
    assert far.state_digest == here.state_digest and far.bytes == here.bytes
    assert all(s["loads"] == 1 for s in json.loads((far.folder / "sites.json").read_text()).values())


def missing(folder):
    return {e["client"] for e in events(folder, "missing")}


def beside(work):
    """`work(run folder)` on a thread while a run goes on; trouble is raised at the end."""
    trouble = []

    def go(*args):
        try:
            work(*args)
        except BaseException as error:
            trouble.append(error)

    return trouble, lambda *args: threading.Thread(target=go, args=args, daemon=True).start()


def newest(rig):
    return max((rig.folder / "far").iterdir(), key=lambda p: p.stat().st_mtime)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["supernode", "desk"])
def test_a_node_killed_in_mid_round_is_missed_by_the_deadline_and_taken_back(rig, part):
    """Flower says that a node is gone after 41 to 61 s; the round ends at its own deadline of 15 s."""
    spec = rig.recipe("fedavg", name=part, rounds=8, clients={"deadline": 15.0, "quorum": 2},
                      evaluate={"exact_match": False, "samples": 0, "clients": False},
                      local={"lr": 1e-2, "steps": 40, "batch_size": 4})
    began = time.time()

    def kill():
        folder = until(lambda: next((p for p in (rig.folder / "far").glob(f"{part}*") if events(p, "round")), None))
        time.sleep(0.3)
        os.kill(rig.part("site-c", part), signal.SIGKILL)
        until(lambda: missing(folder) or events(folder, "back") or events(folder, "reopened"), 100)

    trouble, start = beside(kill)
    start()
    far = rig.run(spec)
    assert not trouble and far.skipped == [] and time.time() - began < 300
    assert missing(far.folder) <= {"site-c"}
    assert missing(far.folder) or events(far.folder, "reopened")
    assert all(e["seconds"] < 25 for e in events(far.folder, "round"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_killed_at_work_under_fedbuff_blocks_nobody(rig):
    """Three are at work at a time, two answers make a step; nothing has a deadline."""
    spec = rig.recipe("fedbuff", name="async", rounds=20, knobs={"buffer_size": 2, "concurrency": 3},
                      evaluate={"exact_match": False, "samples": 0, "clients": False},
                      local={"lr": 1e-2, "steps": 20, "batch_size": 4})

    def kill():
        until(lambda: next((p for p in (rig.folder / "far").glob("async*") if events(p, "round")), None))
        os.kill(rig.part("site-c", "desk"), signal.SIGKILL)

    trouble, start = beside(kill)
    start()
    far = rig.run(spec)
    assert not trouble and far.skipped == [] and far.rounds == 20 and missing(far.folder) <= {"site-c"}
    assert sum(far.reports["FedBuff"]["answers"].values()) == 40
    assert all(e["seconds"] < 60 for e in events(far.folder, "round"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_is_suspended_and_restored_while_a_run_goes_on(rig):
    spec = rig.recipe("fedavg", name="barred", rounds=30, clients={"quorum": 2},
                      evaluate={"exact_match": False, "samples": 0, "clients": False})

    def bar():
        folder = until(lambda: next((p for p in (rig.folder / "far").glob("barred*") if events(p, "round")), None))
        rig.keys.suspend("site-c")
        until(lambda: "site-c" in missing(folder), 60)
        rig.keys.restore("site-c")

    trouble, start = beside(bar)
    start()
    far = rig.run(spec)
    assert not trouble and far.skipped == [] and missing(far.folder) == {"site-c"}
    assert any("it is suspended" in e["why"] for e in events(far.folder, "missing"))
    assert [e for e in events(far.folder, "back") if e["client"] == "site-c"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stranger_and_a_forbidden_method_are_refused(rig, tmp_path):
    strangers = new_flower_federation(tmp_path / "keys", ["site-x"], "localhost", rig.port)
    (strangers.kit("site-x") / "ca.crt").write_bytes((rig.keys.kit("site-a") / "ca.crt").read_bytes())
    words = [sys.executable, "-m", "fedllm.federation.flower.supernode", "--superlink", f"localhost:{rig.port}",
             "--root-certificates", str(strangers.kit("site-x") / "ca.crt"), "--auth-supernode-private-key",
             str(strangers.kit("site-x") / "node.key"), "--isolation", "process", "--host", "127.0.0.1", "--port", "0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, **wire.QUIET},
                          check=False)
    assert done.returncode != 0
    why = "site-c: .*the method is not on this site's allow-list"
    with rig.settings("site-c", methods=["fedkseed"]), pytest.raises(RunError, match=why):
        rig.run(rig.recipe("fedavg"))
