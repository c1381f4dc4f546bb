"""The Academy engine over a real HTTP exchange: equal results, long payloads, no pickle, tokens, what is seen on the
way; (slow) sites as processes, one of which is killed."""

import asyncio
import base64
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pickle
import re
import signal
import threading
import time
import uuid

import httpx
import pytest
from typer.testing import CliRunner

if importlib.util.find_spec("academy") is None:
    pytest.skip("Academy is not installed (pip install 'fedlm[academy]')", allow_module_level=True)

from aiohttp import web

from fedllm.api import run
from fedllm.cli.main import app
from fedllm.core.errors import PayloadError, RecipeError, RunError
from fedllm.engines.far.desk import Desk
from fedllm.engines.far.line import Patience, Silence
from fedllm.engines.far.pieces import InPieces
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL
from fedllm.federation.academy import exchange as mailboxes
from fedllm.federation.academy.agent import CONFIG, JSON
from fedllm.federation.academy.join import join_academy
from fedllm.federation.academy.keys import AcademyFederation, add_academy_sites, new_academy_federation, token
from fedllm.federation.academy.link import AcademyLink
from fedllm.federation.academy.loopback import academy_loopback
from fedllm.federation.academy.serve import await_agents, carry_out_academy, serve_folder
from fedllm.federation.academy.site import attend
from fedllm.federation.academy.wire import SIZE, down, seal, unseal, up
from fedllm.federation.nvflare.loopback import events, until, write_rows
from fedllm.federation.process import free_port
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import of_sites
from fedllm.runs.resolved import versions

