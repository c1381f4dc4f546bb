"""Questions to real sites' halves over a line that fails: no answer hangs, and each says which sites it rests on."""

import json
import logging
import random
import socket
import struct
import threading
import time

import httpx
import pytest

from fedllm.core.errors import EndpointError, RecipeError, RunError
from fedllm.engines.far.line import Patience, Silence
from fedllm.engines.far.site import SiteHost
from fedllm.federation import answering as service
from fedllm.federation.answering import AskServer, Desk
from fedllm.federation.coordinator import drive_run
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.opening import for_sites
from fedllm.federation.serve import may_answer
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.report.compliance import compliance
from fedllm.runs.asked_far import FarSession
from fedllm.runs.folder import RunFolder
from fedllm.runs.openai_api import running
from fedllm.runs.recipe import load_recipe
from tests.cli.test_cli import call

pytest.importorskip("bm25s")
log = logging.getLogger(__name__)
DOCS = {"site-a": ["the court hears appeals on monday", "a clerk signs every invoice"],
        "site-b": ["the ward opens at nine", "invoices above ten are signed by the manager"],
        "site-c": ["buses leave the north station", "the east line is closed on sunday"], "site-d": ["!!!", "..."]}
QUESTIONS = ("who signs an invoice", "when does the ward open", "where do buses leave", "is the line closed",
             "when are appeals heard", "ሰላም የት ነው")
QUICK = Patience(answer=20.0, probe=0.2, every=0.05, grace=0.3, opening=60.0, revive=0.1)
WAIT, LATE = 0.2, 2.0
"""Seconds that a question may take where sites fall silent, and that a late site takes."""
GATE = {"copies": "report", "encoder": "off"}
"""Sending passages is what these sites are there for."""


class Line:
    """Sites in this process, of which each may be dead (no sign of life) or late (an answer after the deadline)."""

    def __init__(self, folder, **settings):
        self.state, self.boots, self.hosts = dict.fromkeys(DOCS, "here"), {}, {}
        self.settings = {s: SiteSettings(data=str(folder / "data" / s), store=str(folder / "store" / s),
                                         **{"text_leaves": True, "gate": GATE, "models": [str(folder)],
                                            **settings.get(s, {})})
                         for s in DOCS}
        for site in DOCS:
            self.start(site)

    def start(self, site):
        self.hosts[site] = SiteHost(lambda head: open_run(head, site, self.settings[site]))
        self.boots[site] = f"{site}-{time.monotonic()}"

    def call(self, site, head, body, seconds, over=None):
        if self.state[site] == "dead":
            raise Silence("nobody there")
        if self.state[site] == "late" and head["op"] == "ask":
            threading.Event().wait(LATE)
        said, data = self.hosts[site].answer(json.loads(json.dumps(head)), bytes(body))
        said = json.loads(json.dumps(said))
        return {**said, "boot": self.boots[site]} if "boot" in said else said, data

    def revive(self, site):
        pass


@pytest.fixture
def far(tmp_path, tiny_bert_folder):
    for site, texts in DOCS.items():
        (tmp_path / "data" / site).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "data" / site / f"{i}.txt").write_text(text)

    def make(then, settings=None, **knobs):
        spec = {"name": "rag", "model": tiny_bert_folder, "method": {"name": "fed_rag", **{"wait": 60.0, **knobs}},
                "rounds": 1, "data": {"source": str(tmp_path / "data"), "task": "documents"},
                "layers": [{"name": "responsible_gate", **GATE}], "evaluate": {"clients": False},
                "engine": "in_process"}
        line = Line(tmp_path, **{s: {"models": [tiny_bert_folder], **(settings or {}).get(s, {})} for s in DOCS})
        folder = tmp_path / "far"
        if not folder.exists():
            RunFolder.create(folder, load_recipe(spec).model_dump(mode="json"))
        said = []
        drive_run(folder, line, list(DOCS), patience=QUICK, after=lambda answering: said.append(then(answering, line)))
        return said[0]

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """transformers cannot load two models at once in one process; real sites are processes."""
    lock, opened = threading.Lock(), SiteHost._open

    def one_by_one(self, head):
        with lock:
            return opened(self, head)

    monkeypatch.setattr(SiteHost, "_open", one_by_one)
    monkeypatch.setattr(service, "HEAL", 0.05)


