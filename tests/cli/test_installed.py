"""What an installed fedllm says names only what is installed: no page, recipe, tool or target of a checkout."""

import ast
import io
import re
from pathlib import Path

import pytest
import typer
from rich.console import Console

import fedllm
from fedllm.cli.guard import stopped
from fedllm.cli.tables import client_table, show_method
from fedllm.core.errors import RecipeError
from fedllm.methods.registry import METHODS
from fedllm.runs.recipe import load_recipe
from fedllm.runs.result import Result
from fedllm.runs.terminal import progress_bars

PACKAGE = Path(fedllm.__file__).parent
OF_A_CHECKOUT = re.compile(r"\bdocs/|\brecipes/|`make [a-z]+`|\bpython -m evidence|\bevidence/|\btests/")


def said(file):
    """The texts of a module that it may say: all strings, of docstrings those of commands (they are its help)."""
    apart = set()
    for node in ast.walk(ast.parse(file.read_text())):  # whoever holds a text comes before it
        if isinstance(body := getattr(node, "body", None), list) and file.parent.name != "cli":
            apart |= {line.value for line in body if isinstance(line, ast.Expr)}
        if isinstance(node, ast.JoinedStr):  # one sentence, whose parts belong together
            parts = [v for v in node.values if isinstance(v, ast.Constant)]
            apart |= set(parts)
            yield "".join(v.value for v in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in apart:
            yield node.value


def test_no_word_to_the_user_names_what_only_a_checkout_has():
    """Cards apart: what they say of a paper and of its trials is read in the docs too."""
    files = [f for f in PACKAGE.rglob("*.py") if f.parent.parent.name != "methods"]
    some = [f for f in files if OF_A_CHECKOUT.search(f.read_text())]
    found = {f"{f.relative_to(PACKAGE)}: {text[:90]}" for f in some for text in said(f)
             if OF_A_CHECKOUT.search(text) and "checkout" not in text}
    assert len(files) > 300 and found <= {"cli/measure.py: Run the claim of every method's card, and write "
                                          "docs/results/claims.json."}


def test_a_recipe_of_the_projects_is_sought_where_there_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="lies in a checkout of fedllm, and `fedllm demo` leaves a recipe"):
        load_recipe("recipes/demo.yaml")


def test_a_card_says_on_how_many_seeds_its_claim_is_measured(capsys):
    for name in sorted(METHODS.ours)[::9]:
        show_method(Console(width=200), name)
    told = capsys.readouterr().out
    assert "None seeds" not in told and "seeds)" in told


@pytest.mark.parametrize("width", [80, 120])
def test_the_demos_table_of_clients_is_read_on_a_narrow_terminal(width, tmp_path):
    own = {f"office-{i}": {"exact_match": 0.875, "loss": 4.203} for i in range(8)}
    alone = {"local_only": {"clients": own, "global": None}, "centralized": {"clients": own, "global": None}}
    result = Result(folder=tmp_path, method="fedavg", engine="vectorized", rounds=6, seed=0, bytes={}, seconds=1.0,
                    peak_memory_bytes=1, state_digest="", evaluation={
                        "clients": own, "before": {"clients": own, "global": None}, "baselines": alone})
    console = Console(width=width, record=True, file=(tmp_path / "said").open("w"))
    console.print(client_table(console, result))
    text = console.export_text()
    assert "…" not in text and "office-7" in text and "local only" in text and "centralized" in text
    assert ("loss: in the report" in text) == (width == 80)


@pytest.mark.parametrize(("error", "said"), [
    (KeyboardInterrupt(), "stopped by hand: nothing was kept yet"),
    (KeyboardInterrupt("stopped by hand: 2 of 3 rounds are kept"), "stopped by hand: 2 of 3 rounds are kept")])
def test_whoever_presses_ctrl_c_is_told_what_is_kept(error, said, capsys):
    """Also before a run has anything to say: an exception without words is one nevertheless."""
    with pytest.raises(typer.Exit) as ended, stopped("nothing was kept yet"):
        raise error
    assert ended.value.exit_code == 130 and capsys.readouterr().err.strip() == said


def test_the_time_left_is_read_on_a_narrow_terminal():
    with progress_bars(Console(width=80, force_terminal=True, file=io.StringIO())) as shown:
        shown.rounds(60, 1)
        shown.round(1, 3)
        shown.bars.update(shown.outer, left=3723.0, note="training loss 4.066")
        shown.bars.update(shown.inner, note="3 of 3 clients answered, 1,401 tokens/s")
        paper = Console(width=80, record=True, file=io.StringIO())
        paper.print(shown.bars.get_renderable())
    lines = paper.export_text().splitlines()
    assert len(lines) == 2 and "1/60 0:00:00 1:02:03 left training loss 4.066" in lines[0], lines
    assert "3 of 3 clients answer" in lines[1], lines
