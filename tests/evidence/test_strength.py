"""Detectors against the strength of an attack: the grid, rows that are not measured twice, the page, one real duel."""

import json

from evidence.bench import strength as bench
from evidence.pages.strength import point
from evidence.rigs.arena import Size, duel
from fedllm.runs.layers import make_layer


def test_every_attack_of_the_grid_can_be_made_and_grows():
    for name, strengths in bench.QUIET.items():
        assert list(strengths) == sorted(strengths)
        for s in strengths:
            spec = bench.attack(name, s)
            layer = make_layer(spec["name"], {k: v for k, v in spec.items() if k != "name"}, "layers.0")
            assert s in vars(layer).values()
    rows = list(bench.jobs())
    assert len(rows) == len({tuple(r.values()) for r in rows}) == 3 * 16 * 6


def test_rows_are_measured_once_and_the_picture_has_a_line_for_each_detector(tmp_path, monkeypatch):
    calls = []

    def quick(world, attack, defense, seed, size):
        calls.append(attack)
        return {"quality": 0.8, "seconds": 1.0} | ({} if defense is None else {"recall": 0.5, "false_positives": 0.1})

    monkeypatch.setattr(bench, "OUT", tmp_path / "strength.jsonl")
    monkeypatch.setattr(bench, "duel", quick)
    rows = bench.strength()
    assert len(calls) == 288 and len(bench.strength()) == len(rows) == 4 and len(calls) == 288
    assert rows[0]["value"] == 0.4 and not rows[0]["pass"]
    kept = [json.loads(line) for line in (tmp_path / "strength.jsonl").read_text().splitlines()][1:]
    assert point(kept, "alie", 0.5, "anomaly") == (0.5, 0.1) and point(kept, "alie", 0.5, "mean") is None
    assert "| alie | 0.5 | 80.0 | 50 / 10 | 50 / 10 |" in (tmp_path / "strength.md").read_text()
    picture = (tmp_path / "strength.svg").read_text()
    assert picture.count("<polyline") == 4 * 5 and picture.count("<circle") == 16 * 5


def test_a_louder_sign_flip_is_cast_out_more_often():
    quiet, loud = (duel("topics", bench.attack("sign flip", s), {"name": "anomaly"}, 0, Size(8, 240, 2))
                   for s in (0.1, 10.0))
    assert loud["recall"] > quiet["recall"] and loud["recall"] == 1.0
