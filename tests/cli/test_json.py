"""Every command answers a program, in the shape that it tells beforehand."""

import json

import click
import jsonschema
import pytest
import typer

from fedllm.cli import main as cli
from fedllm.cli.shapes import SHAPES, schema_of

TOOLS = {"bench", "claims"}
"""Tools of a checkout, with command lines of their own."""


def commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def said(capsys, *words):
    """What the command prints, each line held to its shape."""
    try:
        cli.main([*words, "--json"])
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in SHAPES)
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        jsonschema.validate(line, schema_of(name))
    return code, lines, err


def test_every_command_has_it_and_every_shape_a_command():
    found = dict(commands(typer.main.get_command(cli.app)))
    assert found.keys() - TOOLS == SHAPES.keys()
    for name in SHAPES:
        assert any("--json" in p.opts for p in found[name].params), name


def test_a_run_and_what_is_done_with_it(capsys, recipe, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    recipe |= {"rounds": 2, "record": {"replies": True}, "evaluate": {"exact_match": False, "max_new_tokens": 2}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, lines, _ = said(capsys, "run", "r.yaml")
    assert not code and lines[0]["event"] == "begin" and lines[-1]["event"] == "result"
    folder = lines[-1]["folder"]
    assert said(capsys, "resume", folder, "rounds=3")[1][-1]["rounds"] == 3
    assert said(capsys, "replay", folder)[1][0]["same"]
    assert said(capsys, "report", folder)[1][0]["report"].endswith("report.html")
    assert said(capsys, "export", folder)[1][0]["model"]
    assert said(capsys, "track", folder, "--to", "tensorboard")[1][0]["told"]
    assert said(capsys, "status", folder)[1][0]["rounds"] == 3
    assert json.loads(said(capsys, "logs", folder)[1][-1]["line"])
    assert said(capsys, "audit", "verify", folder)[1][0]["intact"]
    assert said(capsys, "audit", "key", "keys")[1][0]["key"]
    assert said(capsys, "audit", "seal", folder, "--key", "keys/audit.key")[1][0]["sealed"]
    typed = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert said(capsys, "chat", folder)[1][0]["typed"] == "Hello"
    (tmp_path / folder / "events.jsonl").write_text("{}\n")
    code, lines, _ = said(capsys, "audit", "verify", folder)
    assert code == 1 and lines[0]["findings"]


def test_what_needs_no_run(capsys, recipe, rows_file, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "rounds": 1}))
    assert said(capsys, "plan", "r.yaml")[1][0]["up"] > 0
    assert said(capsys, "methods", "fedavg")[1][0]["id"] == "fedavg"
    assert len(said(capsys, "recipe", "--keys")[1][0]["keys"]) > 50
    assert said(capsys, "schema", "plan")[1][0]["title"] == "Planned"
    assert said(capsys, "group", str(rows_file), "--out", "g", "--key", "random:4")[1][0]["groups"] == 4
    assert said(capsys, "keys", "new", "a", "b", "--federation", "f")[1][0]["kits"].endswith("kits")
    assert said(capsys, "keys", "revoke", "b", "--federation", "f")[1][0] == {"site": "b", "state": "revoked"}


@pytest.mark.parametrize("words,kind,says", [
    (["plan", "nowhere.yaml"], "RecipeError", "nowhere.yaml"), (["status", "nowhere"], "RunError", "nowhere"),
    (["schema", "plam"], "RecipeError", "did you mean 'plan'")])
def test_an_error_is_one_object_on_the_other_stream(capsys, words, kind, says):
    code, lines, err = said(capsys, *words)
    told = json.loads(err.splitlines()[-1])
    assert code and not lines and told["error"] == kind and says in told["says"]
