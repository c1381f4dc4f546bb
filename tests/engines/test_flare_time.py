"""Real time on far sites: virtual time's state where the order of answers is forced, and no wait without an end."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from evidence.rigs.time import quadratic_world
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import QuorumError
from fedllm.core.method import Method
from fedllm.core.payload import digest, pack, part
from fedllm.core.program import drive
from fedllm.engines.far.engine import Flare
from fedllm.engines.far.line import Patience, Silence
from fedllm.engines.far.site import SiteHost, SiteRun
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.engines.in_process import InProcess
from fedllm.federation.memory import DiskMemory
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.methods.registry import make_method
from fedllm.wire import codec

QUICK = Patience(answer=30.0, probe=0.2, every=0.05, grace=0.3, opening=5.0, revive=0.1)
SPEEDS = (0.53, 1.0, 1.71)


def world(speeds=SPEEDS):
    """Quadratics, one a client; every caller gets a model of its own, as processes have."""
    return quadratic_world(0, len(speeds), 0.5, np.asarray(speeds, float), steps=4)[0]


class Line:
    """Sites in this process; `hold(line, site, head, over)` is called with the answer made and not yet given."""

    def __init__(self, folder, method, speeds=SPEEDS, hold=lambda line, site, head, over: None):
        self.hold, self.hosts, self.said, self.lock = hold, {}, [], threading.Lock()
        self.dead = set()
        for info in world(speeds).infos():
            own = replace(world(speeds), fleet=None)
            self.hosts[info.id] = host = SiteHost(lambda head: None)
            host.run = SiteRun((method,), own, info, DiskMemory(folder / info.id, None))

    def call(self, site, head, body, seconds, over=None):
        if site in self.dead:
            raise Silence("nobody is there")
        got = self.hosts[site].answer(head, bytes(body))
        if head["op"] == "ask":
            self.said.append((site, got[0]))
            self.hold(self, site, head, over)
            if site in self.dead:
                raise Silence("nobody is there any longer")
        return got

    def revive(self, site):
        pass


class In:
    """Lets answers through in one order: each when those before it have been folded."""

    def __init__(self, order):
        self.turns, self.record = list(enumerate(order)), None

    def __call__(self, line, site, head, over):
        with line.lock:
            mine = next((i for i, s in self.turns if s == site), None)
            if mine is not None:
                self.turns.remove((mine, site))
        while mine is None or len(answered(self.record)) < mine:
            if over.is_set():
                raise Silence("nobody waits")
            time.sleep(0.002)


def answered(record):
    return [e["client"] for e in record.events if e["kind"] == "answered"]


def missing(engine):
    return {e["client"]: e["why"] for e in engine.record.events if e["kind"] == "missing"}


def far(line, method, speeds=SPEEDS):
    sites = Sites(line, list(line.hosts), QUICK)
    for name in line.hosts:
        sites.table[name].boot = sites.probe(name)
    return Flare((method,), replace(world(speeds), fleet=None), sites=sites)


def go(engine, method, rounds, state=None, first=0):
    state = method.init(engine.world.model) if state is None else state
    for t in range(first, first + rounds):
        engine.begin(t)
        try:
            state = drive(method.round(state, engine.world.infos()), engine)
            engine.commit()
        except QuorumError:
            engine.abandon()
    return state


@pytest.mark.parametrize("name, knobs", [
    ("fedbuff", {"buffer_size": 2, "concurrency": 3}), ("fedbuff", {"buffer_size": 5, "concurrency": 2}),
    ("fedasync", {"concurrency": 3}), ("stragglers", {"over": 1.5})])
def test_in_the_order_of_virtual_time_the_state_is_virtual_times(tmp_path, name, knobs):
    method = make_method(name, **knobs)
    here = InProcess((method,), world())
    want = go(here, method, 6)
    hold = In(answered(here.record))
    engine = far(Line(tmp_path, method, hold=hold), method)
    hold.record = engine.record
    got = go(engine, method, 6)
    assert digest(got) == digest(want) and answered(engine.record) == answered(here.record)
    for e in (here, engine):
        e.finish(6)
    ends = [Counter(e["client"] for e in x.record.events if e["kind"] == "unfinished") for x in (here, engine)]
    assert ends[0] == ends[1] and ("over" in knobs or sum(ends[0].values()) == knobs["concurrency"] - 1)
    assert engine.clock.flying == [] and engine.record.bytes["down", f"{type(method).__name__}.local"] == \
        here.record.bytes["down", f"{type(method).__name__}.local"]


@pytest.mark.parametrize("name, speeds, knobs", [("fedbuff", (1.0,), {"buffer_size": 3, "concurrency": 2}),
                                                 ("fedasync", SPEEDS, {"concurrency": 1})])
def test_with_one_at_work_at_a_time_nothing_need_be_forced(tmp_path, name, speeds, knobs):
    method = make_method(name, **knobs)
    want = go(InProcess((method,), world(speeds)), method, 5)
    engine = far(Line(tmp_path, method, speeds), method, speeds)
    assert digest(go(engine, method, 5)) == digest(want) and not missing(engine)


def test_an_answer_to_an_older_question_comes_with_its_version(tmp_path):
    """c000's first answer comes after the others' first six, before their seventh, and its second never."""
    method = make_method("fedbuff", buffer_size=2, concurrency=3)
    passed, slow, late = (threading.Event() for _ in range(3))
    passed.set()
    gates = {"c000": [slow], "others": [passed] * 6}

    def hold(line, site, head, over):
        with line.lock:
            mine = gates.get(site, gates["others"])
            gate = mine.pop() if mine else over if site == "c000" else late
        gate.wait(60)

    engine = far(Line(tmp_path, method, hold=hold), method)
    state = go(engine, method, 3)
    assert "c000" not in state["given"] and [t.client for t in engine.clock.flying].count("c000") == 1
    slow.set()
    until(lambda: next(t for t in engine.clock.flying if t.client == "c000").answer.done())
    late.set()
    state = go(engine, method, 1, state, 3)
    engine.finish(4)
    assert state["given"]["c000"] == 1 and state["ages"]["0003"] == 1


def until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_a_site_that_dies_in_flight_is_reported_and_blocks_nobody(tmp_path):
    method, deaths = make_method("fedbuff", buffer_size=3, concurrency=3), []

    def hold(line, site, head, over):
        if site == "c001" and not deaths:
            deaths.append(site)
            line.dead.add(site)

    line = Line(tmp_path, method, hold=hold)
    engine = far(line, method)
    began = time.monotonic()
    state = go(engine, method, 4)
    assert state["version"] == 4 and time.monotonic() - began < 100
    until(lambda: engine.sites.table["c001"].suspect)
    line.dead.clear()
    until(lambda: engine.clock.flying == [] or all(t.answer.done() for t in engine.clock.flying))
    state = go(engine, method, 3, state, 4)
    kinds = Counter(e["kind"] for e in engine.record.events if e.get("client") == "c001")
    assert "gone for 0.3 s" in missing(engine)["c001"] or "no sign of life" in missing(engine)["c001"]
    assert kinds["suspect"] == kinds["back"] == 1 and state["version"] == 7


class Endless(Method):
    """At c001 its work would take hours."""

    def round(self, state, clients):
        yield Ask(self.local, {c.id: pack(theta=state["theta"]) for c in clients}, enough=2)
        return state

    @on_client()
    def local(self, msg, client):
        for _ in range(10**7 if client.id == "c001" else 1):
            client.fit(part(msg, "theta"), steps=1)
        return pack(n=1)


def test_who_is_late_stops_in_the_middle_of_its_work(tmp_path):
    method = Endless()
    line = Line(tmp_path, method)
    engine = far(line, method)
    go(engine, method, 1)
    assert "2 answers were enough" in missing(engine)["c001"]
    until(lambda: ("c001", {"code": "given_up"}) in [(c, s.get("refused")) for c, s in line.said], 60)


def test_training_stops_between_two_steps():
    here, steps = world(), []

    def go_on():
        steps.append(1)
        if len(steps) == 3:
            raise InterruptedError

    rows = here.encoded("c000", "train")
    fit = Fit("c000", here.model, here.model.initial(), None, rows, [np.array([0])] * 9, here.local)
    with pytest.raises(InterruptedError):
        run_fits([fit], Limits(go_on=go_on))
    assert len(steps) == 3


class Tally(Method):
    """Counts in each client's memory how often it was asked."""

    deadline = None

    def init(self, model):
        return {"seen": {}}

    def round(self, state, clients):
        out = yield Ask(self.local, {c.id: pack(x=0) for c in clients}, enough=2, deadline=self.deadline)
        return {"seen": {c: r["times"] for c, r in out.items()}}

    @on_client()
    def local(self, msg, client):
        client.memory["times"] = client.memory.get("times", 0) + 1
        return pack(times=client.memory["times"])


