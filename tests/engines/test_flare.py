"""The engine of real federations over a line made of function calls: equal results, refusals, restarts, memory."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedllm.api import run
from fedllm.core.errors import DidNothing, FedLLMError, PayloadError, RunError
from fedllm.core.payload import pack
from fedllm.engines.far.door import Door
from fedllm.engines.far.line import Patience, Silence
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.federation.coordinator import drive_run
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.memory import DiskMemory
from fedllm.federation.nvflare.serve import ServerGone, _follow
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe
from fedllm.runs.resolved import versions
from fedllm.wire import codec

SITES = ("site-a", "site-b", "site-c")
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "good"]
QUICK = Patience(answer=200.0, probe=0.2, every=0.05, grace=0.3, opening=200.0, revive=0.1)


class Line:
    """Sites in this process; everything crosses as JSON and bytes. `trouble(site, head)` may raise or change things."""

    def __init__(self, folder, model, trouble=lambda line, site, head, body: None, **settings):
        self.folder, self.trouble, self.revived = folder, trouble, []
        self.settings = {s: SiteSettings(data=str(folder / "data" / f"{s}.jsonl"), store=str(folder / "store" / s),
                                         models=[model], **settings) for s in SITES}
        self.hosts = {}
        for site in SITES:
            self.start(site)

    def start(self, site):
        self.hosts[site] = SiteHost(lambda head: open_run(head, site, self.settings[site]))
        self.boots = {**self.__dict__.get("boots", {}), site: f"{site}-{time.monotonic()}"}

    def call(self, site, head, body, seconds, over=None):
        self.trouble(self, site, head, bytes(body))
        said, data = self.hosts[site].answer(json.loads(json.dumps(head)), bytes(body))
        said = json.loads(json.dumps(said))
        return {**said, "boot": self.boots[site]} if "boot" in said else said, data

    def revive(self, site):
        self.revived.append(site)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for k, (site, n) in enumerate(zip(SITES, (12, 15, 9), strict=True)):
        rows = [{"prompt": " ".join(WORDS[(i + j * (k + 2)) % 14] for j in range(3 + i % 4)),
                 "response": WORDS[(i + k) % 14]} for i in range(n)]
        (tmp_path / "data" / f"{site}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def recipe(folder, model, method="fedavg", **more):
    name = method if isinstance(method, str) else method["name"]
    return {"name": name, "model": model, "method": method, "space": {"name": "lora", "rank": 2}, "rounds": 2,
            "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}, "engine": "in_process",
            "data": {"source": str(folder / "data"), "partition": {"kind": "per_file"}, "test": 0.0},
            "evaluate": {"exact_match": False, "samples": 0}, **more}


def far_folder(folder, spec, name="far"):
    return RunFolder.create(folder / name, load_recipe(spec).model_dump(mode="json")).path


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """transformers cannot load two models at once in one process; real sites are processes."""
    import threading

    lock, answer = threading.Lock(), SiteHost.answer

    def guarded(self, head, body):
        if head.get("op") == "probe":
            return answer(self, head, body)
        with lock:
            return answer(self, head, body)

    monkeypatch.setattr(SiteHost, "answer", guarded)


ALONE = {"concurrency": 1}
"""One site at work at a time: who answers next is known, in virtual time and in real time."""


@pytest.mark.parametrize("method", [
    "fedavg", "scaffold", "fed_sp_sc", {"name": "fedbuff", "buffer_size": 2, **ALONE}, {"name": "fedasync", **ALONE}],
    ids=["fedavg", "scaffold", "fed_sp_sc", "fedbuff", "fedasync"])
def test_the_result_is_the_simulations(data, tiny_llama_folder, method):
    spec = recipe(data, tiny_llama_folder, method, rounds=1 if method == "fed_sp_sc" else 2)
    if method == "fed_sp_sc":
        spec["layers"] = [{"name": "responsible_gate", "copies": "report", "encoder": "off"}]
    here = run(spec, root=data / "runs")
    line = Line(data, tiny_llama_folder, text_leaves=method == "fed_sp_sc", gate={"copies": "report"})
    far = drive_run(far_folder(data, spec), line, SITES, patience=QUICK)
    assert far.state_digest == here.state_digest
    assert far.bytes == here.bytes
    assert far.evaluation["clients"] == here.evaluation["clients"]


def test_sites_judge_their_rows_by_the_recipes_metrics(data, tiny_llama_folder):
    """Over the line as in the simulation, options included; a function of one's own where every site names it."""
    for path in (data / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**r, "choices": WORDS[:14]}) + "\n" for r in rows))
    told = {"metric": ["rouge", "choice", "call:operator:ne"], "max_new_tokens": 2, "samples": 0}
    spec = recipe(data, tiny_llama_folder, rounds=1, evaluate=told) | {"name": "judged"}
    spec["data"]["client_test"] = 0.3
    here = run(spec, root=data / "runs")
    line = Line(data, tiny_llama_folder, metrics=["operator:ne"])
    far = drive_run(far_folder(data, spec), line, SITES, patience=QUICK)
    assert far.evaluation["clients"] == here.evaluation["clients"] and far.state_digest == here.state_digest
    assert {"rouge_l", "choice_likelihood", "judged"} <= far.evaluation["clients"]["site-b"].keys()


