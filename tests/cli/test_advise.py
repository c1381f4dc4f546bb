"""`fedllm advise`: what a recipe says, what the rows say, and what is refused."""

import json

import pytest
import yaml

from fedllm.advice import standing
from fedllm.advice.advise import Wants, advise, read_wants, unfit
from fedllm.cli import main as cli
from fedllm.core.errors import DataError, RecipeError
from fedllm.methods.registry import METHODS
from fedllm.runs.recipe import load_recipe


def row(method, loss, up=1e6, **more):
    figure = [loss, loss, loss]
    return {"world": "w", "method": method, "family": "f", "status": "measured", "why": "", "global": figure,
            "personal": figure, "up": up, "down": up, "cpu_seconds": 3.0, "memory": 1e8, "joules": 9.0,
            "title": method, "sends": "-", "kinds": [], "pooled": False, "serves": True, "ranks": False, "mixes": "",
            "gradients": True, "remember": 0, "own_part": False, "seeds": 3, "space": "lora", "rates": "", "front": [],
            "stale": False, "against": {"global": None, "personal": None}, **more}


ROWS = [row("fedit", 5.0, front=["global"]), row("flexlora", 4.0, ranks=True), row("scaffold", 4.5, up=2e6, remember=8),
        row("fedsa_lora", 4.2, up=5e5, own_part=True, remember=8, personal=[3.0, 3.0, 3.0]),
        row("ffa_lora", 5.2, up=4e5), row("fedmezo", 9.0, up=1e3, gradients=False),
        row("centralized", 1.0, pooled=True), row("local_only", 2.0, up=0.0, serves=False)]


@pytest.fixture(autouse=True)
def board(tmp_path, monkeypatch):
    """Rows of one world of generation, in the place of those that come with fedllm."""
    file = tmp_path / "board.json"
    world = {"title": "W", "about": "", "metric": "loss", "better": "min", "work": "", "task": "generation"}
    file.write_text(json.dumps({"worlds": {"w": world}, "rows": ROWS}))
    monkeypatch.setattr(standing, "FILE", file)
    standing.board.cache_clear()
    yield file
    standing.board.cache_clear()


def names(found):
    return [a.method for a in found.methods]


def test_the_best_that_the_recipe_builds_with_and_a_lighter_third(recipe):
    assert "counts on plain SGD" in advise(recipe).passed_over["scaffold"]  # the recipe's optimizer is AdamW
    found = advise({**recipe, "local": {**recipe["local"], "optimizer": "sgd"}})
    assert names(found) == ["flexlora", "fedsa_lora", "fedit"] and "sends more" in found.passed_over["scaffold"]
    first = found.methods[0]
    assert "1 of 6 on w by the global model's loss" in first.reasons and first.rows[0]["place"] == 1
    assert found.methods[1].bytes == pytest.approx(first.bytes / 2) and found.then.endswith("flexlora,fedsa_lora,fedit")
    assert found.methods[0].bytes > 0 and "no other is as good for fewer bytes there" in found.methods[2].reasons


def test_what_the_recipe_says_is_held_to(recipe):
    ranks = advise(recipe | {"clients": {"ranks": [1, 2]}})
    assert "flexlora" in names(ranks) and "fedsa_lora" in ranks.passed_over
    assert "each client trains the rank that it declares" in ranks.methods[0].reasons
    private = advise(recipe | {"layers": ["secagg"], "clients": {}})
    assert all("it runs under secagg" in a.reasons for a in private.methods)
    rare = {**recipe["data"], "partition": {"kind": "iid", "clients": 40}}
    said, wants = read_wants(load_recipe(recipe | {"data": rare, "clients": {"per_round": 2}}), Wants())
    assert wants.stateless and any("comes back rarely" in s for s in said)
    assert not read_wants(load_recipe(recipe), Wants())[1].stateless


def test_what_is_asked_for_is_held_to(recipe):
    assert "fedsa_lora" not in names(advise(recipe, Wants(stateless=True)))
    assert names(advise(recipe, Wants(personal=True))) == ["fedsa_lora"]
    assert names(advise(recipe, Wants(zeroth_order=True))) == ["fedmezo"]
    light = advise(recipe, Wants(bytes=advise(recipe).methods[1].bytes))
    assert "flexlora" not in names(light) and "above the limit" in light.passed_over["flexlora"]
    assert "fedsa_lora" in names(light)
    with pytest.raises(RecipeError, match=r"no method fits \(task generation, stateless clients, a model for each"):
        advise(recipe, Wants(personal=True, stateless=True))
    assert unfit("gossip", Wants(), []) == "" and "no row" in unfit("gossip", Wants(stateless=True), [])


def test_a_task_without_rows_gets_what_builds(recipe, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{i}", "chosen": f"w{i} w1", "rejected": "w2 w3"} for i in range(30)]
    pairs.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": str(pairs), "task": "preference", "partition": {"kind": "iid", "clients": 3}}
    found = advise(recipe | {"data": data, "evaluate": {"exact_match": False}, "clients": {}})
    assert "fed_dpo" in names(found) and found.methods[0].rows == [] and found.methods[0].bytes is None
    assert "has no row of it for this task" in found.methods[0].reasons[-1]


def test_a_recipe_that_no_method_can_help_is_refused_as_itself(recipe):
    with pytest.raises((RecipeError, DataError), match=r"nix\.jsonl"):
        advise(recipe | {"data": {"source": "nix.jsonl"}})


def test_the_command(recipe, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as ended:
        cli.main(["advise", str(path), "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["methods"][0]["method"] == "flexlora" and told["says"] == ["task generation"]
    for bad, said in ((["--bytes", "12XB"], "500kB"), (["--bytes", "0"], "above 0"), (["nix"], "no override")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["advise", str(path), *bad])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_packed_rows(monkeypatch, board):
    board.write_text("{")
    standing.board.cache_clear()
    with pytest.raises(RecipeError, match="make leaderboard"):
        standing.board()
    monkeypatch.undo()
    standing.board.cache_clear()
    assert {r["world"] for r in standing.board()["rows"]} <= set(standing.board()["worlds"])


def test_a_task_without_rows_goes_by_those_of_other_tasks(recipe, board):
    """Not by the alphabet: the first methods in a list of names are no advice."""
    told = json.loads(board.read_text())
    told["worlds"]["w"]["task"] = "classification"
    board.write_text(json.dumps(told))
    standing.board.cache_clear()
    found = advise(recipe | {"local": {**recipe["local"], "optimizer": "sgd"}}, overrides={"rounds": 3, "method.mu": 1})
    assert names(found) == ["flexlora", "fedsa_lora", "fedit"]
    assert "no row of this task" in found.says[-1] and found.methods[0].rows[0]["place"] == 1
    assert "1 of 6 on w by the global model's loss, which is another task" in found.methods[0].reasons
    assert found.then == "fedllm compare RECIPE rounds=3 --methods flexlora,fedsa_lora,fedit"
    board.write_text(json.dumps({"worlds": {}, "rows": []}))
    standing.board.cache_clear()
    assert {METHODS[n].card.topic for n in names(advise(recipe))} == {"baselines"}
