"""How a run stands is read from its folder: status, figures for Prometheus, logs, stopping; and a site's own policy."""

import json
import re
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from fedllm.api import resume
from fedllm.cli.main import app, main
from fedllm.core.errors import RecipeError, RunError
from fedllm.federation.nvflare import serve as federate
from fedllm.federation.nvflare.keys import Federation, _write, revoke_site
from fedllm.federation.operate import SERVING, Tally, announced, metrics, serving
from fedllm.federation.settings import SiteSettings
from fedllm.runs.folder import RunFolder
from fedllm.runs.layers import make_layer
from fedllm.runs.recipe import load_recipe
from fedllm.runs.sections import OWN

WIRE = {"kind": "wire", "round": 0, "phase": "p", "client": "site-a", "direction": "up", "payload": "x", "bytes": 70}
EVENTS = [
    WIRE, {**WIRE, "direction": "down", "bytes": 30}, {**WIRE, "client": "site-b", "direction": "down", "bytes": 30},
    {"kind": "suspect", "client": "site-b", "why": "silent"},
    {"kind": "missing", "round": 0, "phase": "p", "client": "site-b", "why": "silent"},
    {"kind": "round", "round": 0, "seconds": 1.5}, {"kind": "back", "client": "site-b", "after": 3.0},
    {"kind": "round", "round": 1, "seconds": 0.5, "skipped": "no quorum"}]


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "r", load_recipe({"name": "r", "rounds": 5}).model_dump(mode="json"))
    write(folder.path, EVENTS)
    return folder.path


def ends(*words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return end.value.code


def write(path, events):
    with (path / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(e, separators=(",", ":")) + "\n" for e in events)


def test_a_run_is_counted_as_it_grows_and_when_it_is_cut(run):
    tally = Tally(run)
    now = tally.look().as_json()
    assert (now["rounds"], now["of"], now["skipped"], now["up"], now["down"]) == (2, 5, 1, 70, 60)
    assert now["sites"] == {"site-a": {"state": "here", "missing": 0, "refused": 0, "why": ""},
                            "site-b": {"state": "here", "missing": 1, "refused": 0, "why": "silent"}}
    assert now["state"] == "stopped: no process works on it"
    with (run / "events.jsonl").open("a") as file:
        file.write('{"kind":"round","rou')  # half a line
    assert tally.look().as_json() == now
    (run / "events.jsonl").write_text("")
    write(run, [*EVENTS[:2], {"kind": "resumed", "round": 0}])
    after = tally.look().as_json()
    assert (after["rounds"], after["up"], after["resumed"]) == (0, 70, 1)


LINE = re.compile(r'(# (HELP|TYPE) fedllm_\w+ .+|fedllm_\w+(\{\w+="(\\.|[^"\\])*"\})? -?[0-9.e+-]+)')


def test_prometheus_reads_the_figures(run):
    write(run, [{**WIRE, "client": 'a"b\\c\nd'}])
    with metrics(run, 0) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60).read() == b"ok\n"
        with pytest.raises(RunError, match=f"port {port} cannot be opened"), metrics(run, port):
            pass
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    assert 'fedllm_wire_bytes_total{direction="down"} 60' in text and "fedllm_rounds_done 2" in text
    assert 'fedllm_site_missing_total{site="site-b"} 1' in text and "fedllm_up 0" in text


def test_one_process_serves_a_run_and_stop_ends_it(run):
    code = ("import sys, time, pathlib; from fedllm.federation.operate import announced\n"
            "from fedllm.federation.process import stoppable\n"
            "with stoppable(), announced(pathlib.Path(sys.argv[1])):\n print('here', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"here\n" and serving(run) == process.pid
        with pytest.raises(RunError, match=f"is being served by process {process.pid}"), announced(run):
            pass
        assert Tally(run).look().state == "running"
        told = CliRunner().invoke(app, ["stop", str(run)])
        assert told.exit_code == 0 and f"process {process.pid} ended" in told.output
        assert process.wait(60) != 0 and not (run / SERVING).exists()
    finally:
        process.kill()
        process.wait(10)
    (run / SERVING).write_text(json.dumps({"pid": 1, "began": 0}))  # left by a killed one; the number is another's now
    assert serving(run) is None
    assert ends("stop", str(run)) == 2


def test_status_and_logs_are_printed(run, tmp_path):
    said = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)
    assert said["rounds"] == 2 and "2 of 5 rounds" in CliRunner().invoke(app, ["status", str(run)]).output
    lines = CliRunner().invoke(app, ["logs", str(run), "--last", "3"]).output.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["round", "back", "round"]
    assert ends("logs", str(tmp_path)) == 2


def refused(recipe, **policy):
    mine = SiteSettings(data="d", store="s", **policy)
    checked = load_recipe(recipe)
    why = mine.forbids(checked, [make_layer(n.name, n.knobs, "layers") for n in checked.layers])
    return why and str(why)


def test_a_flower_kit_has_two_logs(tmp_path):
    (tmp_path / "flower.json").write_text("{}")
    (tmp_path / "supernode.log").write_text("one\n\x1b[92mINFO\x1b[0m two\n\n")
    (tmp_path / "process.log").write_text("three\nfour\n")
    said = CliRunner().invoke(app, ["logs", str(tmp_path), "--last", "2"])
    assert said.exit_code == 0
    assert said.output.splitlines() == ["supernode.log: INFO two", "process.log: three", "process.log: four"]


