"""Tools of MCP servers, which are real processes here: equal answers, bounded waits, policy, budgets, tapes; and no
coordinator makes a site run a command."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import fedllm
from fedllm.core.errors import DataError, RecipeError, RunError
from fedllm.engines.far.line import Patience
from fedllm.engines.far.site import SiteHost
from fedllm.environments import served
from fedllm.environments.env import Bounded
from fedllm.environments.registry import dealt, make_scene
from fedllm.environments.rules import Rules
from fedllm.environments.served import arguments
from fedllm.environments.tape import Tape
from fedllm.federation.admission import admitted
from fedllm.federation.coordinator import drive_run
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.runs.acting import acts
from fedllm.runs.folder import RunFolder
from fedllm.runs.received import trusted
from fedllm.runs.recipe import load_recipe

SERVER = '''
import os, time
from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations

made, here = MCPServer("ours", log_level="ERROR"), ToolAnnotations(read_only_hint=True, open_world_hint=False)

@made.tool(annotations=here)
def lookup(key: str, times: int) -> str: return f"{key} is 42 " * times
@made.tool(annotations=here)
def wait(key: str) -> str: time.sleep(600)
@made.tool(annotations=here)
def die(key: str) -> str: os._exit(3)
@made.tool(annotations=here)
def fail(key: str) -> str: raise KeyError(key)
@made.tool(annotations=here)
def secret() -> str: return os.environ.get("OURS", "unset")
@made.tool(annotations=ToolAnnotations(read_only_hint=True))
def browse(key: str) -> str: return "a page"
@made.tool()
def bare(key: str) -> str: return "done"

made.run("stdio")
'''
POLICY = {"model": {"name": "policy"}, "space": "full", "method": {"name": "fed_marl", "episodes": 2,
                                                                   "test_episodes": 2},
          "local": {"optimizer": "sgd", "lr": 5.0}, "rounds": 1, "engine": "in_process"}


def env(name, seed=3, knobs=None, **rules):
    rules = {"seconds": 30, **rules} if "mcp" in rules else rules  # a machine that is busy changes no answer
    made = Bounded(make_scene(name, knobs or {}), 40, np.random.default_rng(0), Rules.make(rules))
    made.reset(seed)
    return made


def said(at, line):
    return (*at.say(line)[1:], at.text)


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "ours.py"
    path.write_text(SERVER)
    return [sys.executable, str(path)]


@pytest.mark.parametrize("name", ["desk", "sums"])
def test_through_a_server_tools_answer_as_without(name):
    far, here = env(name, mcp="builtin", may=["write"]), env(name, may=["write"])
    lines = [*here.commands[:-1], "calc 1 / 0", "calc", "fly away"]
    if name == "desk":
        lines += ["sql SELECT color FROM invoices", "sql DROP TABLE invoices", "read ../desk.db", "read", "files x",
                  "note kim.txt in Rome", "read kim.txt", "sql"]
        assert set(far._env.words.toolbox.tools) == {"sql", "files", "read", "note", "calc"}
        assert far._env.words.toolbox.tools["note"].does == ("write",)
    for line in lines:
        assert said(far, line) == said(here, line), line
    assert far.admissible == here.admissible
    assert "in Rome" not in said(env("desk", mcp="builtin"), "read kim.txt")[2]


def test_a_tool_that_fails_or_never_ends_says_so_and_the_next_call_is_answered(command):
    short, at = (env("desk", mcp=command, seconds=s) for s in (3, 60))  # a busy machine may need more for an answer
    began = time.monotonic()
    assert "ours is 42 ours is 42" in said(at, "lookup ours 2")[2]
    assert "the server did not answer within 3 s" in said(short, "wait x")[2]
    assert any("ours is 42" in said(short, "lookup ours 1")[2] for _ in range(5))  # another process
    assert "tool 'die' failed" in said(at, "die x")[2]
    assert "tool 'fail' failed" in said(at, "fail x")[2] and "there is no tool" in said(at, "fly x")[2]
    assert "tool 'lookup' failed" in said(at, "lookup ours many")[2]
    assert 'tool \'lookup\' failed: the arguments are no JSON' in said(at, "lookup {key")[2]
    assert "ours is 42" in said(at, 'lookup {"key": "ours", "times": 1}')[2]
    assert time.monotonic() - began < 200 and not at._over


def test_a_server_may_say_on_stderr_what_it_likes(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text("import sys\nsys.stderr.write('x' * 3_000_000 + '\\n')\n" + SERVER)
    own = served.server_of((sys.executable, str(path)), 30.0)
    assert own.call("lookup", {"key": "ours", "times": 1}) == "ours is 42 "
    line = own.line
    own.close()
    line.done.exception(20)
    assert line.log.last().strip("x") == "\n" and len(line.log.kept) == served.LAST
    (tmp_path / "dead.py").write_text("import sys\nsys.stderr.write('y' * 3_000_000 + ' the end')")
    with pytest.raises(RunError, match=r"its last words are .*y"):
        served.server_of((sys.executable, str(tmp_path / "dead.py")), 30.0).call("lookup", {})


def test_what_a_tool_does_is_what_it_says_and_else_it_is_off(command, monkeypatch):
    monkeypatch.setenv("OURS", "a secret")
    at = env("desk", mcp=command)
    assert "off: it may network" in said(at, "browse x")[2]
    assert "off: it may write and network" in said(at, "bare x")[2]
    assert "unset" in said(at, "secret")[2]
    able = env("desk", mcp=command, may=["write", "network"])
    assert "a page" in said(able, "browse x")[2] and "done" in said(able, "bare x")[2]
    assert not any(at.admissible[:-1])  # none of the desk's own calls is there


def test_a_server_that_does_not_begin_ends_the_run_in_a_sentence(monkeypatch):
    with pytest.raises(RunError, match=r"no MCP server began .*last words are 'no such thing'"):
        env("desk", mcp=[sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr)"])
    with pytest.raises(RunError, match="no MCP server began"):
        env("desk", mcp=["/nowhere/at/all"])
    monkeypatch.setattr(served, "START", 0.5)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(RunError, match=r"no MCP server began within 0\.5 s"):
        env("desk", mcp=[sys.executable, "-c", "import time; time.sleep(600)"])
    ends = time.monotonic() + 60
    while {p.pid for p in psutil.Process().children(recursive=True)} - before:
        assert time.monotonic() < ends, "its process is still there"
        time.sleep(0.1)


@pytest.mark.parametrize("rules, says", [
    ({"mcp": "python server.py"}, "as a list of words"), ({"mcp": ["x", ""]}, "as a list of words"),
    ({"seconds": 0}, "seconds = 0"), ({"calls": 0}, "calls = 0"), ({"characters": True}, "characters = True"),
    ({"replay": "x", "mcp": ["y"]}, "leave out record and mcp")])
def test_rules_that_are_none_are_refused(rules, says):
    with pytest.raises(RecipeError, match=says):
        Rules.make(rules)
    with pytest.raises(RecipeError, match="has no tools; leave it out"):
        dealt("errands", {}, 1, 5, 0, mcp="builtin")


def test_budgets_of_calls_and_characters_are_an_episodes():
    at = env("sums", calls=2, characters=4)
    assert [said(at, "calc 10 + 2")[2].splitlines()[-1] for _ in range(3)] == [
        "calc: 12", "calc: 12", "calc: tool 'calc' is not called: the 2 calls of this episode are made"]
    at = env("sums", characters=3)
    assert [said(at, "calc 10 + 2")[2].splitlines()[-1] for _ in range(3)] == [
        "calc: 12", "calc: 1",
        "calc: tool 'calc' is not called: the 3 characters of answers of this episode are read"]
    at.reset(4)
    assert "calc: 12" in said(at, "calc 10 + 2")[2]


def test_words_become_arguments_by_the_tools_own_schema():
    schema = {"properties": {"db": {}, "name": {"type": "string"}, "n": {"type": "integer"}, "more": {}},
              "required": ["db", "name", "n"]}
    assert arguments(schema, " kim  3 ", {"db": "/x", "files": "/y"}) == {"db": "/x", "name": "kim", "n": 3}
    assert arguments(schema, '{"name": "kim", "db": "/etc"}', {"db": "/x"}) == {"name": "kim", "db": "/x"}
    assert arguments({"properties": {}}, "x y", {}) == {} and arguments({"properties": {"q": {}}}, "x y", {}) == {
        "q": "x y"}


def test_a_run_through_a_server_its_tape_and_a_run_from_the_tape_are_one(tmp_path):
    def run(name, **rules):
        data = {"source": "env:desk", "environment": {"clients": 2, "max_steps": 4, "width": 32, **rules}}
        return fedllm.run({**POLICY, "name": name, "data": data}, root=tmp_path)

    tape = tmp_path / "tapes" / "desk.jsonl"
    here, far = run("here"), run("far", mcp="builtin", record=str(tape), seconds=30)
    assert far.state_digest == here.state_digest and far.evaluation == here.evaluation
    assert tape.stat().st_mode & 0o077 == 0
    again = run("again", replay=str(tape))
    assert again.state_digest == here.state_digest and again.evaluation == here.evaluation
    lines = tape.read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(line for line in lines if "tools" in json.loads(line)))
    with pytest.raises(RunError, match="the run took another way than the one that was recorded"):
        run("short", replay=str(tmp_path / "short.jsonl"))
    (tmp_path / "bad.jsonl").write_text(lines[0] + "\n[]\n")
    with pytest.raises(RecipeError, match="line 2 is no line of a tape"):
        run("bad", replay=str(tmp_path / "bad.jsonl"))
    with pytest.raises(RunError, match="has nothing of this environment"):
        Tape(tape).of("somebody")


def test_a_received_folder_runs_no_server(tmp_path):
    data = {"source": "env:desk", "environment": {"mcp": ["rm", "-r"], "record": "/tmp/x"}}
    recipe = load_recipe({**POLICY, "name": "d", "data": data})
    with pytest.raises(RecipeError, match=r"mcp = \['rm', '-r'\], a command that would be run .*record = '/tmp/x'"):
        trusted(recipe, tmp_path)
    assert trusted(recipe, tmp_path, trust_remote_code=True) is recipe


def test_questions_of_ones_own_with_tools_of_ones_own(command, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "what is ours?", "response": "42", "calls": [
        "wait x", "lookup ours 1", "lookup {found} 1"]}) + "\n")
    at = env("questions", knobs={"file": str(path), "choices": 3, "cost": 0.0}, mcp=command)
    assert at.step(1)[1] == 0.5 and at.commands[2] == "lookup 42 1" and at.step(3)[1:] == (0.5, True)
    assert env("questions").scene.actions == 5
    for row, says in (({"prompt": "x", "response": "y", "calls": []}, "line 1: allowed"), ([], "line 1: allowed"),
                      ({"prompt": "x", "response": "y", "calls": ["a"] * 9}, "1 to 4 lines")):
        bad = tmp_path / f"{len(str(row))}.jsonl"
        bad.write_text(json.dumps(row))
        with pytest.raises(DataError, match=says):
            env("questions", knobs={"file": str(bad)})
    with pytest.raises(DataError, match="cannot be read"):
        env("questions", knobs={"file": str(tmp_path / "none")})


# -- a real federation -------------------------------------------------------------------------------------------------


class Line:
    """Sites in this process; everything crosses as JSON and bytes."""

    def __init__(self, settings):
        self.hosts = {s: SiteHost(lambda head, s=s: open_run(head, s, settings[s])) for s in settings}

    def call(self, site, head, body, seconds, over=None):
        said, data = self.hosts[site].answer(json.loads(json.dumps(head)), bytes(body))
        return json.loads(json.dumps(said)), data

    def revive(self, site):
        pass


def site(folder, name, **environment):
    return SiteSettings(data="env:desk", store=str(folder / "store" / name), environment={
        "max_steps": 4, "width": 32, "seconds": 30, **environment})


def test_sites_act_in_environments_of_their_own_and_run_no_command_of_a_coordinators(tmp_path):
    trace = tmp_path / "ran"
    evil = [sys.executable, "-c", f"open({str(trace)!r}, 'w')"]
    sites = {"site-a": site(tmp_path, "a", mcp="builtin"), "site-b": site(tmp_path, "b", dialect=1)}
    spec = {**POLICY, "name": "far", "data": {"source": "env:desk", "environment": {"width": 32}}}
    recipe = load_recipe(spec)
    told = for_sites(recipe)
    assert "environment" not in told["data"] and "source" not in told["data"]
    told["data"] |= {"environment": {"mcp": evil, "record": str(trace)}, "source": "env:desk"}
    mine = admitted(told, sites["site-a"]).data.environment
    assert (mine.mcp, mine.record, mine.clients) == ("builtin", None, 1)
    rows = SiteSettings(data=str(Path(__file__)), store=str(tmp_path / "store" / "c"))
    with pytest.raises(RecipeError, match="do not fit together"):
        acts(admitted(told, rows))
    path = RunFolder.create(tmp_path / "far", recipe.model_dump(mode="json")).path
    far = drive_run(path, Line(sites), list(sites), patience=Patience(answer=60.0, opening=60.0))
    assert set(far.evaluation["clients"]) == {"site-a", "site-b"} and not trace.exists()
    assert all("return" in figures for figures in far.evaluation["clients"].values())


def test_a_sites_environment_is_checked_when_it_joins(tmp_path):
    with pytest.raises(RecipeError, match="as a list of words"):
        site(tmp_path, "a", mcp=["x", ""]).own_environment()
    with pytest.raises(RecipeError, match="are rows; allowed with it is env:NAME"):
        SiteSettings(data="x.jsonl", store="s", environment={"mcp": "builtin"}).own_environment()
    with pytest.raises(RecipeError, match="did you mean 'dialect'"):
        site(tmp_path, "a", dialekt=1).own_environment()
