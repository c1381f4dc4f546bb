"""Comparisons: real cells in real processes, resumed and repeated; what cannot be compared is refused first."""

import json
import re

import pytest
import yaml

import fedllm
from fedllm.cli import main as cli
from fedllm.comparisons.axes import axes, slug
from fedllm.comparisons.chance import held_together, seeds_needed
from fedllm.comparisons.design import make_design
from fedllm.comparisons.figures import on_front, table_of
from fedllm.comparisons.page import as_markdown, report_html
from fedllm.comparisons.pictures import front
from fedllm.comparisons.pool import pool
from fedllm.comparisons.told import Comparison
from fedllm.comparisons.weighed import ends
from fedllm.core.errors import RecipeError, RunError
from fedllm.runs.result import Result

DIES = '''"""Dies."""
import os
from dataclasses import dataclass
from fedllm import Card, Claim, Star

@dataclass(frozen=True)
class Dies(Star):
    """Its process ends in the first round."""
    card = Card(title="Dies", paper="-", topic="-", sends="-", needs="-", claim=Claim(
        "it dies", rig="none", metric="none", holds=">", threshold=0.0))
    def round(self, state, clients):
        os.kill(os.getpid(), 9)
        yield
'''


@pytest.fixture
def small(recipe):
    """Two rounds of two clients; the loss alone."""
    return recipe | {"rounds": 2, "model": {"name": recipe["model"], "fast_kernels": False},
                     "local": {"lr": 0.02, "steps": 2, "batch_size": 4, "max_length": 16},
                     "data": recipe["data"] | {"partition": {"kind": "iid", "clients": 2}, "limit": 60},
                     "clients": {}, "evaluate": {"exact_match": False, "samples": 0, "baselines": ["local_only"]}}


def test_cells_are_runs_that_are_resumed_repeated_and_added_to(small, tmp_path):
    seen = []
    ask = {"grid": {"local.lr": [1e-9, 0.02]}, "tuning_seeds": 1, "seeds": 1, "out": tmp_path / "c",
           "tell": lambda what, facts: seen.append((what, dict(facts)))}
    found = fedllm.compare(small, methods=["fedavg"], **ask)
    (row,) = found.tables[0].rows
    assert row.rates == {"local.lr": 0.02} and found.tried["fedavg"]["lr=0.02"] < found.tried["fedavg"]["lr=1e-09"]
    assert found.tuned_on == [1000] and not (tmp_path / "c" / "fedavg-seed1000").exists() and not found.failed
    assert "nothing to hold against fedavg" in found.tables[0].says

    cell = tmp_path / "c" / "fedavg-seed0"
    first = Result.load(cell)
    assert first.evaluation.get("baselines") is None and first.evaluation["global"]["loss"] == row.figures[0]
    again = fedllm.run(cell / "recipe.yaml", root=tmp_path / "again")
    assert again.state_digest == first.state_digest

    (cell / "result.json").unlink()  # as if it had been killed before its end
    seen.clear()
    both = ["fedavg", "local_only"]
    found = fedllm.compare(small, methods=both, **ask)
    ran = [facts["folder"].rpartition("/")[2] for what, facts in seen if what == "cell"]
    assert sorted(ran) == ["fedavg-seed0", "local_only-lr0.02-seed1000", "local_only-lr1e-09-seed1000",
                           "local_only-seed0"]
    assert Result.load(cell).state_digest == first.state_digest
    rows = found.tables[0].rows
    assert rows[0].difference is None and rows[1].difference.seeds == 1 and rows[1].up == 0 < rows[0].up
    assert "1 seed can show none of 1 difference; 6 or more could" in found.tables[0].says
    told = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [r["figures"]["0"] for r in told["tables"][0]["rows"]] == [r.figures[0] for r in rows]
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("Plotly.newPlot(") == 3 and "src=" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "fedavg-seed0/report.html" in page

    seen.clear()
    fedllm.compare(small, methods=both, **ask)
    assert not [facts for what, facts in seen if what in ("cell", "checked")]
    for other in ({"overrides": {"rounds": 3}}, {"overrides": {"local.lr": 0.5}}, {"grid": {"local.lr": [0.02]}}):
        with pytest.raises(RunError, match="holds another comparison"):
            fedllm.compare(small, methods=both, **ask | other)