def test_a_policy_refuses_with_a_reason():
    plain = {"space": "lora", "rounds": 5}
    private = {**plain, "layers": [{"name": "dp_sgd", "epsilon": 2.0}]}
    assert refused(plain, spaces=["lora"], most_rounds=5) is None
    assert "space.name = 'full': this site trains lora only" in refused({**plain, "space": "full"}, spaces=["lora"])
    assert "rounds = 5: this site takes part in 4 at most" in refused(plain, most_rounds=4)
    assert "takes part under secagg only" in refused(private, layers=["secagg"])
    assert "epsilon of 3 at most (most_epsilon); it has none" in refused(plain, most_epsilon=3)
    assert refused(private, most_epsilon=3) is None
    assert "its budgets are [2.0]" in refused(private, most_epsilon=1)
    noisy = {**plain, "layers": [{"name": "dp_sgd", "noise_multiplier": 1.0}]}  # promises no budget
    assert "its budgets are [None]" in refused(noisy, most_epsilon=3)


def test_a_policy_file_wins_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("text_leaves: false\nspaces: [lora]\nmost_epsilon: 3\n")
    mine = SiteSettings.make({"data": "d", "store": "s", "text_leaves": True}, path)
    assert (mine.text_leaves, mine.spaces, mine.most_epsilon) == (False, ["lora"], 3)
    for wrong, why in (("most_epsilon: -1", "most_epsilon = -1: input should be greater than 0$"),
                       ("text_leave: no", "text_leave: unknown key; did you mean 'text_leaves'"), ("- 1", "mapping"),
                       ("text_leaves: true\ntext_leaves: false", "the key 'text_leaves' is given twice"),
                       ("gate: [a", "not YAML"), ("a: &a [*a]", "values with its aliases written out")):
        path.write_text(wrong)
        with pytest.raises(RecipeError, match=f"policy.yaml(, line \\d)?: (.|\n)*{why}"):
            SiteSettings.make({"data": "d", "store": "s"}, path)


def test_what_nothing_is_called_is_refused_as_a_site_joins(tmp_path):
    """A slip in a list of names would keep every run away, without a word at the site."""
    path = tmp_path / "policy.yaml"
    (tmp_path / "local").mkdir()
    for wrong, why in (("methods: [fed_rga]", "methods: there is no 'fed_rga'; did you mean 'fed_rag'"),
                       ("layers: [secag]", "layers: there is no 'secag'; did you mean 'secagg'"),
                       ("spaces: [Lora]", "spaces: there is no 'Lora'; did you mean 'lora'"),
                       ("data: /nowhere/at/all", "data = '/nowhere/at/all': no such file or folder")):
        path.write_text(wrong)
        with pytest.raises(RecipeError, match=why):
            SiteSettings.settle(tmp_path, "h:1", "h:1", tmp_path, methods=None, models=[], store=None, policy=path)
    path.write_text("methods: [fed_rag]\nlayers: [responsible_gate]\nspaces: [head]\ngate: {copies: off}")
    SiteSettings.settle(tmp_path, "h:1", "h:1", tmp_path, methods=None, models=[], store=None, policy=path)
    assert SiteSettings.read(tmp_path / "local" / "fedllm.json").methods == ["fed_rag"]


def test_a_revoked_sites_name_is_not_given_again(tmp_path):
    (tmp_path / "federation.yaml").write_text("host: localhost\nport: 1\nsites: [site-a, site-b]\n")
    kit = tmp_path / "kits" / "site-a"
    kit.mkdir(parents=True)
    made = revoke_site(tmp_path, "site-a")
    assert made.spec["sites"] == ["site-b"] and made.spec["revoked"] == ["site-a"] and not kit.exists()
    with pytest.raises(RecipeError, match="no site of"):
        revoke_site(tmp_path, "site-a")
    with pytest.raises(RecipeError, match="not taken or revoked"):
        _write(tmp_path, Federation(tmp_path).spec, ["site-a"])


def test_resume_says_who_goes_on_with_a_federations_run(tmp_path):
    recipe = load_recipe({"name": "r"}, {"data.source": OWN})
    folder = RunFolder.create(tmp_path / "r", recipe.model_dump(mode="json"))
    with pytest.raises(RunError, match=r"`fedllm serve .*r --federation FOLDER` goes on with it"):
        resume(folder.path)


def test_what_needs_pooled_rows_is_refused_before_anything_starts():
    from fedllm.federation.coordinator import check_recipe

    with pytest.raises(RecipeError, match="runs in a simulation only"):
        check_recipe(load_recipe({"method": "centralized"}))
    with pytest.raises(RecipeError, match=r"data\.canaries = 20 is not allowed in a real federation"):
        check_recipe(load_recipe({"method": "fedavg", "data": {"canaries": 20}}))
    check_recipe(load_recipe({"method": "fedavg"}))


def test_what_dies_is_started_again_for_as_long_as_the_run_gets_on(tmp_path, monkeypatch):
    rounds = iter([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])
    monkeypatch.setattr(federate, "_rounds", lambda run: next(rounds))
    monkeypatch.setattr(federate, "PAUSE", 0.0)
    with pytest.raises(RunError, match="the server ended 4 times in a row, and the run came no round further"):
        list(federate._starts(tmp_path, "the server"))
    assert next(rounds, None) is None
