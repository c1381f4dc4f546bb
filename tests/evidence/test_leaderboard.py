"""The leaderboard: small real cells, killed and gone on with; names that are none; pages from rows."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import yaml

from evidence.leaderboard.__main__ import main
from evidence.leaderboard.board import Board, read_rows
from evidence.leaderboard.brief import PACKED, brief, pack
from evidence.leaderboard.cells import make_cell
from evidence.leaderboard.code import _bare, code_of
from evidence.leaderboard.figures import said_of, spread
from evidence.leaderboard.fit import TRIES, family, forms, points, trains
from evidence.leaderboard.page import told, write_pages
from evidence.leaderboard.worlds import FIRST, WORLDS, World
from evidence.verdict import TUNED
from fedllm.core.errors import RecipeError, RunError
from fedllm.methods.registry import METHODS
from fedllm.runs.recipe import read_recipe
from fedllm.runs.result import Result


@pytest.fixture
def tiny(recipe):
    """Two rounds of two clients of a random model: a cell takes a second."""
    whole = {"model": {"name": recipe["model"], "fast_kernels": False}, "rounds": 2, "energy": {},
             "local": {"steps": 2, "batch_size": 2, "max_length": 16}, "space": {"name": "lora", "rank": 4},
             "data": recipe["data"] | {"partition": {"kind": "iid", "clients": 2}, "limit": 40},
             "evaluate": {"exact_match": False, "samples": 0}}
    rates = {"": (1e-9, 0.02, 0.03), "full": (1e-3,) * 3, "sgd": (0.1,) * 3}
    return {"tiny": World("Tiny", "Two clients.", whole, rates)}


@pytest.mark.slow
def test_a_board_is_killed_gone_on_with_and_one_of_its_cells_repeated(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_DATA", str(tmp_path))
    file, room, ask = tmp_path / "docs" / "results" / "leaderboard.json", tmp_path / "room", ["fedit", "fed_dpo"]

    def board(**more):
        return Board(file, room, tiny, seeds=(4000,), tries=2, **more)

    child = os.fork()
    if not child:
        board().go(ask)
        os._exit(0)
    done = _waited(lambda: sorted(room.glob("cells/tiny/fedit-*/cost.json")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    first = done[0].stat().st_mtime_ns
    said = []
    rows = {r["method"]: r for r in board(tell=said.append).go(ask)}
    assert done[0].stat().st_mtime_ns == first, "a finished cell was run again"
    row = rows["fedit"]
    assert row["status"] == "measured" and row["rates"] == {"local.lr": 0.02}
    assert list(row["tried"]) == ["lr=1e-09", "lr=0.02"]
    assert row["seeds"] == [4000] and row["up"] > 0 and row["joules"] > 0 and row["memory"] > 1e6
    assert not row["own_part"] and row["remember"] == 0 and row["gradients"]
    cell = room / "cells" / "tiny" / row["cells"]["4000"]
    assert Result.load(cell).state_digest == row["digests"]["4000"] and not (cell / "checkpoints").exists()
    assert yaml.safe_load((cell / "recipe.yaml").read_text())["seed"] == 4000 and TUNED[0] == 2000
    refused = rows["fed_dpo"]
    assert refused["status"] == "refused" and "preference" in refused["why"] and "cells" not in refused

    said.clear()
    board(tell=said.append).go(ask)
    assert not said and read_rows(file)["tiny", "fedit"] == row, "what is done is not done again"
    assert board(budget=1e-9).go(["fedit"]) == [row]  # what is there costs no budget

    console = _Lines()
    main(["--repeat", "tiny/fedit/4000", "--out", str(tmp_path / "docs"), "--room", str(room)], tiny, console)
    assert "the very state of the row" in console.text
    with pytest.raises(RecipeError, match="tiny/fedit/4000"):
        main(["--repeat", "tiny/fedit/4007", "--out", str(tmp_path / "docs"), "--room", str(room)], tiny, console)


def _waited(what, seconds=120.0):
    ends = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < ends, "nothing was finished in time"
        time.sleep(0.05)
    return found


class _Lines:
    """Keeps what is said."""

    text = ""

    def print(self, text, **kwargs):
        self.text += text + "\n"


def test_a_damaged_cell_and_a_run_that_fails_are_rows_with_their_sentence(tiny, tmp_path):
    world = tiny["tiny"]
    form = next(forms("fedavg", world))
    cell = make_cell("tiny", world, tmp_path, form, points("fedavg", world, form)[0], TUNED[0])
    folder = tmp_path / "cells" / "tiny" / cell.name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"method": "fed')
    (row,) = Board(tmp_path / "l.json", tmp_path, tiny, seeds=(4000,), tries=1).go(["fedavg"])
    assert row["status"] == "failed" and all(w in row["why"] for w in (str(folder), "damaged", "remove"))
    kept = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert [r["method"] for r in kept] == ["fedavg"]
    write_pages(kept, tmp_path / "docs", tiny)
    assert "damaged" in (tmp_path / "docs" / "leaderboard.md").read_text()
    shutil.rmtree(folder)
    other = replace(world, recipe={**world.recipe, "rounds": 1})
    again = make_cell("tiny", other, tmp_path, form, points("fedavg", world, form)[0], TUNED[0])
    assert again.name != cell.name, "another recipe is another cell"


def test_names_that_are_none_are_refused_before_anything_is_made(tmp_path):
    room = str(tmp_path / "room")
    ten = "fedavg,fedit,fedprox,scaffold,fedavgg,rolora,slora,hetlora,flexlora,florist"
    with pytest.raises(RecipeError, match="--method 'fedavgg' is unknown; did you mean 'fedavg'"):
        main(["--method", ten, "--room", room, "--out", room])
    with pytest.raises(RecipeError, match=r"--world 'sst3' is unknown; did you mean 'sst2'.*Allowed: sst2, news"):
        main(["--world", "sst3", "--room", room, "--out", room])
    for option in (["--budget", "0"], ["--seeds", "0"]):
        with pytest.raises(RecipeError, match=option[0]):
            main([*option, "--room", room, "--out", room])
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(RunError, match="holds no leaderboard"):
        read_rows(tmp_path / "bad.json")
    assert not (tmp_path / "room").exists()


def test_every_method_has_as_many_tries_and_a_form_that_a_recipe_can_hold():
    assert set(FIRST) <= set(METHODS)
    for name, world in WORLDS.items():
        assert all(len(set(rates)) == TRIES for rates in world.rates.values())
        base = {**json.loads(json.dumps(dict(world.recipe))), "name": "cell"}
        for method in METHODS:
            first = next(forms(method, world))
            tried = points(method, world, first)
            assert len(tried) == TRIES and len({repr(p) for p in tried}) == TRIES, (name, method)
            assert len({p["local.lr"] for p in tried}) == TRIES
            recipe = read_recipe({**base, "data": {"source": "x.jsonl"}}, {**first, **tried[0]})
            assert recipe.method.name == method and recipe.rounds == world.recipe["rounds"]
            if "steps" in recipe.method.knobs:
                assert recipe.method.knobs["steps"] == world.recipe["local"]["steps"]
    assert trains("fedavg") and not trains("fed_sp_sc")
    assert said_of("fedmezo")["gradients"] is False and said_of("scaffold")["gradients"] is True
    json.dumps([said_of(m) for m in METHODS])


def test_the_digest_of_code_is_of_what_is_computed(tmp_path):
    a, b, c = (tmp_path / f"{n}.py" for n in "abc")
    a.write_text('"""Doc."""\n\ndef f(x):\n    """Says."""\n    return x + 1  # why\n')
    b.write_text("def f(x):\n    return x + 1\n")
    c.write_text("def f(x):\n    return x + 2\n")
    assert _bare(a) == _bare(b) != _bare(c)
    assert code_of("fedavg") != code_of("fedprox")


def test_intervals_are_students():
    got = spread([0.6, 0.7, 0.8])
    assert got["mean"] == pytest.approx(0.7)
    assert got["high"] - got["mean"] == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert spread([0.5]) == {"mean": 0.5, "low": None, "high": None, "each": [0.5]} and spread([]) is None
    assert told([0.712, 0.682, 0.742], "accuracy") == "71.2 % ± 3.0" and told([4.5, None, None], "loss") == "4.500"


def row(method, world="sst2", quality=0.6, up=1e6, **more):
    figure = {WORLDS[world].metric: {**spread([quality, quality + 0.01]), "better": "max"}}
    return {"world": world, "method": method, "family": family(method), "status": "measured", "why": "",
            "code": code_of(method), **said_of(method), "form": {"space": {"name": "lora"}},
            "rates": {"local.lr": 0.01}, "tried": {},
            "seeds": [4000, 4001], "global": figure, "personal": figure, "up": up, "down": up, "cpu_seconds": 5.0,
            "memory": 7e8, "joules": 100.0, "tokens": 1.0, "flops": 1.0, "remember": 0, "own_part": False,
            "digests": {}, "cells": {}, "failed": {}, **more}


def some_rows():
    out = {"world": "sst2", "method": "fed_dpo", "family": "alignment", "status": "refused",
           "why": "it wants <pairs> | rows", "code": "x", **said_of("fed_dpo")}
    return [row("fedavg", quality=0.7), row("fedit", quality=0.6, up=2e6), row("local_only", quality=0.5, up=0.0),
            row("centralized", quality=0.9, up=0.0, code="old"), row("fedavg", "instructions", 5.0), out]


def test_pages_say_what_the_rows_say(tmp_path):
    write_pages(some_rows(), tmp_path, cpu="A processor")
    page = (tmp_path / "leaderboard.md").read_text()
    assert "| `fedavg` | 70.5 % ± 6.4 | +10.0 ± 0.0 | 70.5 %" in page
    assert "`centralized`*" in page and "Measured on A processor" in page
    assert "- `fed_dpo`: it wants <pairs> \\| rows" in page and page.index("`centralized`") < page.index("`fedit`")
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (tmp_path / link).is_file(), link
    html = (tmp_path / "leaderboard-sortable.html").read_text()
    assert not re.findall(r"(?:src|href)=.https?:|@import|url\(", html) and "/*ROWS*/" not in html
    inside = json.loads(re.search(r'type="application/json">(.*?)</script>', html)[1])
    front = {r["method"]: r["front"] for r in inside["rows"] if r["world"] == "sst2"}
    assert front == {"fedavg": ["global", "personal"], "fedit": [], "local_only": ["personal"], "centralized": [],
                     "fed_dpo": []}
    assert list(inside["worlds"]) == ["sst2", "instructions"] and inside["worlds"]["instructions"]["better"] == "min"
    write_pages([], tmp_path / "none")
    assert "Leaderboard" in (tmp_path / "none" / "leaderboard.md").read_text()


def test_the_copy_in_the_package_is_that_of_the_docs():
    rows = list(read_rows(PACKED.parents[2] / "docs" / "results" / "leaderboard.json").values())
    kept, now = json.loads(PACKED.read_text()), json.loads(json.dumps(brief(rows)))
    for told_ in (kept, now):
        for r in told_["rows"]:
            r.pop("stale")  # code goes on, rows stay
    assert kept == now, "write it anew: python -m evidence.leaderboard --table"


def test_the_page_sorts_and_filters(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("apt-get install chromium")
    write_pages(some_rows(), tmp_path)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 900})
        wrong = []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto((tmp_path / "leaderboard-sortable.html").as_uri())

        def shown():
            return page.eval_on_selector_all("tbody tr", "rows => rows.map(r => r.dataset.method)")

        assert shown() == ["centralized", "fedavg", "fedit", "local_only"]
        page.get_by_role("button", name="method", exact=False).first.click()
        assert shown() == ["centralized", "fedavg", "fedit", "local_only"]
        page.get_by_role("button", name="method", exact=False).first.click()
        assert shown() == ["local_only", "fedit", "fedavg", "centralized"]
        page.get_by_role("button", name="up", exact=True).click()
        assert shown()[0] == "fedit"
        page.select_option("#show", "not")
        assert shown() == ["fed_dpo"] and "it wants <pairs>" in page.locator("tbody").inner_text()
        page.select_option("#show", "all")
        page.fill("#text", "fedi")
        assert shown() == ["fedit"]
        page.fill("#text", "")
        page.select_option("#world", "instructions")
        assert shown() == ["fedavg"] and page.locator("#chart circle").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 400 and not wrong
        browser.close()


def test_a_packed_board_holds_no_more_than_is_read(tmp_path):
    pack(some_rows(), tmp_path / "l.json")
    packed = json.loads((tmp_path / "l.json").read_text())
    assert "digests" not in packed["rows"][0] and packed["worlds"]["sst2"]["task"] == "classification"