def test_a_coordinator_killed_with_answers_under_way_goes_on_without_them(data, tiny_llama_folder):
    """The slow site's answer to the killed coordinator is refused; it stops, and answers the next question."""
    spec = recipe(data, tiny_llama_folder, {"name": "fedbuff", "buffer_size": 2, "concurrency": 3}, rounds=5)
    shots = []

    def trouble(line, site, head, body):
        if head["op"] == "ask" and "local" in head["phase"] and site == "site-c" and not shots:
            raise _wait(shots)
        if head["op"] == "ask" and head["round"] == 2 and not shots:
            shots.append(site)
            raise KeyboardInterrupt

    path, line = far_folder(data, spec, "shot"), Line(data, tiny_llama_folder, trouble)
    with pytest.raises(KeyboardInterrupt):
        drive_run(path, line, SITES, patience=QUICK)
    began = time.monotonic()
    far = drive_run(path, line, SITES, patience=QUICK)
    events = [json.loads(x) for x in (path / "events.jsonl").read_text().splitlines()]
    gone = [e for e in events if e["kind"] == "missing"]
    assert "site-c" in {e["client"] for e in gone} and len(gone) <= 2  # two may be under way when a round ends
    assert all("before the coordinator was started again" in e["why"] for e in gone)
    assert far.rounds == 5 and far.skipped == [] and time.monotonic() - began < 100
    assert sum(far.reports["FedBuff"]["answers"].values()) == 10
    assert [e["client"] for e in events if e["kind"] == "unfinished"]
    assert any("who answers first" in e["why"] for e in events if e["kind"] == "caution")


def _wait(shots):
    ends = time.monotonic() + 60
    while not shots and time.monotonic() < ends:
        time.sleep(0.02)
    return Silence("the coordinator is gone")


@pytest.mark.slow
def test_a_site_started_again_in_mid_round_gives_the_same_answers(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder, "scaffold", rounds=3)
    undisturbed = drive_run(far_folder(data, spec, "calm"), Line(data, tiny_llama_folder), SITES, patience=QUICK)
    hits = []

    def restart(line, site, head, body):
        if head["op"] == "ask" and head["round"] == 1 and site == "site-b" and "local" in head["phase"] and not hits:
            hits.append(site)
            line.hosts[site].answer(head, body)  # it may even have worked, and the answer was lost
            line.start(site)
            raise Silence("the connection broke")

    far = drive_run(far_folder(data, spec, "far2"), Line(data, tiny_llama_folder, restart), SITES, patience=QUICK)
    assert hits and "missing" not in (far.folder / "events.jsonl").read_text()
    assert far.state_digest == undisturbed.state_digest


