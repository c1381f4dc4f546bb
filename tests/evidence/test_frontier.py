"""Every cell of the frontier is a recipe that holds, and the page says what was measured and what was not."""

import json
from collections import Counter

from evidence.frontier import EACH, MANY, RATE, cells, recipe_of, write_people
from evidence.pages.frontier import write_page
from fedllm.runs.build import make_layers
from fedllm.runs.recipe import load_recipe


def test_each_cell_is_a_recipe():
    kinds = {tuple(str(c[k]) for k in ("space", "unit", "noise", "epsilon")): c for c in cells()}
    assert len(list(cells())) > 500
    for (_, unit, noise, _), cell in kinds.items():
        layers, _ = make_layers(load_recipe(recipe_of(cell), {}))
        assert type(layers[0]).__name__ == ("DPSGD" if unit == "example" else "DPFedAvg")
        assert (len(layers) == 2) == (noise == "shared")
        assert layers[0].epsilon == cell["epsilon"]


def test_very_many_people_share_the_rows_and_take_part_by_coins(tmp_path):
    write_people(tmp_path / "people" / "a.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(20)], 50, 0)
    rows = [json.loads(line) for line in (tmp_path / "people" / "a.jsonl").read_text().splitlines()]
    assert set(Counter(r["person"] for r in rows).values()) == {EACH} and len({r["text"] for r in rows}) == 20
    assert [p.name for p in (tmp_path / "people").iterdir()] == ["a.jsonl"]
    cell = next(c for c in cells() if c["clients"] == MANY and c["epsilon"])
    layer, spec = recipe_of(cell)["layers"][0], recipe_of(cell)["data"]
    assert (layer["sampling"], layer["rate"]) == ("poisson", RATE) and spec["partition"]["key"] == "person"
    assert "sampling" not in recipe_of({**cell, "clients": 1000})["layers"][0]


def test_the_page_has_a_mean_for_each_cell_and_names_what_is_missing(tmp_path):
    rows = [{**cell, "accuracy": 0.7 + 0.01 * cell["seed"]} for cell in cells() if cell["data"] == "sst2"
            and cell["space"] == "head" and cell["noise"] in ("shared", "none") and cell["clients"] == 10]
    write_page(rows, [c for c in cells() if c["data"] != "sst2"], tmp_path)
    page = (tmp_path / "frontier.md").read_text()
    assert "| head | example | shared | 10 | " + " | ".join(["72.0 ± 1.6 (5)"] * 5) + " |" in page
    assert "* masakhanews, lora, example, local, 10: 20 runs" in page and "* sst2" not in page
    assert (tmp_path / "frontier-sst2.svg").read_text().count("<circle") == 5