def test_what_a_late_site_noted_does_not_count(tmp_path):
    held = threading.Event()

    def hold(line, site, head, over):
        if site == ("c002" if head["round"] == 0 else "c001"):
            while not over.is_set():
                time.sleep(0.01)
            held.set()
            raise Silence("nobody waits")

    method = Tally()
    engine = far(Line(tmp_path, method, hold=hold), method)
    assert go(engine, method, 1)["seen"] == {"c000": 1, "c001": 1}
    assert held.wait(60)
    assert go(engine, method, 1, first=1)["seen"] == {"c000": 2, "c002": 1}
    assert "2 answers were enough" in missing(engine)["c002"]


class Only:
    """Lets these (site, round, visit) answer, until `all` is set."""

    def __init__(self, *free):
        self.free, self.all = set(free), False

    def __call__(self, line, site, head, over):
        while not (self.all or over.is_set() or (site, head["round"], head["visit"]) in self.free):
            time.sleep(0.005)


DEADLINE = {"seconds": 60.0}


class Hurried(type(make_method("fedbuff"))):
    """FedBuff, whose asks have a deadline: a short one for a round that is to fail alone, since machines are busy."""

    def round(self, state, clients):
        program = super().round(state, clients)
        out = yield replace(next(program), deadline=DEADLINE["seconds"])
        try:
            program.send(out)
        except StopIteration as end:
            return end.value