@pytest.mark.slow
def test_a_coordinator_killed_before_the_sites_heard_that_a_round_counted(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder, "scaffold", rounds=3)
    undisturbed = drive_run(far_folder(data, spec, "calm"), Line(data, tiny_llama_folder), SITES, patience=QUICK)
    shots = []

    def kill(line, site, head, body):
        if head["op"] == "ask" and head["round"] == 2 and len(shots) < 3:
            shots.append(head["settled"])
            raise KeyboardInterrupt

    path, line = far_folder(data, spec, "shot"), Line(data, tiny_llama_folder, kill)
    with pytest.raises(KeyboardInterrupt):
        drive_run(path, line, SITES, patience=QUICK)
    assert shots and shots[0]  # the news that round 1 counted was on its way
    shots.extend([None] * 3)
    for site in SITES:
        line.start(site)
    assert drive_run(path, line, SITES, patience=QUICK).state_digest == undisturbed.state_digest


def test_a_dead_site_is_missing_suspect_and_taken_back(data, tiny_llama_folder):
    dead = {"now": False}

    def die(line, site, head, body):
        if site == "site-c" and head["op"] == "ask" and head["round"] == 1:
            dead["now"] = True
        if site != "site-c" and head.get("round") == 3:
            dead["now"] = False
        if site == "site-c" and dead["now"]:
            raise Silence("no route")

    spec = recipe(data, tiny_llama_folder, rounds=5, evaluate={"clients": False, "samples": 0},
                  clients={"quorum": 2, "deadline": 60.0})
    path, line = far_folder(data, spec), Line(data, tiny_llama_folder, die)
    started = time.monotonic()
    far = drive_run(path, line, SITES, patience=QUICK)
    events = [json.loads(x) for x in (path / "events.jsonl").read_text().splitlines()]
    assert far.skipped == [] and time.monotonic() - started < 200
    missing = [(e["round"], e["why"]) for e in events if e["kind"] == "missing"]
    assert missing[0][0] == 1 and "gone for 0.3 s" in missing[0][1]
    assert {e["kind"] for e in events} >= {"suspect", "back"} and line.revived
    assert not [r for r, _ in missing if r == 4]


def test_too_few_sites_say_why(data, tiny_llama_folder):
    line = Line(data, tiny_llama_folder, methods=["fedprox"])
    with pytest.raises(RunError, match=r"0 of 3 sites take part, 3 are needed .*the method is not on this"):
        drive_run(far_folder(data, recipe(data, tiny_llama_folder)), line, SITES, patience=QUICK)


def test_what_sites_declare_reaches_the_method_and_a_policy_is_heard(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder, "hetlora", rounds=1, space={"name": "lora", "rank": 8, "scaling": "shared"})
    here = run({**spec, "clients": {"ranks": [2, 4, 8]}}, root=data / "runs")
    line = Line(data, tiny_llama_folder)
    for site, rank in zip(SITES, (2, 4, 8), strict=True):
        line.settings[site] = line.settings[site].model_copy(update={"profile": {"rank": rank}})
    assert drive_run(far_folder(data, spec), line, SITES, patience=QUICK).state_digest == here.state_digest
    strict = Line(data, tiny_llama_folder)
    strict.settings["site-b"] = strict.settings["site-b"].model_copy(update={"most_epsilon": 3.0})
    path = far_folder(data, recipe(data, tiny_llama_folder, rounds=1), "two")
    drive_run(path, strict, SITES, 2, patience=QUICK)
    left = [e for e in map(json.loads, (path / "events.jsonl").read_text().splitlines()) if e["kind"] == "left_out"]
    assert [e["client"] for e in left] == ["site-b"] and "differential privacy within its own budget" in left[0]["why"]


