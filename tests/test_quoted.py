"""What README and docs name is there: commands and their options, modules, make's targets, files; and their figures.

Blocks of shell are parsed whole by tests/test_docs.py; here it is the code between words, and tools beside `fedllm`.
"""

import importlib.util
import json
import re
from pathlib import Path

import click
import pytest
import typer

from fedllm.cli.main import app

ROOT = Path(__file__).parents[1]
HISTORY = {ROOT / "docs" / "decisions.md"}
"""Pages that also tell what was; a path there may be gone."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
COMMANDS = typer.main.get_command(app)
MADE = re.compile("fedhalf")
"""What a page has its reader write."""
ROOMS = ("fedllm", "evidence", "tests", "docs", "recipes", "benchmarks")


def codes(page):
    """The pieces of code on a page, between words and in shell blocks line by line."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```$", text, re.M | re.S)
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines = [re.sub(r"(^|\s)#.*", "", line) for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    for piece in [*re.findall(r"`([^`\n]+)`", plain), *lines]:
        yield from (part.strip() for part in re.split(r"&&|;|\s·\s|\|", piece))


def wrong(code):
    """What is wrong with a command, or nothing."""
    words = code.split()
    if words[:1] == ["fedllm"] and len(words) > 1:
        at, rest = COMMANDS, words[1:]
        while isinstance(at, click.Group) and rest and rest[0] in at.commands:
            at, rest = at.commands[rest[0]], rest[1:]
        if isinstance(at, click.Group) and at.name != "audit" and rest[:1] != ["--version"]:
            return f"{words[1]!r} is no command"
        mine = {o for p in at.params for o in [*p.opts, *p.secondary_opts]}
        gone = [w for w in rest if re.match(r"--[a-z]", w) and w not in mine | {"--help", "--version", "--debug"}]
        return f"{at.name} has no {gone}" if gone and not at.ignore_unknown_options else ""
    if words[:1] == ["make"] and len(words) > 1:
        return "" if words[1] in TARGETS else f"no target {words[1]!r}"
    if words[:2] == ["python", "-m"] and words[2].partition(".")[0] in ROOMS:
        return _module(words[2], words[3:])
    return ""


def _module(name, rest):
    if (found := importlib.util.find_spec(name)) is None or found.origin is None:
        return f"no module {name}"
    files = [Path(found.origin)]
    if found.submodule_search_locations is not None:
        files = [files[0].with_name("__main__.py")]
        if not files[0].is_file():
            return f"{name} is not to be run"
    text = files[0].read_text()
    if files[0].name != "__main__.py" and '__name__ == "__main__"' not in text:
        return f"{name} is not to be run"
    return ", ".join(f"{name} has no {w}" for w in rest if w.startswith("--") and f'"{w}"' not in text)


def test_commands_between_words_are_there():
    assert {f"{page.relative_to(ROOT)}: {c}": why for page in PAGES for c in codes(page) if (why := wrong(c))} == {}


@pytest.mark.parametrize(("code", "said"), [
    ("fedllm rum x.yaml", "'rum' is no command"), ("fedllm advise x.yaml --bits 3", "--bits"),
    ("make coffee", "coffee"),
    ("python -m evidence.claim", "no module"), ("python -m evidence.verdict", "not to be run"),
    ("python -m evidence.claims --tables", "--tables")])
def test_a_wrong_one_would_be_found(code, said):
    assert said in wrong(code)


def test_files_that_pages_name_are_there():
    gone = []
    for page in PAGES:
        for code in set(codes(page)) if page not in HISTORY else ():
            if re.fullmatch(rf"(?:{'|'.join(ROOMS)})/[\w./-]+", code) and not MADE.search(code):
                gone += [] if list(ROOT.glob(code.rstrip("/") + "*")) else [(str(page.relative_to(ROOT)), code)]
    assert gone == []


RESULTS = json.loads((ROOT / "docs" / "results" / "bench.json").read_text())["rows"]


def rows(page):
    """The cells of each row of the page's tables."""
    for line in page.read_text().splitlines():
        if line.startswith("| "):
            yield [c.strip() for c in line.strip()[1:-1].split("|")]


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_quoted_rows_of_the_bench_are_those_of_its_file(page):
    """Figure, gate and verdict of every row that a page shows."""
    known = {r["name"] + (f", against {r['baseline']}" if r["baseline"] else ""): r for r in RESULTS}
    quoted = [cells for cells in rows(ROOT / page) if cells[0] in known]
    assert len(quoted) >= 10
    for name, *told in quoted:
        row = known[name]
        holds = {True: "yes", False: "**no**"}[row["pass"]] if row["gate"] is not None else ""
        assert told == [f"{row['value']:.4g} {row['unit']}", f"{row['gate']:g}" if row["gate"] else "", holds], name
    assert not [c[0] for c in rows(ROOT / page) if re.match(r"(svd|codec|simulation|aggregation|scale)/", c[0])
                and c[0] not in known]


def test_the_page_of_methods_is_that_of_the_cards_and_their_measured_claims(tmp_path):
    """CONTRIBUTING.md: a card that was changed has its page made anew, and so have new figures."""
    from evidence.claims import claimed
    from evidence.pages.verdicts import write_table

    rows = {r["method"]: r for r in json.loads((ROOT / "docs" / "results" / "claims.json").read_text())}
    (tmp_path / "results").mkdir()
    old = "claims_old_rules.json"
    (tmp_path / "results" / old).write_bytes((ROOT / "docs" / "results" / old).read_bytes())
    write_table(claimed(), rows, tmp_path)
    assert (tmp_path / "methods.md").read_text() == (ROOT / "docs" / "methods.md").read_text(), (
        "docs/methods.md is another page than `python -m evidence.claims --table` writes")
