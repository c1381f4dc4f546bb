"""One rule for every command: bad input ends with 2, what was begun and failed with 1."""

from __future__ import annotations

import json
import re

import pytest
import typer

from fedllm.cli.guard import refuse
from fedllm.cli.main import app, main
from fedllm.core import errors

WORDS = {
    "advise": ["nope.yaml"], "ask": ["nope", "why?"], "audit key": ["a.file/keys"], "audit run": ["nope"],
    "audit seal": ["nope", "--key", "k"], "audit verify": ["nope"], "bench": ["nope"], "chat": ["nope"],
    "claims": ["--nope"], "compare": ["nope.yaml"], "compliance": ["nope"], "dashboard": ["nope"], "demo": ["--nope"],
    "evaluate": ["nope"], "export": ["nope"], "group": ["nope.jsonl", "--out", "o", "--key", "k"],
    "join": ["localhost:1", "--data", "nope"],
    "judge": ["a", "b", "--data", "nope", "--endpoint", "http://localhost:1", "--model", "m"],
    "keys add": ["site-c"], "keys new": ["a", "--engine", "nope"], "keys restore": ["a"], "keys revoke": ["a"],
    "keys suspend": ["a"], "logs": ["nope"], "methods": ["nope"],
    "origin": ["nope.jsonl", "nope", "--nobody", "nope"], "plan": ["nope.yaml"], "recipe": [],
    "replay": ["nope"], "report": ["nope"], "resume": ["nope"], "run": ["nope.yaml"], "schema": ["nope"],
    "serve": ["nope.yaml"], "status": ["nope"], "stop": ["nope"], "track": ["nope", "--to", "wandb"],
}
"""A call of each command whose input is bad."""
PLAIN = ("bench", "claims", "schema")
"""Those that speak no JSON of their own, or nothing else."""
RECIPES = ["run", "plan", "serve", "compare", "advise"]


def leaves(group, path=()):
    for name, command in group.commands.items():
        yield from leaves(command, (*path, name)) if hasattr(command, "commands") else [" ".join((*path, name))]


def ends(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").write_text("x")
    return tmp_path


@pytest.mark.parametrize("command", sorted(leaves(typer.main.get_command(app))))
def test_bad_input_ends_with_2(command, here, capsys):
    words = [*command.split(), *WORDS[command]]
    assert ends(words) == 2
    said = capsys.readouterr().err
    assert said.strip() and "Traceback" not in said and "fault of fedllm" not in said
    if command not in PLAIN and "--nope" not in words:
        assert ends([*words, "--json"]) == 2
        last = json.loads(capsys.readouterr().err.splitlines()[-1])
        assert last["error"].endswith("Error") and last["says"]


@pytest.mark.parametrize("command", RECIPES)
@pytest.mark.parametrize("text", ["mehtod: fedavg", "[1, 2]", "data: {source: nope.jsonl}\nmethod: fedavg"])
def test_a_bad_recipe_ends_with_2(command, text, here):
    (here / "r.yaml").write_text(text)
    assert ends([command, "r.yaml"]) == 2


@pytest.mark.parametrize("words", [["audit", "key", "a.file/keys"], ["keys", "new", "a", "--federation", "a.file/x"]])
def test_a_place_that_cannot_be_written_is_no_fault_of_fedllm(words, here, capsys):
    assert ends(words) == 2
    said = "".join(capsys.readouterr().err.replace("│", " ").split())
    assert "a.file" in said and "Notadirectory" in said and "faultoffedllm" not in said


def test_what_was_begun_and_failed_ends_with_1(capsys):
    """Every error of the tree has its code: a new one has to be put on one side."""
    kinds = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FedLLMError)}
    failed = {"BudgetSpent", "ClientError", "DidNothing", "EndpointError", "PayloadError", "QuorumError", "RunFailed",
              "Withheld"}
    for kind in kinds:
        with pytest.raises(SystemExit) as end:
            refuse(kind("why \x1b[2J"))
        assert end.value.code == (1 if kind.__name__ in failed else 2), kind
        assert re.search(r"why \?", capsys.readouterr().err)  # no escape of a site reaches a terminal