def ask_many(answering, line, count, seed=0):
    """So many questions, while sites die, come back as new processes, and answer late."""
    rng, out = random.Random(seed), []
    with answering.healing():
        for i in range(count):
            if i % 8 == 4:
                site, state = rng.choice(list(DOCS)), rng.choice(("dead", "late", "here"))
                if line.state[site] == "dead" and state != "dead":
                    line.start(site)
                line.state[site] = state
            before, began = dict(line.state), time.monotonic()
            out.append((answering.ask(QUESTIONS[i % len(QUESTIONS)]), before, time.monotonic() - began))
        line.state.update(dict.fromkeys(DOCS, "here"))
        ends = time.monotonic() + 60
        while any(s.suspect for s in answering.sites.table.values()) and time.monotonic() < ends:
            time.sleep(0.05)
        return out, next(got for got in (answering.ask(QUESTIONS[0]) for _ in range(50)) if not got.missing)


def held(out, last):
    for got, state, seconds in out:
        assert seconds < WAIT + 30 and set(got.clients) <= set(got.said["asked"])
        assert set(got.clients) == {c for p in got.said["passages"] for c in p["clients"]}
        assert all(state[c] != "dead" for c in got.clients)
        assert {c for c, s in state.items() if s != "here"} <= set(got.missing)
        assert (got.answer is None) == (not got.clients)
    assert not last.missing and last.clients and len(last.said["asked"]) == len(DOCS)


