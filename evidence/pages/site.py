"""The docs as a site: what mkdocs calls while it builds (`mkdocs.yml`, `make docs`).

Added to the files of docs/: the README as the first page, a card for each method, layer, attack, audit and selector,
the API from docstrings, the notebooks, every file of the repository that a page links to, and llms.txt.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import fedllm
from evidence.claims import Entry, claimed
from evidence.pages.verdicts import figure_text, interval_text
from fedllm.audits.registry import audit_classes
from fedllm.cli.tables import allowed
from fedllm.core.card import Card
from fedllm.methods.registry import METHODS
from fedllm.runs.layers import layer_classes
from fedllm.selectors.registry import selector_classes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HOME = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository's root, and where they stand in the site."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash"}
LONGEST = 60_000
"""Characters of a file that a page shows; of a longer one the beginning."""
LEARN = ("tutorials/organizations.md", "tutorials/three-hospitals.md", "tutorials/researchers.md",
         "tutorials/engineers.md", "tutorials/administrators.md", "tutorials/real-model.md")
"""Tutorials in the order of readers; one that is not named here comes after them."""

Nav = list[Any]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of pages: a new page finds its place by its folder."""
    left = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}

    def take(*starts: str, first: tuple[str, ...] = ()) -> Nav:
        found = sorted((p for p in left if p.startswith(starts)), key=lambda p: (p not in first, first.index(p)
                       if p in first else 0, p))
        left.difference_update(found)
        return [{_title(DOCS / p): p} for p in found]

    methods, recipe = take("methods.md"), take("recipe.md")
    learn = take("tutorials/", first=LEARN) + [{_notebook(p)[0]: f"notebooks/{p.stem}.md"} for p in _notebooks()]
    reference, rooms, results = take("reference/"), take("rooms/"), take("results/")
    design = take("design.md", "decisions.md", "security.md", first=("design.md", "security.md"))
    howto = take("howto/") + take("")
    cards: dict[str, Nav] = defaultdict(list)
    for name, entry in mains().items():
        cards[entry.chapter.split(": ")[-1]].append({name: f"cards/{name}.md"})
    api: dict[str, Nav] = defaultdict(list)
    for module in modules() if "mkdocstrings" in config.plugins else ():
        api[module.split(".")[1]].append({module.removeprefix("fedllm."): f"api/{module}.md"})
    config.nav = [
        {"Home": ["index.md", {"Changes": "changelog.md"}]}, {"Learn": learn}, {"How to": howto},
        {"Methods": [*methods, *({k.capitalize(): v} for k, v in sorted(cards.items()))]},
        {"Reference": [*recipe, *reference, {"Python": [{"fedllm": "api/fedllm.md"},
                                                        *({k: v} for k, v in api.items())]}]},
        {"Design": [*design, {"Contributing": "contributing.md"}, {"Rooms": rooms}]}, {"Evidence": results}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All that is generated."""
    def add(at: str, text: str, **more: Any) -> None:
        files.append(File.generated(config, at, content=text, **more))

    for name, at in HOME.items():
        add(at, (ROOT / name).read_text())
    figures = {r["method"]: r for r in json.loads((DOCS / "results" / "claims.json").read_text())}
    for name, entry in mains().items():
        add(f"cards/{name}.md", card_page(name, entry, figures))
    names = sorted(fedllm.__all__) if "mkdocstrings" in config.plugins else []
    add("api/fedllm.md", "# fedllm\n\nWhat `import fedllm` gives.\n\n" + "".join(f"::: fedllm.{n}\n\n" for n in names))
    for module in modules() if names else ():
        add(f"api/{module}.md", f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n")
    for path in _notebooks():
        add(f"notebooks/{path.stem}.md", _notebook(path)[1])
    for path in sorted(linked()):
        add(f"source/{path}.md", source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
    add("llms.txt", llms(config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages in the site."""
    here = page.file.src_uri
    return LINK.sub(lambda m: _to(m[1], m[2] or "", here) if "://" not in m[1] else m[0], markdown)


def _origin(at: str) -> str:
    """Where in the repository a page of the site has its links from."""
    return next((name for name, home in HOME.items() if home == at), f"docs/{at}")


def _to(link: str, anchor: str, here: str) -> str:
    if here.startswith(("cards/", "api/", "source/")):
        return link + anchor
    target = normpath(str(PurePosixPath(_origin(here)).parent / link))
    at = _place(target)
    return relpath(at, str(PurePosixPath(here).parent)) + (anchor if at.endswith(target.rpartition("/")[2]) else "")


def _place(target: str) -> str:
    """The page of a file of the repository."""
    if target in HOME:
        return HOME[target]
    if target.startswith("docs/") and PurePosixPath(target).suffix not in ("", ".service", ".ipynb"):
        return target.removeprefix("docs/")
    if (ROOT / target / "README.md").is_file():
        return f"{target.removeprefix('docs/')}/README.md"
    name = PurePosixPath(target).stem
    if target.startswith("fedllm/") and name in mains() and mains()[name].source == ROOT / target:
        return f"cards/{name}.md"
    return f"source/{target}.md"


@functools.cache
def mains() -> Mapping[str, Entry]:
    """What has a card, by id."""
    return {name: entry for name, entry in claimed().items() if ":" not in name}


@functools.cache
def kinds() -> Mapping[str, Any]:
    """Their classes."""
    return {**layer_classes(), **selector_classes(), **audit_classes(), **METHODS}


@functools.cache
def linked() -> frozenset[str]:
    """Files and folders of the repository that pages link to, and that are no pages of the site themselves."""
    pages = [p for p in DOCS.rglob("*.md")] + [ROOT / name for name in HOME]
    found = set()
    for page in pages:
        for link in LINK.findall(page.read_text()):
            if "://" in link[0] or link[0].startswith("mailto:"):
                continue
            target = normpath(str(PurePosixPath(page.relative_to(ROOT).as_posix()).parent / link[0]))
            if (at := _place(target)).startswith("source/") and (ROOT / target).exists():
                found.add(at.removeprefix("source/").removesuffix(".md"))
    return frozenset(found)


def modules() -> list[str]:
    """The rooms' public modules, methods apart (they have cards)."""
    return sorted(m.name for m in pkgutil.walk_packages(fedllm.__path__, "fedllm.")
                  if m.name.count(".") > 1 and not m.ispkg and "._" not in m.name
                  and m.name.rpartition(".")[2] not in mains() and not m.name.startswith("fedllm.methods."))


def card_page(name: str, entry: Entry, figures: Mapping[str, Any]) -> str:
    """A method's card: what it is, what travels, its knobs, a recipe, what it must show and does, and its file."""
    card: Card = entry.card
    about = (kinds()[name].__doc__ or "").strip()
    section = "method" if name in METHODS else "select" if name in selector_classes() else "layers"
    recipe = {"method": {"name": name}, "select": {"name": name}, "layers": [{"name": name}]}
    lines = [f"# {card.title}", "", f"`{name}` · {card.paper}", "", f"**Travels**: {card.sends}", "",
             f"**Needs**: {card.needs}", ""]
    lines += [re.sub(r"\n +", "\n", about), ""] if about else []
    lines += [f"**Of the paper**: {card.evidence}", ""] if card.evidence else []
    if name not in audit_classes():
        lines += ["```yaml", yaml.safe_dump({section: recipe[section]}, sort_keys=False).strip(), "```", ""]
    knobs = [f for f in fields(kinds()[name]) if f.metadata.get("doc")]
    if knobs:
        lines += ["## Knobs", "", "| knob | default | allowed | what it does |", "|---|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.default}` | {_cell(allowed({'type': str(f.type), **f.metadata}))} | "
                  f"{_cell(f.metadata['doc'])} |" for f in knobs] + [""]
    lines += ["## What it must show", "", "| claim | figure | 95 % | seeds | verdict |", "|---|---|---|---|---|"]
    for word, claim in {"": card.claim, **card.also}.items():
        row = figures.get(name + (f":{word}" if word else ""))
        told = ("", "", "", "not measured") if row is None else (
            figure_text(row), interval_text(row), str(len(row["seeds"])), row["verdict"])
        lines.append("| " + " | ".join(map(_cell, (claim.says, *told))) + " |")
    lines += ["", f"How it is judged: [methods](../methods.md). `python -m evidence.claims {name}` measures it again."]
    lines += ["", f"## `{entry.source.relative_to(ROOT)}`", "", _fenced(entry.source)]
    return "\n".join(lines) + "\n"


def source_page(path: str) -> str:
    """A file as it stands, or what lies in a folder."""
    at = ROOT / path
    if at.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in at.iterdir() if not p.name.startswith((".", "__")))
        return f"# {path}/\n\n" + "".join(f"- `{n}`\n" for n in names)
    return f"# {path}\n\n{_fenced(at)}\n"


