"""Recipe families: every file plans all its cells, a tiny one trains, and rows come in the benchmark's shape."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import fedllm
from evidence import bench_rows, knowledge_rows, picture_rows
from fedllm.comparisons.compare import light
from fedllm.comparisons.design import make_design, pairs
from fedllm.comparisons.family import read_family
from fedllm.comparisons.worker import check
from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.runs.complaints import parse_override
from fedllm.runs.recipe import load_recipe

FAMILIES = sorted((Path(__file__).parents[2] / "recipes" / "families").glob("*.yaml"))
NAMES = {"fedpeft", "fedpetuning", "fedtune_bench", "openfedllm", "fs_llm", "fedit_shepherd", "fedllm_bench",
         "init_study", "vision_language", "profit", "ftl_fm", "architectures", "knowledge"}


def test_all_are_there():
    assert {p.stem for p in FAMILIES} == NAMES


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_every_family_plans_its_cells(path, real):
    design = make_design(path, real=real)
    assert design.card["title"] and design.card["paper"] and design.card["shows"]
    for setting, arm in pairs(design):
        for point in design.points(setting, arm):
            light(design.recipe(setting, arm, 0, point, "arm"))
    cells = [design.cell(s, a, seed, {}).name for s, a in pairs(design) for seed in design.seeds]
    assert len(set(cells)) == len(cells) >= 9
    baselines = {a.label for s in design.settings for a in s.arms if a.label == s.baseline}
    assert len(baselines) >= 1 and all(any(a.label == s.baseline for a in s.arms) for s in design.settings)


def test_openfedllm_has_its_seven_and_the_real_run_its_model():
    path = next(p for p in FAMILIES if p.stem == "openfedllm")
    seven = {"fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"}
    tables = {s.name: {a.method for a in s.arms} for s in make_design(path).settings}
    assert seven < tables["instruction"] and tables["alignment"] == {*seven, "fed_dpo"}
    design = make_design(path, real=True)
    assert all(design.recipe(s, a, 0, {}, "x").model.name == "smollm2" for s, a in pairs(design))
    assert design.name == "openfedllm-real"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_every_family_builds(path, tmp_path, monkeypatch):
    """Loads models and rows of every arm; MiniLM needs the extra encoder."""
    for file in Path(bench_rows.resolve("shared:sst2_dev.jsonl")).parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    bench_rows.write(tmp_path / "fedllm_bench")
    picture_rows.write(tmp_path / "vision_rows")
    knowledge_rows.write(tmp_path / "knowledge_rows", steps=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLLM_DATA", str(tmp_path))
    design = make_design(path)
    for setting, arm in pairs(design):
        cell = design.cell(setting, arm, design.seeds[0], design.points(setting, arm)[0])
        assert check(cell.recipe.model_dump(), tmp_path)["trained"] > 0


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A small folder of shared data with what bench_rows reads."""
    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    (tmp_path / "tinyshakespeare.txt").write_text("\n\n".join(
        f"{'ROMEO' if i % 2 else 'JULIET'}:\nspeech number {i}" for i in range(30)))
    lines("masakhanews_train.jsonl", [{"lang": "eng" if i % 3 else "swa", "label": f"topic {i % 4}",
                                       "text": f"text {i}"} for i in range(60)])
    lines("code_alpaca_2k.jsonl", [{"instruction": f"write {i}", "input": "x" * (i % 2), "output": f"print({i})"}
                                   for i in range(120)] + [{"instruction": "none", "input": "", "output": " "}])
    monkeypatch.setenv("FEDLLM_DATA", str(tmp_path))
    return tmp_path


def test_rows_in_the_benchmarks_shape_load_as_they_are(shared, monkeypatch):
    made = bench_rows.write(shared / "fedllm_bench")
    assert made["chatbot"][1] == 120 and made["user"] == (2, 29) and made["language"][1] == 60
    assert made == bench_rows.write(shared / "again")  # the same rows each time
    assert min(map(len, bench_rows.chatbot().values())) == 1  # users with a single row are users too
    design = make_design(next(p for p in FAMILIES if p.stem == "fedllm_bench"), overrides=dict(map(parse_override, [
        "data.partition={kind: by_key, key: client, min_examples: 1}", "data.test=0.0"])))
    for setting in design.settings:
        recipe = design.recipe(setting, setting.arms[0], 0, {}, "x")
        clients = load_federation(recipe.data, 0).clients
        rows = json.loads((shared / "fedllm_bench" / f"{setting.name}.json").read_text())
        assert {c: len(s.train) + len(s.test) for c, s in clients.items()} == {c: len(r) for c, r in rows.items()}
        want = "chosen" if setting.name == "preference" else "response"
        assert all(want in row for s in clients.values() for row in s.train)