@pytest.mark.slow
def test_epsilon_alone_works_at_sites_that_keep_their_own_budget(data, tiny_llama_folder):
    """Finding 10, and the sites' ledgers beside the coordinator's account: both stay within the budget."""
    spec = recipe(data, tiny_llama_folder, layers=[{"name": "dp_sgd", "epsilon": 8.0}], rounds=2)
    line = Line(data, tiny_llama_folder, most_epsilon=8.0, layers=["dp_sgd"])
    far = drive_run(far_folder(data, spec), line, SITES, patience=QUICK)
    assert far.skipped == [] and far.rounds == 2 and far.evaluation["clients"] == {}
    said = far.privacy["layers"][0]["clients"]
    for site in SITES:
        own = SiteLedger(data / "store" / site).epsilon(1e-5)
        assert 4.0 < own <= 8.0 and abs(own - said[site]) < 0.5
    with pytest.raises(DidNothing, match="one more answer would pass its own budget"):  # in a run of any name
        drive_run(far_folder(data, {**spec, "rounds": 1}, "again"), line, SITES, 0, patience=QUICK)


def test_sites_share_the_noise_and_each_books_it(data, tiny_llama_folder):
    """The same sums as in a simulation where noise is seeded; where not, sites that ask for a budget take part."""
    shared = {"name": "dp_sgd", "noise": "shared", "epsilon": 8.0, "clip_norm": 0.1}
    more = {"rounds": 2, "local": {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64},
            "evaluate": {"clients": False, "samples": 0}}
    seeded = recipe(data, tiny_llama_folder, layers=[{**shared, "seed": 5}, "secagg"], **more)
    far = drive_run(far_folder(data, seeded), Line(data, tiny_llama_folder), SITES, patience=QUICK)
    assert far.skipped == [] and far.state_digest == run(seeded, root=data / "here").state_digest
    spec = recipe(data, tiny_llama_folder, layers=[shared, "secagg"], **more)
    line = Line(data, tiny_llama_folder, most_epsilon=8.0, layers=["dp_sgd", "secagg"])
    line.settings = {s: x.model_copy(update={"store": f"{x.store}-2"}) for s, x in line.settings.items()}
    far = drive_run(far_folder(data, spec, "two"), line, SITES, patience=QUICK)
    says = far.privacy["layers"][0]
    assert far.skipped == [] and far.privacy["claim"] == "private" and 7.5 < says["epsilon"] <= 8.0
    for site in SITES:
        assert SiteLedger(data / "store" / f"{site}-2").epsilon(1e-5) == pytest.approx(says["clients"][site])


class Other(Line):
    """A line to three sites, of which one holds other base weights."""

    def call(self, site, head, body, seconds, over=None):
        said, data = super().call(site, head, body, seconds, over)
        return (said | {"weights": "another's"} if site == "site-b" and "weights" in said else said), data


def test_a_site_with_other_base_weights_takes_no_part_and_is_named(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder, rounds=1)
    with pytest.raises(RunError, match=r"2 sites are left, 3 are needed .site-b: its weights differ"):
        drive_run(far_folder(data, spec), Other(data, tiny_llama_folder), SITES, patience=QUICK)
    path = far_folder(data, spec, "two")
    drive_run(path, Other(data, tiny_llama_folder), SITES, 2, patience=QUICK)
    events = [json.loads(x) for x in (path / "events.jsonl").read_text().splitlines()]
    assert [(e["client"], e["why"]) for e in events if e["kind"] == "left_out"] == [
        ("site-b", "its weights differ from those of the run")]
    assert not [e for e in events if e["kind"] == "wire" and e["client"] == "site-b"]
    kept = json.loads((path / "identity.json").read_text())
    (path / "identity.json").write_text(json.dumps({**kept, "weights": "before"}))
    (path / "result.json").unlink()
    with pytest.raises(RunError, match="own model is not the one that the run began with"):
        drive_run(path, Line(data, tiny_llama_folder), SITES, patience=QUICK)


@pytest.mark.parametrize("layer", ["secagg", "secagg_plus", "thgs_secagg", "he_ckks", "ring_all_reduce", "fedml_he"])
def test_masks_and_ciphers_pass_sites_that_let_no_text_leave(data, tiny_llama_folder, layer):
    """Finding 9: names of peers and layouts are the protocol's words; every round counts."""
    if "he" in layer.split("_") or layer == "fedml_he":
        pytest.importorskip("tenseal")
    spec = recipe(data, tiny_llama_folder, layers=[layer], rounds=1, evaluate={"clients": False, "samples": 0})
    line = Line(data, tiny_llama_folder, layers=[layer], most_rounds=2, rows_may_change=False)
    far = drive_run(far_folder(data, spec), line, SITES, patience=QUICK)
    assert far.skipped == [] and far.rounds == 1
    events = [json.loads(x) for x in (data / "far" / "events.jsonl").read_text().splitlines()]
    assert not [e for e in events if e["kind"] == "missing"]