@pytest.mark.slow
def test_what_does_not_fit_and_what_dies(small, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    plugged = {"plugins": [str(tmp_path / "dies.py")]}
    design = make_design(small, methods=["dies", "fed_dpo"], seeds=1, overrides=plugged)
    (table,) = design.settings
    dies, odd = (design.cell(table, arm, 0, {}) for arm in table.arms)
    told = []
    (tmp_path / "c").mkdir()
    with pool(1, tmp_path / "c") as workers:
        got = workers.each("check", [dies, odd], tmp_path / "c", lambda cell, facts: told.append(cell.arm))
        assert got[dies.name]["trained"] > 0 and "data.task = 'preference'" in got[odd.name]["error"]
        got = workers.each("cell", [dies], tmp_path / "c", lambda cell, facts: told.append(cell.arm))
        assert "ended by signal 9" in got[dies.name]["error"] and told == ["dies", "fed_dpo", "dies"]
    assert all(w.process.poll() is not None for w in workers.all)


@pytest.mark.parametrize(("words", "says"), [
    (["--methods", "fedavg,fedprx"], "did you mean 'fedprox'?"),
    (["--methods", "fedavg,fedprox,fedavg"], "names 'fedavg' twice"),
    (["--methods", "fedavg,"], "ids of methods with commas"),
    (["--grid", "local.lrr=1e-3,3e-3"], "local.lrr: unknown key"),
    (["--grid", "method.mu=0.1,1"], "no arm has this knob"),
    (["--grid", "local.lr=1e-3,1e-3"], "a value is listed twice"),
    (["--grid", "local.lr="], "write key=value,value"),
    (["--grid", "local.lr=1e-3,-1"], "local.lr = -1 is not allowed; it must be > 0"),
    (["--grid", "local.lr=1e-3,3e-3", "--seeds", "999,1000"], "1000 is one of the seeds that rates are chosen on"),
    (["--seeds", "0"], "from 1 up"),
    (["--seeds", "1,1"], "listed twice"),
    (["--seeds", "x"], "allowed is a number of seeds"),
    (["--vary", "space.name=lora,ia4"], "did you mean 'ia3'?"),
    (["--vary", "seed=1,2"], "does not vary this key"),
    (["--vary", "method=fedavg,fedprox"], "listed with --methods"),
    (["--baseline", "fedprox"], "is no arm"),
    (["--jobs", "0"], "--jobs 0"),
    (["--real"], "only a recipe family"),
    (["rounds=x"], "rounds"),
])
def test_refused_in_one_sentence_before_anything_is_trained(words, says, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(json.dumps(small))
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", "small.yaml", *words])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert end.value.code == 2 and says in said and "fault of fedllm" not in said
    assert not (tmp_path / "comparisons").exists()


def test_a_folder_of_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no comparison"):
        fedllm.compare(small, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_arms_of_every_combination_and_their_recipes(small):
    design = make_design(small, methods=["fedavg", "fedprox", "local_only"], vary=axes(
        ["space.name=lora,ia3", "rounds=1,2"], "--vary"), grid={"method.mu": [0.1, 1.0], "space.rank": [2, 4]},
        seeds=1, overrides={"layers": ["codec_quant"], "method.name": "fedprox", "method.mu": 0.3})
    (table,) = design.settings
    arms = {a.label: a for a in table.arms}
    assert len(arms) == 12 and "fedprox ia3 rounds=2" in arms and table.baseline == "fedavg lora rounds=1"
    recipe = {label: design.recipe(table, arm, 5, {}, "x") for label, arm in arms.items()}
    assert recipe["fedprox ia3 rounds=2"].space.model_dump() == {"name": "ia3"}
    assert recipe["fedprox lora rounds=1"].method.knobs == {"mu": 0.3}
    assert recipe["fedavg lora rounds=1"].method.knobs == {}
    assert not recipe["local_only lora rounds=1"].layers and recipe["fedavg ia3 rounds=2"].layers
    assert {len(design.points(table, arms[a])) for a in ("fedprox lora rounds=1",)} == {4}
    assert len(design.points(table, arms["fedprox ia3 rounds=1"])) == 2
    assert design.points(table, arms["fedavg ia3 rounds=1"]) == [{}]
    assert {design.place(table, a) for a in table.arms} == {slug(label) for label in arms}
    with pytest.raises(RecipeError, match="both be called"):
        make_design(small, vary={"local.clip_norm": ["a b", "a-b"]})


def result(loss, own, size, folder="-", rounds=1):
    return Result(folder=folder, method="fedavg", engine="vectorized", rounds=rounds, seed=0, bytes={
        "up": size, "down": size, "by_phase": {}}, seconds=1.0, peak_memory_bytes=1, state_digest="", evaluation={
        "before": {}, "global": {"n": 5, "loss": loss}, "clients": {"a": {"n": 1, "loss": own}}})


def arm(seeds, **more):
    return {"method": "fedavg", "rates": {}, "cells": {s: f"c{s}" for s in seeds}, "trained": 3, "failed": {}} | more


def test_what_is_said_of_differences():
    seeds = range(8)
    noise = [0.01 * ((7 * s) % 5 - 2) for s in seeds]
    losses = {"base": [1 + n for n in noise], "good": [0.8 + n / 2 for n in noise], "bad": [1.3 for _ in seeds],
              "same": [1 + n for n in noise], "near": [1 - n for n in noise]}
    results = {a: {s: result(x, x + 1, 10 if a == "good" else 99) for s, x in zip(seeds, xs, strict=True)}
               for a, xs in losses.items()}
    told = table_of("", "", "base", {a: arm(seeds) for a in losses}, results)
    verdicts = {r.arm: r.difference and r.difference.verdict for r in told.rows}
    assert verdicts == {"base": None, "good": "better", "bad": "worse", "same": "equal", "near": "open"}
    assert told.says == ("Against base, by loss on the global test: better: good (by 0.2); worse: bad (by 0.3); the "
                         "same on every seed: same; not to be told from it: near.")
    assert [r.arm for r in told.rows if r.front] == ["good"]
    good = told.rows[1]
    assert good.difference.p == pytest.approx(2 / 2**8) and good.difference.together == pytest.approx(4 * 2 / 2**8)
    assert good.quality.low < good.quality.mean < good.quality.high and good.own.mean == pytest.approx(1.8, abs=0.01)
    few = table_of("", "", "base", {a: arm(range(2)) for a in ("base", "good")}, {
        a: {s: results[a][s] for s in range(2)} for a in ("base", "good")})
    assert few.rows[1].difference.verdict == "open" and "2 seeds can show none of 1 difference; 6 or more" in few.says
    lost = table_of("", "", "base", {"base": arm([0]), "gone": arm([0], failed={0: "it fell"})},
                    {"base": {0: results["base"][0]}, "gone": {}})
    assert "no other arm has a figure" in lost.says and lost.rows[1].quality is None


def test_tests_that_stand_together():
    assert held_together([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # Holm's own steps
    assert ends([0.1, 1.0, 0.3]) == [0.1, 1.0] and ends([0.1, 1.0]) == ends(["a", "b", "c"]) == []
    assert [seeds_needed(k) for k in (1, 2, 3, 6)] == [6, 7, 7, 8]
    for k in range(1, 40):
        assert k * 2 / 2 ** seeds_needed(k) <= 0.05 < k * 2 / 2 ** (seeds_needed(k) - 1)
    assert on_front([1, 2, 3, 3, None], [1, 2, 2, 3, 0], False) == [True, False, True, False, False]
    assert on_front([1, 2], [5, 5], True) == [True, False]


def test_pages_escape_what_they_are_told(tmp_path):
    bad = "<script>alert(1)</script>|x"
    table = table_of(bad, bad, bad, {bad: arm([0], failed={0: bad})}, {bad: {0: result(1.0, 1.0, 1)}})
    (tmp_path / "c0").mkdir()
    (tmp_path / "c0" / "events.jsonl").write_text("")
    found = Comparison(tmp_path, bad, {"title": bad, "paper": bad, "shows": [bad], "about": bad}, [0], {bad: [bad]},
                       [1000], {}, [table], [bad], [])
    page = report_html(found, tmp_path)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    rows = [line for line in as_markdown(found).splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_axes_have_marks_that_can_be_read():
    """Bytes at 1, 2, 5 of a decade (all nine lay on each other at 800 px), rounds in whole numbers."""
    def page(ups):
        arms = {f"a{i}": arm([0]) for i in range(2)}
        return front(table_of("t", "", "a0", arms, {f"a{i}": {0: result(1.0 + i, 1.0, up)}
                                                     for i, up in enumerate(ups)}))

    assert '"dtick":"D2"' in page([1000, 2000]) and '"dtick":1' in page([10, 10_000_000])
    assert '"type":"log"' not in page([0, 2000])


def test_yaml_of_the_command_line():
    assert axes(["space={name: lora, rank: 4},ia3"], "--vary") == {"space": [{"name": "lora", "rank": 4}, "ia3"]}
    assert axes(["local.lr=1e-3,3e-3"], "--grid") == {"local.lr": [0.001, 0.003]}
    assert yaml.safe_load(yaml.safe_dump(axes(["a.b=[1, 2],3"], "--vary"))) == {"a.b": [[1, 2], 3]}