def _fenced(path: Path) -> str:
    text = path.read_text(errors="replace")
    cut = "" if len(text) <= LONGEST else f"\nThe first {LONGEST:,} of {len(text):,} characters.\n"
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{text[:LONGEST].rstrip()}\n````\n{cut}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _title(path: Path) -> str:
    """A page's own heading, up to a colon."""
    found = re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)
    return found[1].split(":")[0].replace("`", "") if found else path.stem


def _notebooks() -> list[Path]:
    return sorted((DOCS / "notebooks").glob("*.ipynb"))


def _notebook(path: Path) -> tuple[str, str]:
    """A notebook's title, and it as a page; outputs are left to who runs it."""
    cells = json.loads(path.read_text())["cells"]
    parts = [t if c["cell_type"] == "markdown" else f"```python\n{t}\n```" for c in cells
             for t in ["".join(c["source"])]]
    title = re.search(r"^# (.+)$", parts[0], re.MULTILINE)
    return title[1] if title else path.stem, "\n\n".join([*parts, f"The notebook: `docs/notebooks/{path.name}`"]) + "\n"


def llms(config: MkDocsConfig) -> str:
    """The site for language models (llmstxt.org): what this is, and each page with a sentence of it."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for section in config.nav or ():
        for title, pages in section.items():
            lines += [f"## {title}", "", *(f"- [{name}]({_page(at)})" for name, at in _flat(pages)), ""]
    return "\n".join(lines)


def _page(at: str) -> str:
    """Where mkdocs puts a page."""
    return at.removesuffix("README.md") + "index.html" if at.endswith("README.md") else f"{at.removesuffix('.md')}.html"


def _flat(pages: Nav) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for page in pages:
        for name, at in ({page: page} if isinstance(page, str) else page).items():
            out += _flat(at) if isinstance(at, list) else [(name, at)]
    return out