def test_a_site_that_lost_its_he_key_by_a_restart_is_back_in_the_next_round(data, tiny_llama_folder):
    """Of three sites none may be missing from a sum, so that one round is lost, and nobody has to do anything."""
    pytest.importorskip("tenseal")
    spec = recipe(data, tiny_llama_folder, layers=["he_ckks"], rounds=3, evaluate={"clients": False, "samples": 0})
    hits = []

    def restart(line, site, head, body):
        if head["op"] == "ask" and head["round"] == 1 and site == "site-a" and not hits:  # who made the key
            hits.append(site)
            line.start(site)

    far = drive_run(far_folder(data, spec), Line(data, tiny_llama_folder, restart), SITES, patience=QUICK)
    events = [json.loads(x) for x in (data / "far" / "events.jsonl").read_text().splitlines()]
    gone = {(e["round"], e["client"], e["why"]) for e in events if e["kind"] == "missing"}
    assert hits and far.skipped == [1]
    assert gone == {(1, "site-a", "refused by the site: it keeps its answer to itself in this round")}


def test_a_rounds_scratch_lasts_from_ask_to_ask_at_a_site_and_no_longer(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder, {"name": "fedbert_split", "steps": 2}, space="full")
    line = Line(data, tiny_llama_folder)
    far = drive_run(far_folder(data, spec), line, SITES, patience=QUICK)
    assert far.state_digest == run(spec, root=data / "here").state_digest
    for host in line.hosts.values():
        assert not host.run._session[1]


def opening(data, model, **more):
    spec = load_recipe(recipe(data, model, **more))
    return {"op": "open", "protocol": PROTOCOL, "run": "r1", "at": 0, "incarnation": "i", "recipe": for_sites(spec),
            "versions": versions(), "sites": list(SITES)}


def test_a_site_refuses_what_its_settings_forbid(data, tiny_llama_folder):
    def refusal(head, **settings):
        mine = SiteSettings(data=str(data / "data" / "site-a.jsonl"), store=str(data / "s"), **settings)
        with pytest.raises(FedLLMError) as caught:
            open_run(head, "site-a", mine)
        return str(caught.value)

    head = opening(data, tiny_llama_folder)
    assert "is a path outside of the folders" in refusal(head)
    old = {**head, "versions": {**versions(), "torch": "1.0"}}
    assert "asks for torch 1.0" in refusal(old, models=[tiny_llama_folder])
    stranger = {**head["recipe"], "method": {"name": "not_installed"}}
    assert "not installed here" in refusal({**head, "recipe": stranger}, models=[tiny_llama_folder])
    code = {**head["recipe"], "model": {"name": "some/model", "trust_remote_code": True}}
    assert "trust_remote_code" in refusal({**head, "recipe": code})
    assert "is no run's name" in refusal({**head, "run": "../up"}, models=[tiny_llama_folder])


def test_a_site_keeps_its_text_and_bounds_its_replies():
    mine = SiteSettings(data="d", store="s", most_bytes=200)  # by default no text leaves
    assert "lets no text leave" in mine.may("up", {"texts": ["a secret"]})
    assert "this site allows 200" in mine.too_large({"x": torch.zeros(60)})
    assert mine.too_large({"x": torch.zeros(2)}) is None and mine.may("down", {"texts": ["a"]}) is None


