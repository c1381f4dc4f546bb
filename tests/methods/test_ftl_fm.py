"""Federated transfer learning: methods are found by what moves, and a family of them builds and trains small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fedllm
from fedllm.cli.main import app
from fedllm.comparisons.design import make_design, pairs
from fedllm.core.errors import RecipeError
from fedllm.core.method import Moves
from fedllm.methods.registry import method_class, moving

FAMILY = Path(__file__).parents[2] / "recipes" / "families" / "ftl_fm.yaml"
LISTED = {"offsite_tuning", "fedbiot", "dp_offsite_peft", "fedpeat", "fedmkt", "fedcollm", "inferdpt", "fedcot", "fdkt",
          "crosslm", "fedkseed", "fedit"}


def test_methods_are_found_by_what_moves():
    assert moving(carrier="logits", direction="both") == ["fedmkt"]  # fedcollm's clients send adapters
    assert {n for n in moving() if method_class(n).card.moves} >= LISTED
    assert set(moving(carrier="adapters", spares="model")) == {
        "offsite_tuning", "fedbiot", "dp_offsite_peft", "fedpeat", "fedcollm"}
    assert set(moving(direction="to clients", improves="clients")) == {"fedcot", "fdkt"}
    assert "fedavg" in moving() and "fedavg" not in moving(spares="rows")
    with pytest.raises(RecipeError, match=r"carrier = 'logit' is not allowed; it must be one of adapters, logits"):
        moving(carrier="logit")
    with pytest.raises(RecipeError, match=r"Moves.spares = 'bytes' is not allowed"):
        Moves("text", "both", "both", ("rows", "bytes"))


def test_what_a_client_sends_is_what_its_card_calls_the_carrier():
    """Text leaves only where the carrier is text."""
    for name in LISTED:
        card = method_class(name).card
        assert (card.moves.carrier == "text") == ("text" in card.kinds), name


def test_the_command_line_finds_them():
    got = CliRunner().invoke(app, ["methods", "--carrier", "logits", "--direction", "both", "--json"])
    told = [json.loads(line) for line in got.stdout.splitlines()]
    assert [t["id"] for t in told] == ["fedmkt"] and told[0]["moves"]["spares"] == ["rows", "model", "designs"]
    shown = CliRunner().invoke(app, ["methods", "--carrier", "seeds"]).stdout
    assert "fedkseed" in shown and "fedavg" not in shown
    assert "must be one of" in str(CliRunner().invoke(app, ["methods", "--spares", "time"]).exception)


def test_the_family_has_every_carrier():
    design = make_design(FAMILY)
    arms = {a.method for _, a in pairs(design)}
    assert arms >= LISTED
    assert {method_class(m).card.moves.carrier for m in arms if method_class(m).card.moves} == {
        "adapters", "logits", "text", "grades", "seeds"}
    by = {(s.name, a.label): design.recipe(s, a, 0, {}, "x") for s, a in pairs(design)}
    assert [layer.name for layer in by["owner", "fate_sft"].layers] == ["secagg"]
    assert [layer.name for layer in by["owner", "dp_offsite_peft"].layers] == ["dp_sgd"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_small_by_one_command(tmp_path, monkeypatch):
    """Every arm of the family, one round of one step; the rows of its last table are made up."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{'a good' if i % 2 else 'a bad'} film no {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = yaml.safe_load(FAMILY.read_text())
    raw["settings"]["texts"]["set"]["data"] |= {"source": "rows.jsonl", "test": 0.2, "limit": 40, "test_limit": 8}
    raw["base"]["data"]["office"] |= {"rows": 10, "test_rows": 8, "client_test_rows": 4, "public_rows": 12}
    raw["base"] |= {"rounds": 1, "local": {"steps": 1, "batch_size": 4, "max_length": 64}}
    (tmp_path / "ftl_fm.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    found = fedllm.compare(tmp_path / "ftl_fm.yaml", out=tmp_path / "c", seeds=1)
    assert not found.failed
    assert {r.arm for t in found.tables for r in t.rows} == {a.label for _, a in pairs(make_design(FAMILY))}
    assert all(r.quality for t in found.tables for r in t.rows)
