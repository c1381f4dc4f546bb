"""Sites with models of their own, and public rows that reach them: as in the simulation, metered, refused in time."""

import json

import pytest

import fedllm
from fedllm.core.errors import CompositionError, DidNothing, RecipeError, RunError, Withheld
from fedllm.federation import public as publics
from fedllm.federation.coordinator import check_recipe, drive_run
from fedllm.federation.operate import Tally
from fedllm.federation.public import PublicRows
from fedllm.federation.settings import EndpointSetting
from fedllm.methods.distillation.fedmd import FedMD
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe
from fedllm.runs.result import Result
from tests.engines.test_flare import QUICK, SITES, Line, one_at_a_time  # noqa: F401

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "north"]


def rows(k, n):
    return [{"text": " ".join(WORDS[(3 * i + k + j) % 10] for j in range(3 + i % 5)), "label": ["no", "yes"][i % 2]}
            for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for k, (name, n) in enumerate((("data/site-a", 12), ("data/site-b", 15), ("data/site-c", 9), ("public", 20),
                                   ("test", 8))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(k, n)))
    return tmp_path


@pytest.fixture
def spec(folder, tiny_bert_folder, wide_bert_folder):
    return {"name": "far", "model": tiny_bert_folder, "models": {"wide": wide_bert_folder}, "rounds": 2,
            "method": {"name": "fedmd", "alignment": 12, "transfer_steps": 2, "own_steps": 2, "digest_steps": 2},
            "space": {"name": "lora", "rank": 2}, "engine": "in_process",
            "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4},
            "data": {"source": str(folder / "data"), "partition": {"kind": "per_file"}, "task": "classification",
                     "labels": ["no", "yes"], "test": 0.0, "public": str(folder / "public.jsonl"), "client_test": 0.2}}


@pytest.fixture
def line(folder, tiny_bert_folder, wide_bert_folder):
    made = Line(folder, tiny_bert_folder)
    for site in SITES:
        settle(made, site, models=[tiny_bert_folder, wide_bert_folder])
    return made


def settle(line, site, **changed):
    line.settings[site] = line.settings[site].model_copy(update=changed)


def drive(folder, spec, line, name="far", **more):
    room = RunFolder.create(folder / name, load_recipe(spec).model_dump(mode="json"))
    return drive_run(room.path, line, SITES, patience=QUICK, **more)


def phases(result):
    return {k: v for k, v in result.bytes["by_phase"].items() if k != "Opening.public"}


def test_three_sites_of_two_designs_are_the_simulation(folder, spec, line, wide_bert_folder):
    """The recipe deals site-a its model, site-b's own settings say a folder, and site-c holds the run's."""
    mixed = {**spec, "clients": {"profiles": {"site-a": {"model": "wide"}}}}
    settle(line, "site-b", model=wide_bert_folder)
    here = fedllm.run({**mixed, "clients": {"profiles": {s: {"model": "wide"} for s in ("site-a", "site-b")}}},
                      root=folder / "runs")
    far = drive(folder, mixed, line)
    assert far.evaluation["clients"] == here.evaluation["clients"] and phases(far) == here.bytes["by_phase"]
    assert far.state_digest == here.state_digest and far.skipped == []
    used = far.reports["ModelUsage"]  # site-b tells the last part of its folder's path alone
    assert used.keys() == {"wide", wide_bert_folder.rpartition("/")[2]}
    (sums,) = [{k: sum(u[k] for u in used.values()) for k in ("calls", "prompt_tokens")}]
    assert sums == {k: here.reports["ModelUsage"]["wide"][k] for k in sums}


def test_public_rows_are_sent_once_metered_and_kept(folder, spec, line):
    first = drive(folder, spec, line)
    data = PublicRows.of(fedllm.load_federation(load_recipe(spec).data, 0).public).data
    assert first.bytes["by_phase"]["Opening.public"] == {"up": 0, "down": 3 * len(data)}
    again = drive(folder, spec, line, "again")
    assert "Opening.public" not in again.bytes["by_phase"] and phases(first) == phases(again)
    sent = [e for e in RunFolder(first.folder).events() if e["kind"] == "wire" and e["phase"] == "Opening.public"]
    assert [(e["client"], e["bytes"]) for e in sent] == [(s, len(data)) for s in SITES]


def test_a_site_s_own_copy_is_found_by_its_hash(folder, spec, line, caplog):
    settle(line, "site-a", public=str(folder / "public.jsonl"))
    settle(line, "site-b", public=str(folder / "test.jsonl"))  # other rows
    far = drive(folder, spec, line)
    sent = {e["client"] for e in RunFolder(far.folder).events() if e.get("phase") == "Opening.public"}
    assert sent == {"site-b", "site-c"} and "has the hash" in caplog.text


def test_rows_that_a_method_needs_at_the_server_alone_are_not_sent(folder, spec, line):
    far = drive(folder, {**spec, "method": "fedavg"}, line)
    assert "Opening.public" not in far.bytes["by_phase"] and not (folder / "store" / "site-a" / "public").exists()


def test_what_comes_in_the_place_of_the_rows_is_refused(folder, spec, line, caplog):
    call = line.call
    line.call = lambda site, head, body, *more: call(site, head, b"[]" if len(body) and head["op"] == "open" else body,
                                                     *more)
    with pytest.raises(RunError, match=r"0 of 3 sites take part.*the message is none that it can answer"):
        drive(folder, spec, line)
    assert "2 bytes of public rows came, which are " in caplog.text and "not those" in caplog.text