@pytest.mark.parametrize("reply, why", [
    ({"delta/w": torch.tensor([1.0, float("nan")]), "n": 1}, "holds NaN"),
    ({"losses": [1.0, [2.0, float("inf")]]}, "'losses' holds NaN or infinity"),
    ({"delta/w": torch.zeros(1 << 20)}, "bytes, allowed are"),
], ids=["nan", "nan in a list", "size"])
def test_the_door_refuses(reply, why):
    door = Door(1000)
    with pytest.raises(PayloadError, match=why):
        door.enter(pack(theta={"w": torch.zeros(2)}), codec.encode(reply))
    assert door.enter(pack(theta={"w": torch.zeros(2)}), codec.encode({"delta/w": torch.ones(2), "n": 1}))["n"] == 1


def test_a_misshapen_message_never_raises_at_a_site():
    host = SiteHost(lambda head: (SimpleNamespace(), {}))
    for head in ({}, {"protocol": PROTOCOL}, {"protocol": PROTOCOL, "op": "ask"}, {"protocol": 0, "op": "open"},
                 {"protocol": PROTOCOL, "op": "open"}, {"protocol": PROTOCOL, "op": "drop"}):
        said, body = host.answer(head, b"\x80garbage")
        assert body == b"" and said.keys() & {"refused", "failed", "closed"}


def test_memory_counts_when_settled_and_survives_a_kill(tmp_path):
    memory = DiskMemory(tmp_path, 0)
    memory.stage("a0", 0)["c"] = torch.ones(2)
    memory.keep("a0", "local#1", b"reply")
    again = DiskMemory(tmp_path, 0)  # the process was killed after its answer
    assert again.answered("a0", "local#1") == b"reply"
    assert again.stage("b0", 0) == {}  # another attempt at the round starts from what counted
    again.settle("a0", 0)
    again.settle("a0", 0)
    assert torch.equal(again.stage("a1", 1)["c"], torch.ones(2))
    again.stage("a1", 1)["c"].add_(1)  # changed in place
    again.keep("a1", "local#1", b"")
    again.settle("a1", 1)
    assert again.versions() == [1, 2]
    back = DiskMemory(tmp_path, 1)  # the run goes on from before round 1
    assert back.versions() == [1] and torch.equal(back.stage("x", 1)["c"], torch.ones(2))
    assert DiskMemory(tmp_path, 1).answered("../../etc/passwd", "v") is None


def test_a_visit_that_was_given_up_leaves_the_memory_as_it_was(tmp_path):
    memory = DiskMemory(tmp_path, 0)
    memory.stage("a0", 0)["c"] = torch.ones(2)
    memory.keep("a0", "local#1", b"one")
    memory.stage("a0", 0)["c"].add_(1)
    memory.keep("a0", "mix#1", b"two")
    again = DiskMemory(tmp_path, 0)  # its process was killed in between
    for store in (memory, again):
        store.drop("a0", "local#1")  # not the last one, so it counts by now
        store.drop("b7", "mix#1")
        assert torch.equal(store.stage("a0", 0)["c"], 2 * torch.ones(2)) and store.answered("a0", "mix#1") == b"two"
    again.drop("a0", "mix#1")
    again.drop("a0", "mix#1")
    assert torch.equal(again.stage("a0", 0)["c"], torch.ones(2)) and again.answered("a0", "mix#1") is None
    again.stage("a0", 0)["c"].add_(5)  # work that stopped half-way
    again.drop("a0", "more#1")
    again.settle("a0", 0)
    assert torch.equal(DiskMemory(tmp_path, 1).stage("a1", 1)["c"], torch.ones(2))


def test_a_call_ends_at_its_deadline_whatever_the_line_does():
    class Hung:
        def call(self, site, head, body, seconds, over=None):
            if head["op"] == "probe":
                return {"boot": "b"}, b""
            time.sleep(60)

        def revive(self, site):
            pass

    sites = Sites(Hung(), ["s"], QUICK)
    sites.table["s"].boot = "b"
    started = time.monotonic()
    with pytest.raises(Silence, match="silent until the deadline"):
        sites.ask("s", {"op": "ask"}, b"", 0.4)
    assert time.monotonic() - started < 40 and "suspect" in sites.table["s"].suspect


