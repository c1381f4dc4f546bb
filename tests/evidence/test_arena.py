"""The arena: what is asked for, rows that are not measured twice, its page, and one real duel."""

import json

import pytest

from evidence.bench import arena as bench_arena
from evidence.bench.arena import FULL, SMALL, asked, attacks, defenses, jobs, summary
from evidence.pages.arena import picture, write_page
from evidence.rigs.arena import Size, duel
from fedllm.core.errors import RecipeError
from fedllm.runs.layers import make_layer


def test_the_grid_that_is_asked_for():
    assert asked("") is FULL or asked("") == FULL
    got = asked("size=small; worlds=sst2; attacks=alie,backdoor; shares=0,0.2" .replace("0,0", "0.0,0"))
    assert list(got.sizes) == ["sst2"] and got.attacks == ("alie", "backdoor") and got.shares == (0.0, 0.2)
    every = list(jobs(FULL))
    assert len(every) == len({bench_arena._key(j) for j in every})
    assert {j["share"] for j in every} == {0.0, 0.1, 0.2, 0.3, 0.4} and {j["seed"] for j in every} == {0, 1, 2}


@pytest.mark.parametrize("text, says", [
    ("sizes=small", "'sizes' is unknown. Allowed: size, worlds"), ("size=tiny", "size='tiny' is unknown"),
    ("defenses=crumb", "defenses='crumb' is unknown. Allowed: mean, median")])
def test_what_is_not_known(text, says):
    with pytest.raises(RecipeError, match=says):
        asked(text)


@pytest.mark.parametrize("world", ["sst2", "office", "topics"])
def test_every_attack_and_defense_can_be_made(world):
    for spec in [*attacks(world).values(), *filter(None, defenses(20, 0.2).values())]:
        make_layer(spec["name"], {k: v for k, v in spec.items() if k != "name"}, "layers.0")


def test_rows_are_measured_once(tmp_path, monkeypatch):
    calls = []

    def quick(world, attack, defense, seed, size):
        calls.append((world, attack, defense, seed))
        success = {"success": 0.2} if attack and attack["name"] == "att_backdoor" else {}
        return {"quality": 0.5 if attack and not defense else 0.9, "seconds": 1.0, "bytes": 10.0, **success}

    monkeypatch.setattr(bench_arena, "OUT", tmp_path / "arena.jsonl")
    monkeypatch.setattr(bench_arena, "duel", quick)
    monkeypatch.setenv("FEDLLM_ARENA", "size=small;worlds=sst2;attacks=sign_flip x10,backdoor;defenses=mean,bulyan,rfa")
    rows = bench_arena.arena()
    first, *kept = map(json.loads, (tmp_path / "arena.jsonl").read_text().splitlines())
    assert "cpu" in first["machine"]
    assert len(kept) == len(calls) == 3 + 1 + 6
    bench_arena.arena()
    assert len(calls) == 10
    assert [r["pass"] for r in rows] == [True, True, False, False] and rows[0]["value"] == pytest.approx(0.4)
    page = (tmp_path / "arena.md").read_text()
    assert "| sign_flip x10 | 30% | 50 | 90 | 90 |" in page
    assert "| backdoor | 30% | 50 / 20 | 90 / 20 | 90 / 20 |" in page
    assert "| mean | 1.00 | 10 |" in page
    assert (tmp_path / "arena-sst2.svg").read_text().startswith("<svg")


def test_a_defense_that_tolerates_fewer_says_so_in_its_row(tmp_path):
    job = next(j for j in jobs(SMALL) if j["defense"] == "bulyan" and j["share"] == 0.3)
    row = {**job, **bench_arena.measured({**job, "world": "topics"}), "world": "topics"}
    assert "Bulyan.f = 3 is not allowed with n = 10" in row["refused"]
    write_page([row], "a machine", tmp_path)
    assert "| sign_flip x10 | 30% | refused |" in (tmp_path / "arena.md").read_text()
    assert "- refused: Bulyan.f = 3" in (tmp_path / "arena.md").read_text()
    assert "<svg" in picture([row], 0.3) and summary([row]) == []


def test_a_real_duel():
    size = Size(5, 720, 2)
    attack = {"name": "att_byzantine", "clients": 1, "scale": 30.0}
    mean, krum = (duel("topics", attack, d, 0, size) for d in (None, {"name": "krum", "f": 1, "keep": None}))
    assert krum["quality"] > mean["quality"] and krum["recall"] == 1.0 and mean["bytes"] > 0