def test_too_many_rows_are_not_sent(folder, spec, line, monkeypatch):
    monkeypatch.setattr("fedllm.federation.opening.MOST", 100)
    settle(line, "site-a", public=str(folder / "public.jsonl"))
    with pytest.raises(RunError, match=r"1 of 3 sites take part.*more than the 100 that are sent; give it a copy"):
        drive(folder, spec, line)
    assert publics.MOST == 64 << 20


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"data.public": 0.0}, CompositionError, "'fedmd' works on public rows at the clients, and the data has none"),
    ({"data.public": 0.2}, RecipeError, "data.public = 0.2: of rows that lie at sites no share can be set aside"),
    ({"clients.models": ["wid"]}, RecipeError, "clients.models.0: there is no 'wid'; did you mean 'wide'")])
def test_a_federation_that_cannot_be_is_refused_before_anything_starts(spec, change, error, says):
    with pytest.raises(error, match=says):
        check_recipe(load_recipe(spec, change))


def test_a_site_of_another_design_is_refused_where_trainables_are_joined(folder, spec, line, wide_bert_folder, caplog):
    settle(line, "site-b", model=wide_bert_folder)
    with pytest.raises(RunError, match=r"site-b: refused .*parts of the run do not fit together there"):
        drive(folder, {**spec, "method": "fedavg"}, line)
    assert "'fedavg' cannot join clients that hold 'wi" in caplog.text
    assert drive(folder, {**spec, "method": "fedavg"}, line, "two", needed=2).skipped == []


@pytest.mark.parametrize("model", ["nowhere", "./nowhere"])
def test_a_site_s_model_that_is_not_there(folder, spec, line, model, caplog):
    settle(line, "site-b", model=model)
    with pytest.raises(RunError, match="site-b: refused by the site: its model lacks something") as refused:
        drive(folder, spec, line)
    assert model in caplog.text and model not in str(refused.value)  # it stays in the site's own log


def test_a_recipe_s_folder_that_a_site_did_not_open(folder, spec, line, tiny_bert_folder, caplog):
    settle(line, "site-a", models=[tiny_bert_folder])
    with pytest.raises(RunError, match=r"site-a: refused by the site: a model of the run .* is a path outside"):
        drive(folder, {**spec, "clients": {"models": ["wide"]}}, line)
    assert "models.wide = " in caplog.text


@pytest.mark.parametrize(("of", "dealt", "says"), [
    ({"hub": "owner/name"}, ["hub"], "the run needs a host that its settings do not name"),
    ({}, ["owner/name"], "the run needs a host that its settings do not name"),
    ({"far": "http://127.0.0.1:9/model"}, ["far"], "the run needs a host that its settings do not name"),
    ({}, ["../elsewhere/"], "is a path outside of the folders")])
def test_what_a_site_does_not_fetch(folder, spec, line, of, dealt, says, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    with pytest.raises(RunError, match=rf"0 of 3 sites take part.*{says}"):
        drive(folder, {**spec, "models": {**spec["models"], **of}, "clients": {"models": dealt}}, line)


def test_text_goes_to_no_endpoint_but_the_site_s_own(folder, spec, line, monkeypatch, caplog):
    named, own = "http://127.0.0.1:9/v1", "http://127.0.0.1:7/v1"
    monkeypatch.setattr(FedMD, "asks_for", lambda self: ("teacher",))
    teacher = {"endpoint": {"base_url": named, "api_key_env": "HOME", "retries": 0, "timeout": 2.0}}
    far = {**spec, "models": {"teacher": teacher}}
    with pytest.raises(RunError, match=r"site-a: .*asks an endpoint, and this site's settings name none"):
        drive(folder, far, line)
    assert f"models.teacher.endpoint is '{named}'" in caplog.text
    for site in SITES:
        settle(line, site, endpoint=EndpointSetting(url=own))
    with pytest.raises(RunError, match=r"site-a: .*its endpoint did not answer"):  # nobody is there
        drive(folder, far, line, "two")
    tried = caplog.text.partition("EndpointError")[2]
    assert ":7/v1" in tried and ":9" not in tried
    other = {"endpoint": {"base_url": "http://127.0.0.1:11/v1"}}
    with pytest.raises(RunError, match=r"site-a: .*asks an endpoint"):  # one cannot stand for two
        drive(folder, {**spec, "models": {"teacher": teacher, "judge": other}}, line, "three")
    settle(line, "site-a", endpoint=None)
    with pytest.raises(RunError, match=r"site-a: refused by the site: .*asks an endpoint"):
        drive(folder, {**spec, "data": {**spec["data"], "task": "generation", "labels": None, "public": 0.0},
                       "method": {"name": "fed_bbpt", "endpoint": named, "words": ["red", "blue"]}}, line, "four")


def test_a_federation_in_which_nothing_counted_is_failed(folder, spec, line, monkeypatch):
    def tell(self, msg, client):
        raise Withheld("no")

    tell.__dict__.update(FedMD.tell.__dict__)
    monkeypatch.setattr(FedMD, "tell", tell)
    with pytest.raises(DidNothing, match=r"all of its 2 rounds were skipped"):
        drive(folder, spec, line)
    assert Result.load(folder / "far").failed and Tally(folder / "far").look().state.startswith("failed: all of its 2")
