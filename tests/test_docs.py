"""Every block in README and docs runs: Python as it stands, recipes through the recipe's own checks, commands parsed.

A block whose first line is `# name.py` is also a file of that name in the folder where the page's blocks run. A block
that takes more than seconds says why in a comment of HTML before it, `<!-- long: why -->`, and is compiled only.
"""

import json
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer
import yaml

import fedllm
from fedllm.cli.main import app
from fedllm.federation.settings import SiteSettings
from fedllm.runs.complaints import Yaml
from fedllm.runs.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LONG = 3
SHORTENED = {"README.md": 1}
"""Pages with blocks that have `...` in the place of a card, which the tutorial has in full, and how many."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    long: str

    @property
    def where(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self):
        named = re.match(r"# ([\w-]+\.(?:py|yaml))\n", self.text)
        return named and named[1]


def blocks(page):
    """The fenced blocks of a page."""
    text, found = page.read_text(), []
    for m in re.finditer(r"(?:<!-- long: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], m[3], m[1] or ""))
    return found


ALL = [b for page in PAGES for b in blocks(page)]


def pages(*languages):
    """The pages that have such blocks, each with them."""
    return [pytest.param(found, id=str(p.relative_to(ROOT)))
            for p in PAGES if (found := [b for b in ALL if b.page == p and b.language in languages])]


def commands(text):
    """The `fedllm` commands of a shell block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        for piece in re.split(r"&&|;|\s·\s|\|", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(piece)
            words = words[1:] if words[:1] == ["do"] else words
            if words[:1] == ["fedllm"]:
                yield words[1 : next((i for i, w in enumerate(words) if w in (">", "&", "2>&1")), None)]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama_folder):
    """A folder like a checkout's, whose demo is tiny and has been run."""
    rows = [{"prompt": f"say {a} the {b}", "response": f"{a} {b}"} for a in ("red", "green", "blue", "one", "two")
            for b in ("cat", "dog", "bird", "word")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text(yaml.safe_dump({
        "model": tiny_llama_folder, "rounds": 1, "space": {"name": "lora", "rank": 2},
        "data": {"source": "records.jsonl", "partition": {"kind": "iid", "clients": 2}, "test": 0.2},
        "local": {"steps": 2, "batch_size": 4, "lr": 1e-2}, "evaluate": {"exact_match": False, "samples": 0}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("found", pages("python"))
def test_python_runs_as_it_stands(found, folder, monkeypatch):
    if any("runs/demo" in b.text for b in found):
        fedllm.run("recipes/demo.yaml")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    left = SHORTENED.get(str(found[0].page.relative_to(ROOT)), 0)
    for block in found:
        code = compile(block.text, block.where, "exec")
        if '="..."' in block.text and left:
            left -= 1
            continue
        if block.file:
            Path(block.file).write_text(block.text)
        if not block.long:
            exec(code, vars(page))
    assert left == 0


@pytest.mark.parametrize("found", pages("yaml"))
def test_yaml_is_a_recipe_or_a_policy(found):
    for block in found:
        doc = yaml.load(block.text, Loader=Yaml)
        if doc.keys() <= Recipe.model_fields.keys():
            load_recipe({"name": "block", **doc})
        else:
            assert doc.keys() <= SiteSettings.model_fields.keys(), block.where
            SiteSettings.make({"data": "rows.jsonl", "store": "memory", **doc})


@pytest.mark.parametrize("found", pages("bash", "sh"))
def test_commands_are_those_of_the_command_line(found):
    for block in found:
        for words in commands(block.text):
            at, words = typer.main.get_command(app), list(words)
            while isinstance(at, click.Group):
                context = at.make_context("fedllm", words)
                _, at, words = at.resolve_command(context, [*context._protected_args, *context.args])
            try:
                at.make_context("fedllm", words)
            except click.MissingParameter:  # the front page shortens `join` to its address
                assert str(block.page.relative_to(ROOT)) in SHORTENED, block.where


def test_few_blocks_are_not_run():
    assert sum(bool(b.long) for b in ALL) <= MOST_LONG
    assert not [b.where for b in ALL if b.language not in ("python", "yaml", "bash", "sh", "", "text", "toml", "json")]


def test_a_wrong_command_would_be_found():
    page = ROOT / "docs" / "x.md"
    with pytest.raises(click.UsageError, match="rum"):
        test_commands_are_those_of_the_command_line([Block(page, 1, "sh", "fedllm rum recipe.yaml\n", "")])
    assert list(commands("for m in a b; do fedllm run x.yaml method=$m; done  # all\n")) == [
        ["run", "x.yaml", "method=$m"]]
