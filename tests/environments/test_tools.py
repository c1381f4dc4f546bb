"""Environments in words and their tools: what is answered and paid, what a policy forbids, and that no call hangs."""

import time

import numpy as np
import pytest

import fedllm
from fedllm.core.errors import RecipeError, RunError
from fedllm.environments.env import Bounded
from fedllm.environments.reading import reckon
from fedllm.environments.registry import bounded, dealt, make_scene
from fedllm.environments.rules import Rules
from fedllm.environments.toolbox import Tool, Toolbox, apart

RNG = np.random.default_rng


def env(name, max_steps=20, may=(), seed=0, **knobs):
    made = Bounded(make_scene(name, knobs), max_steps, RNG(0), Rules(may))
    made.reset(seed)
    return made


def solved(name, best, **knobs):
    """The reward of an episode in which `best(env)` says every line."""
    at, got, over = env(name, **knobs), 0.0, False
    while not over:
        _, reward, over = at.say(best(at))
        got += reward
    return got


def by_sign(at):
    problem = at._env.words.problem
    return at.commands[-1] if at._env.words.found else at.commands["+-*/".index(problem.kind)]


def by_kind(at):
    words, lines = at._env.words, at.commands
    of = 2 * at.scene.dialect
    plan = {"amount": [lines[of]], "both": [lines[of], lines[of + 1], lines[5]], "town": [lines[4]]}[words.problem.kind]
    return lines[-1] if len(words.found) == len(plan) else plan[len(words.found)]


def errand(at):
    game = at._env.words
    to = game.goal if game.carries else game.start
    y, x = (a - b for a, b in zip(divmod(game.plan.index(to), 3), divmod(game.at, 3), strict=True))
    if not (y or x):
        return "give" if game.carries else "take"
    return f"go {'south' if y > 0 else 'north' if y else 'east' if x > 0 else 'west'}"


@pytest.mark.parametrize("name, best, knobs", [("sums", by_sign, {}), ("desk", by_kind, {"dialect": 0}),
                                               ("desk", by_kind, {"dialect": 1}), ("errands", errand, {})])
def test_a_program_pays_the_right_lines_and_no_others(name, best, knobs):
    for seed in range(6):
        assert solved(name, best, seed=seed, cost=0.0, **knobs) == pytest.approx(1.0)
    nothing = env(name, cost=0.0, **knobs)
    assert sum(nothing.say("answer never" if name != "errands" else "give")[1] for _ in range(1)) == 0.0


def test_what_was_found_is_paid_once():
    at = env("sums", cost=0.0)
    right = by_sign(at)
    assert [at.say(right)[1] for _ in range(3)] == [0.5, 0.0, 0.0]


def test_numbers_and_words_are_the_same_environment():
    one, other = env("desk"), env("desk")
    for action in (0, 4, 5, 7):
        line = other.commands[action]
        a, b = one.step(action), other.say(line)
        assert (a[0] == b[0]).all() and a[1:] == b[1:] and one.text == other.text
    assert one.scene.size == len(a[0]) and len(one.commands) == one.scene.actions
    grid = bounded(dealt("gridworld", {}, 1, 5, 0)[0], RNG(0))
    grid.reset(0)
    with pytest.raises(RunError, match="has no words"):
        grid.say("go")


def test_layouts_differ_in_words_figures_and_dialects():
    asked = lambda layout: {env("sums", layout=layout, seed=s).text for s in range(40)}  # noqa: E731
    shapes = [{"".join(c for c in t if not c.isdigit()) for t in asked(k)} for k in range(2)]
    assert len(shapes[0]) == len(shapes[1]) == 8 and len(shapes[0] & shapes[1]) == 4
    assert make_scene("desk", {"layout": 1}).amounts() != make_scene("desk", {"layout": 2}).amounts()
    assert "no such table: bills" in _said(env("desk", dialect=0), "sql SELECT total FROM bills")
    assert make_scene("errands", {"layout": 1}).plan() == make_scene("errands", {"layout": 2}).plan()


def _said(at, line):
    at.say(line)
    return at.text


