"""Every method file: one class with a full card, documented knobs, and a claim on a rig that exists."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from evidence.claims import claimed, known_rigs, run_claims
from fedllm.core.errors import RecipeError
from fedllm.methods.registry import method_class, modules, source_of

TEAM = {m for m in modules()}


@pytest.mark.parametrize("name", sorted(TEAM))
def test_card(name):
    cls = method_class(name)
    assert Path(source_of(name)).stem == name
    card = cls.card
    for field in ("title", "paper", "topic", "sends", "needs"):
        assert getattr(card, field).strip(), field
    assert cls.__doc__ and importlib.import_module(modules()[name]).__doc__
    for knob, meta in cls.knobs().items():
        assert meta.get("doc"), knob


@pytest.mark.parametrize("name", sorted(TEAM))
def test_claim(name):
    claim = method_class(name).card.claim
    assert claim.rig in known_rigs()
    assert claim.baseline is None or claim.baseline in modules()
    assert (claim.relative == "own") == (claim.baseline is None)
    assert claim.says.strip()


@pytest.mark.parametrize("name", sorted(TEAM))
def test_length(name):
    assert len(Path(source_of(name)).read_text().splitlines()) <= 150


def test_layers_and_further_claims_are_measured_too(tmp_path):
    known = claimed()
    assert modules().keys() < known.keys() and "thgs_secagg" in known
    assert known["ffa_lora:epsilon_3"].claim.options["epsilon"] == 3.0
    for name, entry in known.items():
        assert entry.claim.rig in known_rigs(), name
        assert entry.source.is_file() and entry.source.stem == name.partition(":")[0]
    with pytest.raises(RecipeError, match="claim 'ffa_lora:epsilon_4' is unknown; did you mean 'ffa_lora:epsilon_"):
        run_claims(["ffa_lora:epsilon_4"], tmp_path)