Hurried.__name__ = "FedBuff"


def test_a_deadline_ends_a_round_and_who_began_in_it_begins_again(tmp_path, monkeypatch):
    monkeypatch.setitem(DEADLINE, "seconds", 0.7)
    method, hold = Hurried(buffer_size=2, concurrency=3), Only(("c000", 0, 1))
    engine = far(Line(tmp_path, method, hold=hold), method)
    began = time.monotonic()
    state = go(engine, method, 1)
    assert state["version"] == 0 and engine.clock.flying == [] and 0.7 <= time.monotonic() - began < 60
    assert {c for c, why in missing(engine).items() if "does not count" in why} == {"c000", "c001", "c002"}
    hold.all = True
    monkeypatch.setitem(DEADLINE, "seconds", 60.0)
    assert go(engine, method, 2, state, 1)["version"] == 2


def test_an_answer_that_landed_in_a_round_that_failed_lands_again(tmp_path, monkeypatch):
    """As in virtual time: what was under way when the last round was committed is under way again."""
    method, hold = Hurried(buffer_size=2, concurrency=3), Only(("c000", 0, 1), ("c001", 0, 1))
    engine = far(Line(tmp_path, method, hold=hold), method)
    state = go(engine, method, 1)
    assert state["version"] == 1
    trip = next(t for t in engine.clock.flying if t.client == "c002")
    hold.free.add(("c002", 0, 1))
    until(trip.answer.done)
    monkeypatch.setitem(DEADLINE, "seconds", 0.7)
    state = go(engine, method, 1, state, 1)
    monkeypatch.setitem(DEADLINE, "seconds", 60.0)
    assert state["version"] == 1 and trip in engine.clock.flying and answered(engine.record)[-1] == "c002"
    counted = len([e for e in engine.record.events if e["kind"] == "wire" and e["direction"] == "up"])
    hold.all = True
    state = go(engine, method, 1, state, 2)
    assert state["version"] == 2 and state["given"]["c002"] >= 1 and state["ages"]["0001"] >= 1
    assert answered(engine.record).count("c002") >= 2 and counted == 3  # its bytes were counted when it landed first
    ups = [e for e in engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    assert len(ups) == len(answered(engine.record)) - 1


def test_answers_asked_for_by_a_coordinator_that_was_killed_are_dropped(tmp_path):
    method, slow = make_method("fedbuff", buffer_size=2, concurrency=3), threading.Event()

    def hold(line, site, head, over):
        if site == "c000" and head["round"] == 0:
            slow.wait(20)

    line = Line(tmp_path, method, hold=hold)
    first = far(line, method)
    state = go(first, method, 2)
    memory = {c: dict(m) for c, m in first.memory.items()}
    second = far(line, method)  # and the first one never speaks again
    second.memory = memory
    state = go(second, method, 2, state, 2)
    assert "before the coordinator was started again" in missing(second)["c000"] and state["version"] == 4
    assert [e["client"] for e in second.record.events if e["kind"] == "missing"].count("c000") == 1
    slow.set()
    told = [f["by"] for f in second.memory["__global__"]["clock"]["flying"]]
    assert set(told) <= {second.sites.id}
    for engine in (first, second):
        engine.finish(4)


def test_a_site_stops_its_work_when_another_coordinator_opens_the_run(tmp_path):
    method, said = Endless(), []
    host = Line(tmp_path, method).hosts["c001"]
    head = {"op": "ask", "protocol": PROTOCOL, "phase": "Endless.local", "round": 0, "visit": 1, "attempt": "a",
            "stack": ["Endless"]}
    msg = codec.encode(pack(theta=world().model.initial()))
    work = threading.Thread(target=lambda: said.append(host.answer(head, msg)[0]), daemon=True)
    work.start()
    until(host._lock.locked)
    run = host.run
    host.open_run = lambda head: (run, {"n": 1})
    assert host.answer({"op": "open", "protocol": PROTOCOL, "incarnation": "new"}, b"")[0]["n"] == 1
    work.join(60)
    assert [s["refused"] for s in said] == [{"code": "given_up"}]


def test_a_call_that_is_given_up_ends_soon_and_the_site_is_not_suspect():
    class Busy:
        def call(self, site, head, body, seconds, over=None):
            if head["op"] != "ask":
                return {"boot": "b"}, b""
            ends.pop()()
            while not over.is_set():
                time.sleep(0.005)
            raise Silence("over")

        def revive(self, site):
            pass

    sites = Sites(Busy(), ["s"], QUICK)
    sites.table["s"].boot, over = "b", threading.Event()
    ends = [over.set, sites.hang_up]
    while ends:
        over.clear()
        with pytest.raises(Silence, match="it was given up"):
            sites.ask("s", {"op": "ask"}, b"", None, over)
        assert sites.table["s"].suspect is None
