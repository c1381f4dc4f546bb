"""The docs as a site build without a warning, every link leads somewhere, and the notebooks run as they stand."""

from pathlib import Path

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbclient import NotebookClient

from fedllm.methods.registry import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The site, built strictly; the pages from docstrings only where they are asked for."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")

    def made(api):
        plugins = {} if api else {"plugins": []}
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), **plugins))  # strict: Abort on a warning
        return tmp_path

    return made


def test_the_site_builds_strictly_with_a_card_for_each_method(site):
    at = site(api=False)
    assert "Federated large language models" in (at / "index.html").read_text()
    for name in METHODS.ours:
        page = (at / "cards" / f"{name}.html").read_text()
        assert METHODS[name].card.title.split(":")[0].replace("&", "&amp;") in page and "What it must show" in page
    listed = [line.split("](")[1].rstrip(")") for line in (at / "llms.txt").read_text().splitlines()
              if line.startswith("- ")]
    assert "tutorials/organizations.html" in listed and [p for p in listed if not (at / p).is_file()] == []


@pytest.mark.slow
def test_the_whole_site_with_the_api_from_docstrings(site):
    at = site(api=True)
    assert "dataclass" in (at / "api" / "fedllm.html").read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs_as_it_stands(path, tmp_path):
    book = nbformat.read(path, 4)
    assert all(not c.get("outputs") for c in book.cells), "outputs are left out, so that the file stays the same"
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs").is_dir() or (tmp_path / "comparisons").is_dir()
