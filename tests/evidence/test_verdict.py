"""The rules of claims: what is said of made-up figures, which seeds are measured, tuned rates, equal work."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from evidence import claims
from evidence.claims import Arm, claimed, run_claims, tune, weigh
from evidence.pages.verdicts import write_table
from evidence.verdict import TUNED, fingerprint, judge, measured_on, same_work, tuned_on
from fedllm.core.errors import RecipeError
from fedllm.core.method import Claim

BELOW = Claim("is lower", "made_up", "loss", "<", 0.0, baseline="fedavg", relative="difference")


def figures(mean: float, n: int = 10) -> list[float]:
    return list(mean + np.random.default_rng(0).normal(0, 1, n))


@pytest.mark.parametrize(("mean", "verdict"), [(-2.0, "holds"), (2.0, "fails"), (0.1, "open")])
def test_three_verdicts(mean, verdict):
    got = judge(BELOW, figures(mean))
    assert got.verdict == verdict and got.low < got.figure < got.high
    assert (got.p <= 0.05) == (verdict != "open")


def test_the_p_is_that_of_all_sign_flips():
    got = judge(BELOW, [-1.0 - 0.01 * i for i in range(10)])
    assert got.p == pytest.approx(2 / 2**10)  # the two extremes of 1024 flips


def test_too_few_seeds_are_open_however_far_from_the_bar():
    assert judge(BELOW, [-9.0, -9.1, -9.2, -9.3, -9.4]).verdict == "open"
    assert judge(BELOW, [-9.0, -9.1, -9.2, -9.3, -9.4, -9.5]).verdict == "holds"


def test_on_the_bar_every_time():
    assert judge(Claim("", "r", "m", ">=", 1.0), [1.0] * 10).verdict == "holds"
    assert judge(Claim("", "r", "m", ">", 1.0), [1.0] * 10).verdict == "fails"


def test_one_outlier_does_not_carry_a_claim():
    assert judge(BELOW, [0.1] * 9 + [-50.0]).verdict == "open"


def test_ratios_are_judged_by_their_logarithms():
    claim = Claim("", "r", "m", "<", 1.0, baseline="fedavg", relative="ratio")
    got = judge(claim, [0.5, 2.0] * 5)
    assert got.figure == pytest.approx(1.0) and got.verdict == "open"
    assert judge(claim, [0.5] * 10).figure == pytest.approx(0.5)


def test_what_is_no_number_fails():
    assert judge(BELOW, [-1.0] * 9 + [math.nan]).verdict == "fails"


def test_exact_claims_hold_for_every_seed_or_fail():
    claim = Claim("", "r", "m", "<=", 1e-6, kind="exact")
    assert judge(claim, [1e-7, 0.0, 1e-6]).verdict == "holds"
    assert judge(claim, [1e-7, 0.0, 2e-6]).verdict == "fails"
    assert len(measured_on(claim)) == 3


def test_no_seed_is_measured_that_was_looked_at_or_tuned_on():
    for name, entry in claimed().items():
        seeds = measured_on(entry.claim)
        assert min(seeds) >= TUNED.stop and not {*seeds} & {*tuned_on(entry.claim)}, name
        assert len(seeds) >= (3 if entry.claim.sort == "exact" else 10), name
    with pytest.raises(RecipeError, match=r"unseen = 7 is not allowed; it must be >= 4000"):
        Claim("", "r", "m", "<", 0.0, unseen=7)
    with pytest.raises(RecipeError, match="kind 'order' is not allowed without a baseline"):
        Claim("", "r", "m", "<", 0.0, kind="order")


def test_no_method_lives_by_an_exact_claim_alone():
    cards: dict[str, list] = {}
    for name, entry in claimed().items():
        cards.setdefault(name.partition(":")[0], []).append(entry)
    alone = {n for n, own in cards.items() if all(e.claim.sort == "exact" for e in own)}
    assert alone == {n for n, own in cards.items() if own[0].card.only_exact}


def test_equal_work_is_enforced():
    mine, other = {"work_steps": 80.0, "m": 1.0}, {"work_steps": 120.0, "m": 2.0}
    with pytest.raises(RecipeError, match=r"'x': its arms did unequal work \(work_steps = 80.0 against 120.0\)"):
        same_work("x", BELOW, mine, other)
    with pytest.raises(RecipeError, match="against None"):
        same_work("x", BELOW, mine, {"m": 2.0})
    assert same_work("x", BELOW, mine, mine) == "equal"
    assert same_work("x", BELOW, {"m": 1.0}, {"m": 1.0}) == "not reported"


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A rig whose loss is least at rate 0.3 for the one and 0.1 for the other, and which notes what it is asked."""
    asked: list[tuple[str, int, float]] = []

    def rig(method, seed, *, local=None, knobs=None):
        lr = (local or {}).get("lr", 1.0)
        asked.append((method, seed, lr))
        best = 0.3 if method == "fedprox" else 0.1
        loss = (lr - best) ** 2 + (0.0 if method == "fedprox" else 0.05) + 0.001 * (seed % 7)
        return {"loss": math.inf if lr > 5 else loss, "work_steps": 1.0}

    monkeypatch.setitem(claims.known_rigs(), "made_up", rig)
    monkeypatch.setattr(claims, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(claims, "_code", lambda *_: "")
    return asked


GRID = Claim("is lower", "made_up", "loss", "<", 0.0, baseline="fedavg", relative="difference",
             grid={"local.lr": (0.1, 0.3, 9.0), "knobs.server_lr": (1.0, 2.0)})


def test_each_arm_gets_its_best_rate_on_seeds_of_their_own(made_up):
    row = weigh("fedprox", GRID)
    assert row["rates"]["method"] == {"local.lr": 0.3}  # FedProx has no server rate, so that is no axis of its grid
    assert row["rates"]["baseline"]["local.lr"] == 0.1
    tuned = {seed for _, seed, _ in made_up if seed in TUNED}
    assert tuned == {*row["tuned_on"]} and not tuned & {*row["seeds"]}
    assert {lr for m, seed, lr in made_up if m == "fedavg" and seed not in TUNED} == {0.1}
    assert row["verdict"] == "holds" and row["work"] == "equal" and len(row["seeds"]) == 10


def test_better_says_which_way_rates_are_chosen(made_up):
    arm = Arm("made_up", "fedprox", {})
    worse = Claim("is higher", "made_up", "loss", ">", 0.0, grid={"local.lr": (0.3, 1.0)}, better="min")
    assert tune(worse, arm) == {"local.lr": 0.3}
    with pytest.raises(RecipeError, match="no point of the grid"):
        tune(Claim("", "made_up", "loss", "<", 0.0, grid={"local.lr": (8.0, 9.0)}), arm)


def test_a_budget_leaves_fewer_seeds_and_says_so(made_up):
    row = weigh("fedprox", GRID, budget=1e-9)
    assert len(row["seeds"]) == 1 and row["asked"] == 10 and row["verdict"] == "open"


def test_a_row_whose_claim_has_changed_is_no_verdict(tmp_path, made_up, monkeypatch):
    known = {"fedprox": claimed()["fedprox"]._replace(claim=GRID)}
    monkeypatch.setattr(claims, "claimed", lambda: known)
    run_claims(["fedprox"], tmp_path)
    page = (tmp_path / "methods.md").read_text()
    assert "| 1 | 1 | 0 | 0 | 0 |" in page and "local.lr 0.3 against local.lr 0.1*" in page
    [row] = json.loads((tmp_path / "results" / "claims.json").read_text())
    assert row["of"] == json.loads(json.dumps(fingerprint(GRID)))
    run_claims([], tmp_path)
    assert "| 1 | 1 | 0 | 0 | 0 |" in (tmp_path / "methods.md").read_text()
    known["fedprox"] = known["fedprox"]._replace(claim=BELOW)
    run_claims([], tmp_path)
    assert "| 0 | 0 | 0 | 0 | 1 |" in (tmp_path / "methods.md").read_text()


def test_old_figures_are_no_verdicts(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims_old_rules.json").write_text(json.dumps(
        [{"method": "fedprox", "metric": "distance", "figure": 0.5, "wins": 5, "seeds": 5}]))
    write_table({"fedprox": claimed()["fedprox"]}, {}, tmp_path)
    [line] = [x for x in (tmp_path / "methods.md").read_text().splitlines() if x.endswith("| distance 0.5, 5 of 5 |")]
    assert "not measured" in line and "holds" not in line
