"""The leak test of texts: canaries are heard where they leave, cells are kept, no method that sends text is missed."""

from __future__ import annotations

import json

import pytest
import torch

from evidence import leak_arms, text_leaks
from fedllm.methods.registry import METHODS, method_class


def test_every_method_that_sends_text_is_measured_or_says_why_not():
    speaks = {n for n in METHODS.ours if "text" in method_class(n).card.kinds}
    assert speaks <= {arm.method for arm in text_leaks.ARMS.values()} | set(text_leaks.APART)


def test_rows_leave_without_the_gate_and_not_with_it_and_cells_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(text_leaks, "SEEDS", (7,))
    file = tmp_path / "cells.json"
    cells = text_leaks.run(["fed_sp_sc"], file)
    open_, gated = cells["fed_sp_sc open 7"], cells["fed_sp_sc gated 7"]
    assert open_["left"] > 0.9 and open_["texts_up"] > 20 and gated["left"] == 0 and not open_["ended"]
    monkeypatch.setattr(text_leaks, "measure", lambda *a: pytest.fail("it is there"))
    assert text_leaks.run(["fed_sp_sc"], file) == cells == json.loads(file.read_text())
    assert text_leaks.run(["fed_rag"], file, budget=-1.0) == cells  # nothing is begun
    said = (tmp_path / "cells.md").read_text()
    assert "| `fed_sp_sc` | the rows' questions | " in said and "| `fed_rag` | snippets" in said
    assert said.count("not measured") == len(text_leaks.ARMS) - 1 and "`fed_sp_sc`, open: code " in said


def test_an_arm_whose_client_fails_is_no_cell_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_leaks, "SEEDS", (7,))

    def fails(self):
        raise ZeroDivisionError

    monkeypatch.setattr("fedllm.engines.call.Call.data", property(fails))
    cells = text_leaks.run(["fed_sp_sc"], tmp_path / "cells.json")
    assert cells == {} and not (tmp_path / "cells.json").exists()


def test_only_a_gate_may_stop_an_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(text_leaks, "SEEDS", (7,))
    monkeypatch.setitem(text_leaks.ARMS, "poor", leak_arms.Arm("inferdpt", leak_arms.WRITES, layers=(
        ("dp_text", {"token_epsilon": 3.0, "epsilon": 9.0}),)))
    assert text_leaks.run(["poor"], tmp_path / "cells.json") == {}


def test_a_secret_counts_where_it_left_its_own_client_and_where_it_reached_another():
    tape = text_leaks.Tape()
    secrets = {"a": ["AB-000001", "x y", "+44", "zz"], "b": ["CD-2", "qq", "rr", "ss"]}
    tape.up, tape.down = [("a", "it is ab-000001"), ("b", "ab-000001 of another")], [("b", "AB-000001"), ("a", "zz")]
    got = text_leaks.told(tape, secrets)
    assert got["left"] == 1 / 8 and got["reached"] == 1 / 8 and got["kinds"]["code"] == 0.5
    assert got["texts_up"] == 2 and got["kinds"]["address"] == 0


def test_embeddings_are_read_as_their_nearest_tokens():
    words = torch.eye(5)
    tape = text_leaks.Tape(words)
    tape.read = [("a", words[[3, 1]][None] * 0.9)]
    tape.decoded(type("Tok", (), {"decode": lambda self, ids: " ".join(map(str, ids.tolist()))})())
    assert tape.up == [("a", "3 1")]