def test_a_tool_that_writes_is_off_unless_the_site_says_so():
    closed, open_ = env("desk"), env("desk", may=("write",))
    assert "tool 'note' is off: it may write, which this site does not allow" in _said(closed, "note kim.txt moved")
    assert "kim.txt is written" in _said(open_, "note kim.txt in Rome") and "in Rome" in _said(open_, "read kim.txt")
    assert "in Rome" not in _said(closed, "read kim.txt") and "in Rome" not in _said(env("desk"), "read kim.txt")
    assert "tool 'get' is off: it may network" in Toolbox([Tool("get", "", str, ("network",))]).call("get", "x").text
    for bad in (["delete"], "write"):
        with pytest.raises(RecipeError, match="allowed is a list of write, network"):
            Toolbox([], may=bad)
    with pytest.raises(RecipeError, match="has no tools"):
        dealt("errands", {}, 1, 5, 0, may=["write"])
    assert bounded(dealt("desk", {}, 1, 5, 0, may=["write"])[0], RNG(0))._env.words.toolbox.may == ("write",)


@pytest.mark.parametrize("line, says", [
    ("sql DROP TABLE invoices", "not authorized"), ("sql ATTACH 'x.db' AS x", "not authorized"),
    ("sql PRAGMA query_only", "not authorized"), ("sql INSERT INTO invoices VALUES (99, 1)", "not authorized"),
    ("sql SELECT color FROM invoices", "no such column"), ("read ../desk.db", "outside of the folder"),
    ("read /etc/passwd", "outside of the folder"), ("read nobody.txt", "there is no file"), ("read", "outside"),
    ("calc 2 ** 999999", "allowed are numbers"), ("calc __import__('os')", "allowed are numbers"),
    ("calc 1 / 0", "division by zero"), ("calc (", "is no expression"), ("fly away", "there is no tool 'fly'"),
    ("", "there is no tool ''")])
def test_what_a_tool_does_not_do_is_said_in_a_sentence(line, says):
    at = env("desk")
    assert says in _said(at, line) and not at._over and "amount" in _said(at, "sql SELECT 'amount'")


def test_no_call_outlasts_its_time():
    loop = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t"
    at, began = env("desk"), time.monotonic()
    at._env.words.toolbox.tools["sql"].run("SELECT 1")
    assert "did not end within" in _said(at, f"sql {loop}")

    def forever(_):
        while True:
            pass

    short = Toolbox([Tool("wait", "", forever)], seconds=0.3)
    assert short.call("wait", "").text == "tool 'wait' failed: it did not end within 0.3 s"
    box = Toolbox([Tool("die", "", lambda _: __import__("os")._exit(3)), Tool("talk", "", lambda _: "x" * 10**6),
                   Tool("fail", "", lambda _: [][1])], seconds=30.0)
    assert "ended without an answer" in box.call("die", "").text and not box.call("die", "").ok
    assert len(box.call("talk", "").text) == box.longest
    assert box.call("fail", "").text == "tool 'fail' failed: IndexError: list index out of range"
    assert apart(lambda text: text[::-1], "abc", 30.0) == ("cba", True)
    assert time.monotonic() - began < 60


def test_the_calculator():
    assert [reckon(t) for t in ("3 + 4 * 2", "-(7 - 9)", "7 / 2", "7 // 2", "8 % 3", "6 / 3")] == [
        "11", "2", "3.5", "3", "2", "2"]
    with pytest.raises(ValueError, match="above"):
        reckon("9999999999 * 9999999999")


@pytest.mark.parametrize("name", ["desk", "sums", "errands"])
def test_a_small_policy_acts_there(name, tmp_path):
    recipe = {"name": name, "model": {"name": "policy"}, "space": "full", "method": "fed_marl", "rounds": 1,
              "local": {"optimizer": "sgd", "lr": 20.0},
              "data": {"source": f"env:{name}", "environment": {"clients": 2, "max_steps": 6, "width": 64}}}
    run = fedllm.run(recipe, root=tmp_path)
    assert fedllm.run(recipe, root=tmp_path, engine="in_process").evaluation == run.evaluation
    assert {"return", "cut"} <= set(run.evaluation["global"])


@pytest.mark.parametrize("change, says", [
    ({"data.environment.may": ["fly"]}, "may"), ({"data.source": "env:errands", "data.environment.may": ["write"]},
                                                  "has no tools"), ({"data.environment.own": 9}, "own = 9")])
def test_bad_policies_and_parameters_are_refused(change, says, tmp_path):
    recipe = {"name": "d", "model": {"name": "policy"}, "space": "full", "method": "fed_marl", "rounds": 1,
              "data": {"source": "env:desk", "environment": {"clients": 2}}}
    with pytest.raises(RecipeError, match=says):
        fedllm.run(recipe, root=tmp_path, **change)