@pytest.mark.parametrize(("text", "says"), [
    ('{"a": [{"prompt": "x", "response": "y"}, 3]}', "client 'a', row 2"),
    ('{"a": [{"prompt": "x", "response": "y", "client": "b"}]}', "says another"),
    ('{"a": {"prompt": "x"}}', "a list of objects for each client"),
    ("{}", "a list of objects for each client"),
    ('{"a": []}', "empty"),
])
def test_a_file_of_clients_that_cannot_be_read(text, says, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=says):
        load_federation({"source": str(tmp_path / "rows.json"), "partition": {"kind": "by_key", "key": "client"}}, 0)


def test_rows_of_pictures_have_the_classes_that_their_setting_says(tmp_path):
    rows = {name: make(np.random.default_rng(0)) for name, make in picture_rows.SETTINGS.items()}
    assert {name: (len(train), len(test)) for name, (train, test) in rows.items()} == {
        "looks": (480, 144), "disjoint": (192, 192), "few": (80, 240), "new": (288, 144)}
    train, test = rows["new"]
    assert not set(train[0]["among"]) & set(test[0]["among"]) and {r["label"] for r in test} == set(test[0]["among"])
    held = {c: {r["label"] for r in rows["disjoint"][0] if r["client"] == c} for c in ("client-0", "client-1")}
    assert not held["client-0"] & held["client-1"] and len(held["client-0"]) == 6


FAMILY = {"title": "Two spaces", "paper": "ours", "shows": ["it runs"], "base": {
    "rounds": 1, "local": {"steps": 2, "batch_size": 4, "lr": 0.02, "max_length": 16},
    "evaluate": {"exact_match": False, "samples": 0}}, "arms": {"lora": {"space": {"name": "lora", "rank": 2}},
                                                               "ia3": {"space": "ia3"}},
    "settings": {"all": {"about": "all rows"}, "few": {"set": {"data.limit": 40}, "methods": ["fedavg", "local_only"]}},
    "real": {"rounds": 2}, "seeds": 1}


@pytest.mark.slow
def test_a_tiny_family_trains(recipe, tmp_path):
    base = {**FAMILY["base"], "model": {"name": recipe["model"], "fast_kernels": False}, "data": {
        **recipe["data"], "limit": 80, "partition": {"kind": "iid", "clients": 2}}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**FAMILY, "base": base}, sort_keys=False))
    found = fedllm.compare(tmp_path / "two.yaml", out=tmp_path / "c")
    assert [(t.setting, [r.arm for r in t.rows]) for t in found.tables] == [
        ("all", ["lora", "ia3"]), ("few", ["fedavg", "local_only"])]
    assert all(r.quality for t in found.tables for r in t.rows) and not found.failed
    page = (tmp_path / "c" / "comparison.md").read_text()
    assert "# Two spaces" in page and "- it runs" in page and "## few" in page and "all rows" in page


@pytest.mark.parametrize(("change", "says"), [
    ({"bse": {}}, "bse: unknown key"),
    ({"base": 3}, "allowed is a recipe"),
    ({"base": {"rouns": 3}}, "rouns: unknown key"),
    ({"shows": []}, "shows"),
    ({"baseline": "loraa"}, "is no arm"),
    ({"settings": {"x": {"sett": 1}}}, "sett: unknown key"),
    ({"settings": {"x": {"methods": ["fedvg"]}}}, "settings.x.methods = 'fedvg' is unknown"),
])
def test_a_family_that_is_wrong_is_refused(change, says, tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**FAMILY, **change}))
    with pytest.raises(RecipeError, match=says):
        make_design(tmp_path / "x.yaml")


def test_a_family_says_itself_what_varies(tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(FAMILY))
    assert read_family(tmp_path / "x.yaml").tables["few"].methods == ["fedavg", "local_only"]
    with pytest.raises(RecipeError, match="is a family and says itself what varies"):
        make_design(tmp_path / "x.yaml", methods=["fedavg"])


def test_another_kind_of_partition_comes_without_the_knobs_of_the_first():
    made = load_recipe({"data": {"source": "x.jsonl", "partition": {"kind": "iid", "clients": 3}}},
                       {"data.partition": {"kind": "by_key", "key": "who"}})
    assert made.data.partition == {"kind": "by_key", "key": "who"}