SGD = {"local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}}
SITES = ("site-a", "site-b")


def test_a_message_opens_for_whom_and_what_it_is_about_alone():
    key, body = os.urandom(32), os.urandom(1000)
    text = seal(key, down("a", "1"), {"op": "ask"}, body)
    head, got = unseal(key, down("a", "1"), text)
    assert head == {"op": "ask"} and bytes(got) == body and text.isascii()
    broken = base64.b64encode(b"x" + base64.b64decode(text)[1:]).decode()
    for other, about, said in ((os.urandom(32), down("a", "1"), text), (key, down("b", "1"), text),
                               (key, down("a", "2"), text), (key, up("a", "1"), text), (key, down("a", "1"), broken),
                               (key, down("a", "1"), ""), (key, down("a", "1"), "no base64"), (key, "", None),
                               (key, "x", seal(key, "x", {})[:-8]), (key, "x", 7)):
        with pytest.raises(PayloadError, match="none of ours"):
            unseal(other, about, said)


# -- agents of this process at an exchange of this process, over HTTPS -------------------------------------------------


class Rig:
    """An exchange and agents on a loop in a thread; `seen` is all that came to the exchange."""

    def __init__(self, folder, opener=lambda site: None):
        port = free_port()
        self.keys, self.seen, self.tasks = new_academy_federation(folder / "keys", SITES, "localhost", port), [], {}
        self.opener, self.loop = opener, asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.runner = self.do(mailboxes.begin(self.keys))
        self.link = AcademyLink(self.keys)

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def start(self, site):
        desk = Desk(self.opener(site), piece=SIZE)
        async def begin():
            return asyncio.create_task(attend(self.keys.kit(site), desk))

        self.tasks[site] = self.do(begin())

    def stop(self, site):
        """The agent is gone, and listens no more."""
        async def end(task):
            task.cancel()
            await asyncio.wait({task})

        self.do(end(self.tasks.pop(site)))

    def close(self):
        self.link.close()
        for site in list(self.tasks):
            self.stop(site)
        self.do(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def asked(self, method, path, who, **said):
        """A bare request with somebody's token."""
        ca = str(self.keys.folder / "server" / "ca.crt")
        head = {} if who is None else {"Authorization": f"Bearer {token(who)}"}
        with httpx.Client(verify=ca, trust_env=False) as client:
            return client.request(method, f"https://localhost:{self.keys.spec['port']}{path}", headers=head,
                                  content=json.dumps(said)).status_code


@pytest.fixture
def seen(monkeypatch):
    """All that comes to the exchange, written down before anybody else sees it."""
    found, door = [], mailboxes.door

    def wrapped(keys):
        inner = door(keys)

        @web.middleware
        async def look(request, handler):
            found.append(await request.read())
            return await inner(request, handler)

        return look

    monkeypatch.setattr(mailboxes, "door", wrapped)
    return found


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    for site in SITES:
        made.start(site)
    try:
        await_agents(made.link, SITES, 2, 120.0)
        yield made
    finally:
        made.close()


def echo(link, body, seconds=30.0):
    head = {"op": "echo", "protocol": PROTOCOL, "size": len(body)}
    return link.call("site-a", head, body, seconds)


def test_a_long_payload_arrives_intact_and_one_that_is_too_long_is_said(rig):
    for size in (0, 1000, SIZE, SIZE + 1, (3 << 20) + 17):
        body = os.urandom(size)
        head, got = echo(InPieces(rig.link, SIZE), body)
        assert bytes(got) == body and head["got"] == size
    with pytest.raises(Silence, match="Academy says: "):
        echo(rig.link, os.urandom(600 << 10))
    assert bytes(echo(rig.link, b"still here")[1]) == b"still here"


class Evil:
    """What runs where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled_at_a_site_nor_at_the_coordinator(rig, tmp_path):
    from academy.exception import DeserializationMethodProhibitedError
    from academy.exchange import HttpExchangeFactory
    from academy.exchange.cloud.client import HttpAgentRegistration
    from academy.identifier import AgentId
    from academy.message import ActionResponse, UserErrorResponse
    from academy.serialize import SerializationStrategy

    from fedllm.federation.academy.wire import trusting

    mark = tmp_path / "ran"
    assert pickle.loads(pickle.dumps(Evil(tmp_path / "trial"))) and (tmp_path / "trial").exists()
    handle = rig.link.handles["site-a"]

    async def pickled():
        handle.request_serializer = SerializationStrategy.PICKLE
        try:
            await asyncio.wait_for(handle.action("take", Evil(mark), "x"), 60)
        finally:
            handle.request_serializer = JSON

    with pytest.raises(Exception, match=r"DeserializationMethodProhibitedError"):
        rig.link._run(pickled()).result(90)
    assert CONFIG.allowed_deserializers == {JSON} and not mark.exists()
    rig.stop("site-b")

    async def answers(kind):
        factory = HttpExchangeFactory(
            f"https://localhost:{rig.keys.spec['port']}", retries=0,
            ssl_verify=trusting(rig.keys.kit("site-b") / "ca.crt"),
            additional_headers={"Authorization": f"Bearer {token(rig.keys.key('site-b'))}"})
        told = HttpAgentRegistration(agent_id=AgentId(uid=rig.keys.agents()["site-b"], name="site-b"))

        async def evil(request):
            body = kind(serialization=SerializationStrategy.PICKLE, **{
                "result" if kind is ActionResponse else "exception": Evil(mark)})
            await client.send(request.create_response(body))

        client = await factory.create_agent_client(told, evil)
        task = asyncio.create_task(client._listen_for_messages())
        return client, task

    for kind in (ActionResponse, UserErrorResponse):
        client, task = rig.do(answers(kind))
        with pytest.raises(Silence, match=DeserializationMethodProhibitedError.__name__):
            rig.link.call("site-b", {"op": "probe", "protocol": PROTOCOL}, b"", 60.0)
        rig.loop.call_soon_threadsafe(task.cancel)
        rig.do(client.close())
    assert not mark.exists()


def test_the_exchange_knows_its_callers_and_a_site_reaches_its_own_mailbox_alone(rig):
    a, b = rig.keys.key("site-a"), rig.keys.key("site-b")
    mine = {s: json.dumps({"uid": str(u), "name": s, "role": "agent"}) for s, u in rig.keys.agents().items()}
    for who in (None, os.urandom(32)):
        assert rig.asked("GET", "/mailbox/heartbeat", who, mailbox=mine["site-a"]) == 401
    assert rig.asked("GET", "/mailbox/heartbeat", a, mailbox=mine["site-a"]) == 200
    for method, path in (("GET", "/mailbox/heartbeat"), ("GET", "/mailbox/listen"), ("GET", "/message"),
                         ("DELETE", "/mailbox"), ("POST", "/mailbox"), ("GET", "/discover"),
                         ("POST", "/mailbox/share")):
        assert rig.asked(method, path, b, mailbox=mine["site-a"]) == 405, path
    assert rig.asked("DELETE", "/mailbox", a, mailbox=mine["site-a"]) == 405
    head = {"src": json.loads(mine["site-b"]), "dest": json.loads(mine["site-a"]), "tag": str(uuid.uuid4()),
            "kind": "request", "label": None}
    body = {"kind": "shutdown-request", "terminate": True}
    for change in ({}, {"kind": "response", "src": json.loads(mine["site-a"])}, {"kind": None}):
        assert rig.asked("PUT", "/message", b, message=json.dumps({"header": {**head, **change}, "body": body})) == 405
    assert rig.asked("PUT", "/message", b, message="[") == 405 and rig.asked("PUT", "/message", b) == 405
    rig.keys.suspend("site-a")
    assert rig.asked("GET", "/mailbox/heartbeat", a, mailbox=mine["site-a"]) == 401
    with pytest.raises(Silence, match="it is suspended"):
        echo(rig.link, b"x")
    rig.keys.restore("site-a")
    assert bytes(echo(rig.link, b"x")[1]) == b"x"


def test_a_question_that_is_not_the_coordinators_gets_nothing(rig):
    async def ask(number, text):
        return await asyncio.wait_for(rig.link.handles["site-a"].action("take", number, text), 60)

    key = rig.keys.key("site-a")
    good = seal(key, down("site-a", "n"), {"op": "probe", "protocol": PROTOCOL})
    assert unseal(key, up("site-a", "n"), rig.link._run(ask("n", good)).result(90))[0]["boot"]
    for number, text in (("m", good), ("n", seal(rig.keys.key("site-b"), down("site-a", "n"), {})), ("n", "x"),
                         (7, None), ("n", ["x"])):
        assert rig.link._run(ask(number, text)).result(90) == ""


def test_a_timeout_of_academys_own_is_silence_at_once():
    """Both are one class: it was taken for a wait that goes on, and looked at without a pause until the deadline."""
    asked, began = concurrent.futures.Future(), time.monotonic()
    asked.set_exception(TimeoutError())
    with pytest.raises(Silence, match="no answer came in time"):
        AcademyLink._await(None, asked, began + 100, None)
    assert time.monotonic() - began < 50


@pytest.fixture
def one_at_a_time(monkeypatch):
    """transformers cannot load two models at once in one process; real sites are processes."""
    lock, answer = threading.Lock(), SiteHost.answer

    def guarded(self, head, body):
        with contextlib.nullcontext() if head.get("op") == "probe" else lock:
            return answer(self, head, body)

    monkeypatch.setattr(SiteHost, "answer", guarded)


def test_fedavg_is_the_simulations_and_the_exchange_reads_nothing(tmp_path, tiny_llama_folder, seen, one_at_a_time):
    for k, site in enumerate(SITES):
        write_rows(tmp_path / "data" / f"{site}.jsonl", k, 12)
    spec = {"name": "academy", "model": tiny_llama_folder, "method": "fedavg", "space": {"name": "lora", "rank": 4},
            "rounds": 2, **SGD, "engine": "in_process", "evaluate": {"exact_match": False, "samples": 0},
            "data": {"source": str(tmp_path / "data"), "partition": {"kind": "per_file"}, "test": 0.0}}
    here = run(spec, root=tmp_path / "here")
    settings = {s: SiteSettings(data=str(tmp_path / "data" / f"{s}.jsonl"), store=str(tmp_path / "store" / s),
                                models=[tiny_llama_folder]) for s in SITES}
    made = Rig(tmp_path, lambda site: lambda head: open_run(head, site, settings[site]))
    try:
        for site in SITES:
            made.start(site)
        checked = of_sites({**spec, "engine": "academy"})
        path = RunFolder.create(tmp_path / "far", checked.model_dump(mode="json")).path
        far = carry_out_academy(made.keys, made.link, path, 2, 60.0)
    finally:
        made.close()
    assert far.engine == "academy" and far.state_digest == here.state_digest and far.bytes == here.bytes
    assert far.evaluation["clients"] == here.evaluation["clients"]
    words = [w.encode() for w in ("fedavg", "lora_", "local", "phase", "attempt", "green", "prompt")]
    texts = [b for message in seen for b in (message, *(
        base64.b64decode(t + b"=" * (-len(t) % 4)) for t in re.findall(rb"[A-Za-z0-9+/]{200,}", message)))]
    assert len(seen) > 20 and sum(map(len, seen)) > far.bytes["up"]
    assert not [w for w in words for t in texts if w in t]


def test_keys_are_private_and_what_is_wrong_is_said(tmp_path):
    runner = CliRunner()
    words = ["--federation", str(tmp_path / "keys")]
    assert runner.invoke(app, ["keys", "new", "site-a", "--engine", "academy", "--port", "9998", *words]).exit_code == 0
    assert runner.invoke(app, ["keys", "add", "site-b", *words]).exit_code == 0
    made = AcademyFederation(tmp_path / "keys")
    assert list(made.agents()) == ["site-a", "site-b"] and made.key("site-a") != made.key("site-b")
    own = made.folder / "server"
    secrets = [made.kit("site-a") / "site.key", own / "secret", own / "server.key", own / "sites" / "site-a"]
    assert not [p for p in secrets if p.stat().st_mode & 0o77]
    for what, why in (("suspend", "it is suspended"), ("restore", None), ("revoke", "it is struck off")):
        assert runner.invoke(app, ["keys", what, "site-b", *words]).exit_code == 0
        assert made.barred("site-b") == why and made.barred("site-a") is None
    for name in ("site-a", "site-b", "coordinator", "../up"):
        with pytest.raises(RecipeError, match="cannot be a new site's name"):
            add_academy_sites(made.folder, [name])
    with pytest.raises(RecipeError, match=r"the kit .* was made for 'localhost:9998'"):
        join_academy("elsewhere:1", tmp_path, kit=made.kit("site-a"))
    (tmp_path / "flare").mkdir()
    (tmp_path / "flare" / "federation.yaml").write_text("host: localhost\nport: 1\nsites: [a]\n")
    with pytest.raises(RecipeError, match="holds keys for NVFlare"):
        _ = AcademyFederation(tmp_path / "flare").spec


def test_nobody_there_is_said_in_time(tmp_path):
    with academy_loopback(tmp_path, join=False, sites=SITES) as rig:
        with pytest.raises(RunError, match=r"0 of 2 sites joined in 0\.5 s \(none\)"):
            serve_folder(rig.run_folder(rig.recipe("fedavg")), rig.keys.folder, wait=0.5)
        assert not rig.all_processes()


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_sites_are_processes_and_one_is_killed_and_back(tmp_path, tiny_llama_folder):
    """Three `fedllm join`: the simulation's digest; a killed one is reported and the round ends with the others; it is
    back in a later round; one that is killed while it may come back in time changes no bit."""
    with academy_loopback(tmp_path, tiny_llama_folder) as rig:
        with rig.serving_session():
            spec = rig.recipe("fedavg", **SGD)
            first, here = rig.run(spec), run(spec, root=tmp_path / "here")
            assert first.state_digest == here.state_digest and first.bytes == here.bytes
            assert [s["loads"] for s in json.loads((first.folder / "sites.json").read_text()).values()] == [1, 1, 1]
            killed_and_missing(rig)
            until(lambda: rig.agent("site-c"), 60)
            rig.keys.suspend("site-b")
            lone = rig.run(rig.recipe("fedavg", **SGD, rounds=1), needed=2)
            assert set(json.loads((lone.folder / "sites.json").read_text())) == {"site-a", "site-c"}
            rig.keys.restore("site-b")
        processes = {site: rig.agent(site) for site in rig.sites}
        with rig.serving_session():  # another exchange, the same processes
            again = rig.run(rig.recipe("fedavg", **SGD))
            assert again.state_digest == first.state_digest
            assert {site: rig.agent(site) for site in rig.sites} == processes
            killed_and_in_time(rig, tmp_path)
    assert not rig.all_processes()


def beside(rig, work, known):
    """`work(run folder)` on a thread while a run goes on; what went wrong is in the list."""
    trouble = []

    def go():
        try:
            work(until(lambda: next((p for p in (rig.folder / "far").glob("*") if p not in known), None)))
        except BaseException as error:
            trouble.append(error)

    threading.Thread(target=go, daemon=True).start()
    return trouble


def killed_and_missing(rig):
    """Rounds end without the killed site, and say so; it is taken back when its process lives again."""
    def kill(path):
        until(lambda: len(events(path, "round")) >= 1)
        os.kill(rig.agent("site-c"), signal.SIGKILL)

    known = set((rig.folder / "far").glob("*"))
    trouble, began = beside(rig, kill, known), time.monotonic()
    done = rig.run(rig.recipe("fedavg", **SGD, rounds=14, clients={"quorum": 2}),
                   patience=Patience(opening=200.0, probe=2.0, every=1.0, grace=2.0))
    assert not trouble and done.rounds == 14 and time.monotonic() - began < 200
    gone = [e for e in events(done.folder, "missing")]
    assert gone and {e["client"] for e in gone} == {"site-c"}
    assert {e["client"] for e in events(done.folder, "suspect")} == {"site-c"}


def killed_and_in_time(rig, tmp_path):
    """A site that dies and is back in time changes no bit."""
    def kill(path):
        until(lambda: len(events(path, "round")) >= 1)
        os.kill(rig.agent("site-a"), signal.SIGKILL)

    spec, known = rig.recipe("fedavg", **SGD, rounds=4), set((rig.folder / "far").glob("*"))
    trouble = beside(rig, kill, known)
    far = rig.run(spec, patience=Patience(opening=200.0, probe=3.0, every=1.0, grace=200.0))
    assert not trouble and far.state_digest == run(spec, root=tmp_path / "again").state_digest
    assert [e["client"] for e in events(far.folder, "reopened")] == ["site-a"]
    assert not events(far.folder, "missing")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_questions_are_answered_after_the_rounds(tmp_path, tiny_bert_folder):
    pytest.importorskip("bm25s")
    port = free_port()
    with academy_loopback(tmp_path, tiny_bert_folder, join=False, sites=SITES) as rig:
        gate = {"copies": "report", "personal": "report", "encoder": "off"}
        rig.policy.write_text(json.dumps({"text_leaves": True, "gate": gate}))
        for site, text in zip(SITES, ("the court hears appeals on monday", "the ward opens at nine"), strict=True):
            (tmp_path / "docs" / site).mkdir(parents=True)
            (tmp_path / "docs" / site / "0.txt").write_text(text)
            rig.join(site, "--data", str(tmp_path / "docs" / site))
        checked = of_sites({"name": "rag", "model": tiny_bert_folder, "method": {"name": "fed_rag", "wait": 60.0},
                            "rounds": 1, "data": {"task": "documents"}, "engine": "academy",
                            "layers": [{"name": "responsible_gate", **gate}], "evaluate": {"clients": False}})
        path = RunFolder.create(tmp_path / "rag", {**checked.model_dump(mode="json"), "versions": versions()}).path
        serving = rig.serve(path, "--ask", str(port))
        until(lambda: (path / "asking.json").exists() or serving.poll() is not None, 300, "questions can be asked")
        got = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", timeout=120, trust_env=False,
                         json={"messages": [{"role": "user", "content": "when does the ward open"}]}).json()
        said = got["fedllm"]
        assert [(s["text"], s["sites"]) for s in got["sources"]] == [("the ward opens at nine", ["site-b"])], got
        assert said["rests_on"] == ["site-b"] and said["asked"] == list(SITES) and not said["missing"], got
        serving.terminate()
        assert serving.wait(60) is not None and not (path / "asking.json").exists()
    assert not rig.all_processes()