def test_sites_that_die_come_back_and_answer_late(far, tmp_path):
    out, last = far(lambda answering, line: ask_many(answering, line, 24), wait=WAIT)
    held(out, last)
    assert any(got.missing for got, _, _ in out) and any(not got.missing for got, _, _ in out)
    assert all(got.answer is None for got, _, _ in out[5::6])  # a language of which no index holds a word
    notes = [json.loads(x) for x in (tmp_path / "far" / "questions.jsonl").read_text().splitlines()]
    assert len(notes) == 25 and [tuple(n["rests"]) for n in notes[:24]] == [got.clients for got, _, _ in out]
    assert not any(q in json.dumps(notes, ensure_ascii=False) for q in QUESTIONS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_hundred_questions(far):
    out, last = far(lambda answering, line: ask_many(answering, line, 500, seed=1), wait=WAIT)
    held(out, last)
    slow = sorted(s for _, _, s in out)
    log.warning("%d of 500 with a site missing; median %.3f s, longest %.3f s", sum(bool(g.missing) for g, _, _ in out),
                slow[250], slow[-1])


def served(answering, line, **body):
    """One question over HTTP, and what the API says of itself."""
    server = AskServer(answering, "rag", Desk(port=0))
    with running(server):
        base = server.base_url
        post = lambda doc, **more: httpx.post(f"{base}/chat/completions", json=doc, **more)  # noqa: E731
        question = {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
        got = FarSession(base, 60.0).ask(QUESTIONS[0])
        unknown = post({"messages": [{"role": "user", "content": QUESTIONS[-1]}]}).json()
        streamed = post({**question, "stream": True})
        parts = post({"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}], "n": None})
        refusals = [post({"messages": []}).status_code, post({"messages": [{"role": "system", "content": "x"}]}
                                                             ).status_code,
                    httpx.post(f"{base}/completions", json={"prompt": "x"}).status_code,
                    httpx.post(f"{base}/chat/completions", content=json.dumps(question),
                               headers={"Content-Type": "text/plain"}).status_code,
                    post(question, headers={"Host": "elsewhere.example:80"}).status_code,
                    *(ask_raw(base, body) for body in (b"[" * 100_000, b'{"messages": [{"role": "user", "content": '
                                                       b'"ward \\ud83d"}]}')),
                    post({"messages": [{"role": "user", "content": "ward " * 5000}]}).status_code,
                    post({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).status_code]
        assert parts.json()["choices"] == post(question).json()["choices"]
        hang_up(server, json.dumps(question).encode())
        page = httpx.get(base.removesuffix("/v1") + "/")
        health = httpx.get(base.removesuffix("/v1") + "/health").json()
        models = httpx.get(f"{base}/models").json()
        return got, post(question).json(), unknown, streamed, refusals, page, health, models, base


def ask_raw(base, body):
    return httpx.post(f"{base}/chat/completions", content=body, headers={"Content-Type": "application/json"}
                      ).status_code


def hang_up(server, body):
    """Whoever asked is gone before the answer: with a reset, which no traceback tells."""
    with socket.create_connection(server.server_address) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n" % len(body) + body)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.2)


def test_the_api_before_it(far, capsys):
    def then(answering, line):
        server = AskServer(answering, "rag", Desk(port=0))
        with running(server):
            shown = call(capsys, "ask", server.base_url.removesuffix("/v1"), QUESTIONS[0])
            wrong = call(capsys, "ask", server.base_url, QUESTIONS[0], "--set", "method.top_k=1")
        return served(answering, line), shown, wrong

    (got, doc, unknown, streamed, refusals, page, health, models, base), shown, wrong = far(then)
    assert got.answer == "a clerk signs every invoice [1]" and got.clients == ("site-a",)
    assert got.said["passages"][0]["id"] == "1.txt" and got.said["cited"] == [1] and not got.missing
    assert doc["choices"][0]["message"]["content"] == got.answer and doc["sources"][0]["sites"] == ["site-a"]
    assert doc["fedllm"]["writing_seconds"] == 0 and set(doc["fedllm"]["asked"]) == set(DOCS)
    assert unknown["choices"][0]["message"]["content"].startswith("No document of the sites that answered matches")
    chunks = [json.loads(x[6:]) for x in streamed.text.split("\n\n") if x.startswith("data: {")]
    assert chunks[0]["choices"][0]["delta"]["content"] == got.answer and streamed.text.endswith("[DONE]\n\n")
    assert refusals == [400, 400, 404, 415, 403, 400, 400, 400, 400]
    assert "Traceback" not in capsys.readouterr().err
    assert page.status_code == 200 and "Ask the federation" in page.text and models["data"][0]["id"] == "rag"
    assert health["sites"] == dict.fromkeys(DOCS, "here")
    assert shown[0] == 0 and "[1] site-a: 1.txt: a clerk signs every invoice" in shown[1]
    assert "rests on site-a" in shown[1]
    assert wrong[0] == 2 and "--set is for a recipe" in wrong[2]
    with pytest.raises(EndpointError, match="nobody answers there"):
        FarSession(base, 2.0).ask("anybody there?")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://x\0y"])
def test_what_is_no_address(url):
    with pytest.raises(RecipeError, match="is no address"):
        FarSession(url, 2.0)


def test_a_question_to_who_never_ends_is_given_up(monkeypatch):
    monkeypatch.setenv("K", "k\u00e9y")
    with pytest.raises(RecipeError, match="no HTTP header can carry"):
        FarSession("http://127.0.0.1:1", 2.0, "K")
    with socket.create_server(("127.0.0.1", 0)) as there, pytest.raises(EndpointError, match="ReadTimeout"):
        FarSession(f"http://127.0.0.1:{there.getsockname()[1]}", 0.3).ask("anybody there?")


def test_a_finished_run_is_served_again_with_the_documents_as_they_are(far, tmp_path):
    first = far(lambda answering, line: answering.ask("when is the new rule in force"))
    (tmp_path / "data" / "site-b" / "9.txt").write_text("the new rule is in force in may")
    again = far(lambda answering, line: answering.ask("when is the new rule in force"))
    assert "new rule" not in str(first.answer) and again.answer == "the new rule is in force in may [1]"


def test_a_site_that_lets_no_text_leave_answers_with_scores(far):
    numbers = {"text_leaves": False, "profile": {"shares": "scores"}}
    got = far(lambda answering, line: answering.ask("who signs an invoice"), {"site-a": numbers})
    assert "site-a" in got.clients or "site-b" in got.clients
    mine = [p for p in got.said["passages"] if "site-a" in p["clients"]]
    assert got.said["asked"] == tuple(DOCS) and all(p["id"].startswith("site-a/") and not p["text"] for p in mine)


def test_what_left_for_questions_stands_in_the_compliance_report(far, tmp_path):
    """As what leaves in rounds does: who, what, by which rule; never the words of question or passage."""
    def then(answering, line):
        answering.ask(QUESTIONS[0])
        line.settings["site-b"] = line.settings["site-b"].model_copy(update={"gate": {**GATE, "copies": "withhold"}})
        line.start("site-b")
        return answering.ask(QUESTIONS[0])

    got = far(then)
    found = compliance(tmp_path / "far")
    assert ("site-a", "FedRAG.lookup", "texts", "report") in {(p.client, p.phase, p.key, p.done) for p in found.pieces}
    assert len(found.rules) == 1 and found.demands["copies"] == "report" and not found.silent
    own = compliance(tmp_path / "store" / "site-a")
    assert {p.sha for p in own.pieces} == {p.sha for p in found.pieces if p.client == "site-a"}
    assert "clerk" not in (tmp_path / "far" / "questions.jsonl").read_text() and "site-a" in got.clients


def test_where_nobody_is_there_the_answer_says_so(far):
    def then(answering, line):
        line.state.update(dict.fromkeys(DOCS, "dead"))
        return [answering.ask(QUESTIONS[0]) for _ in range(2)]

    for got in far(then, wait=WAIT):
        assert got.answer is None and set(got.missing) == set(DOCS) and got.seconds < WAIT + 30
        assert "site-a, site-b, site-c, site-d did not answer" in service.nothing(got)


def test_a_site_keeps_to_its_own_budget_of_queries(far, tmp_path):
    got = far(lambda answering, line: [answering.ask(q) for q in QUESTIONS[:3]], {"site-a": {"most_queries": 2}})
    assert [("site-a" in g.missing) for g in got] == [False, False, True]
    assert got[2].missing["site-a"] == "refused by the site: one more answer would pass its own number of queries"
    assert SiteLedger(tmp_path / "store" / "site-a").read()["queries"] == 2 and got[2].said["asked"] == tuple(DOCS)


def test_counts_are_booked_in_the_sites_own_ledger(far, tmp_path):
    """A budget of privacy admits counts without a layer, and ends them; text and scores it does not admit."""
    mine = {"text_leaves": False, "profile": {"shares": "counts"}, "most_epsilon": 2.0, "tests_leave": True}
    got = far(lambda answering, line: [answering.ask(QUESTIONS[i % 3]) for i in range(6)], {"site-a": mine},
              noise_multiplier=4.0)
    silent = ["site-a" in g.missing for g in got]
    assert silent[0] is False and silent[-1] is True and silent == sorted(silent)
    assert "pass its own budget" in got[-1].missing["site-a"]
    spent = SiteLedger(tmp_path / "store" / "site-a").epsilon(1e-5)
    assert 1.0 < spent <= 2.0 and all("site-a" not in g.clients for g in got)


def test_noise_that_protects_nobody_is_refused(far):
    mine = {"text_leaves": False, "profile": {"shares": "counts"}, "most_epsilon": 2.0, "least_noise": 1.0}
    with pytest.raises(RunError, match="site-a: refused by the site: a layer's noise is seeded, too small"):
        far(lambda answering, line: None, {"site-a": mine}, noise_multiplier=0.5)


def test_who_may_be_asked_and_where():
    with pytest.raises(RecipeError, match="'fedavg' trains a model and answers no questions"):
        may_answer(load_recipe({"method": "fedavg"}))
    with pytest.raises(RecipeError, match=r"--ask '0\.0\.0\.0:80': anybody who reaches 0\.0\.0\.0"):
        Desk.at("0.0.0.0:80")
    with pytest.raises(RecipeError, match="allowed is PORT or HOST:PORT"):
        Desk.at("localhost:x")
    assert Desk.at("8600").url == "http://127.0.0.1:8600" and Desk.at("0.0.0.0:80", "KEY").key_env == "KEY"
    spec = load_recipe({"model": "minilm", "method": {"name": "fed_rag", "writer": "w"},
                        "models": {"w": {"endpoint": {"base_url": "http://127.0.0.1:1/v1"}}, "e": "minilm"}})
    assert set(for_sites(spec)["models"]) == {"e"}  # whom the server alone asks no site hears of


def test_a_question_in_the_way_is_not_waited_for_for_ever(far):
    def then(answering, line):
        answering.timeout = 0.1
        answering._turn.acquire()
        with pytest.raises(RunError, match=r"longer than timeout = 0\.1 s"):
            answering.ask("x")
        return True

    assert far(then)