def test_a_site_that_lives_and_whose_answers_break_off_is_not_asked_in_a_hot_loop(caplog):
    asked = []

    class Broken:
        def call(self, site, head, body, seconds, over=None):
            if head["op"] == "probe":
                return {"boot": "b"}, b""
            asked.append(time.monotonic())
            raise Silence("the call broke off")

        def revive(self, site):
            pass

    sites = Sites(Broken(), ["s"], replace(QUICK, every=5.0))
    sites.table["s"].boot = "b"
    with pytest.raises(Silence, match=r"its deadline passed|silent until the deadline"):
        sites.ask("s", {"op": "ask"}, b"", 3.0)
    assert 3 <= len(asked) <= 6 and "it is asked again until the deadline" in caplog.text


def test_a_model_that_loads_again_does_not_outlast_the_deadline():
    class Closed:
        def call(self, site, head, body, seconds, over=None):
            return ({"boot": "b"} if head["op"] == "probe" else {"closed": True}), b""

        def revive(self, site):
            pass

    sites = Sites(Closed(), ["s"], QUICK)
    sites.table["s"].boot, sites.reopen = "b", lambda site: time.sleep(60)
    started = time.monotonic()
    with pytest.raises(Silence, match="while a new process loaded the model"):
        sites.ask("s", {"op": "ask"}, b"", 0.3)
    assert time.monotonic() - started < 40


def test_a_timeout_of_the_line_itself_is_a_line_that_broke_and_not_a_wait_that_goes_on():
    """Both are one class: it was looked at again and again, without a pause, until the deadline."""
    said = []

    class Late:
        def call(self, site, head, body, seconds, over=None):
            said.append(head["op"])
            if head["op"] == "ask" and said.count("ask") == 1:
                raise TimeoutError("a library's own")
            return {"boot": "b"}, b"x"

        def revive(self, site):
            pass

    sites = Sites(Late(), ["s"], replace(QUICK, every=5.0))
    sites.table["s"].boot = "b"
    assert sites.ask("s", {"op": "ask"}, b"", 60.0)[1:] == (b"x", 2) and said == ["ask", "probe", "ask"]


def test_a_coordinator_that_hangs_is_ended(tmp_path):
    ended = []
    session = SimpleNamespace(get_job_status=lambda job: "RUNNING", abort_job=ended.append)
    started = time.monotonic()
    assert _follow(session, tmp_path, "job", lambda: True, 0.8) is False
    assert ended == ["job"] and 0.8 <= time.monotonic() - started < 60
    with pytest.raises(ServerGone):
        _follow(session, tmp_path, "job", lambda: False, 60)


def test_the_coordinators_parts_hold_no_row(data, tiny_llama_folder):
    spec = recipe(data, tiny_llama_folder)
    assert "source" not in for_sites(load_recipe(spec))["data"]
    assert build(load_recipe(spec)).world.rows("site-a", "train")
    assert Path(tiny_llama_folder).exists()


def test_sites_that_hold_an_emulator_give_the_simulations_result(data, tiny_llama_folder):
    """The owner's model is a folder that no site has opened; sites load the emulator that was exported for them."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    from fedllm.runs.export import export_for_clients

    owner, config = str(data / "owner"), AutoConfig.from_pretrained(tiny_llama_folder)
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(owner)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(owner)
    spec = recipe(data, owner, "fedbiot")
    (data / "public.jsonl").write_text((data / "data" / "site-a.jsonl").read_text())
    spec |= {"method": {"name": "fedbiot", "prealign_steps": 3, "align_steps": 2, "adapter_layers": 2},
             "data": {**spec["data"], "public": str(data / "public.jsonl")}}
    thin = export_for_clients(spec, data / "thin")
    here = run(spec, root=data / "runs")
    far_spec = {**spec, "model": {"name": owner, "at_clients": str(thin)}}
    line = Line(data, str(thin))
    far = drive_run(far_folder(data, far_spec), line, SITES, patience=QUICK)
    assert far.state_digest == here.state_digest and far.bytes == here.bytes
    with pytest.raises(RunError, match="outside of the folders that this site opened"):
        drive_run(far_folder(data, spec, "bare"), Line(data, str(thin)), SITES, patience=QUICK)
