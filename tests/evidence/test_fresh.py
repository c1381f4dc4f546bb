"""Verdicts on seeds that nobody has used."""

import json

from evidence import fresh
from evidence.claims import claimed
from evidence.verdict import measured_on


def test_a_draw_is_by_chance_and_among_what_has_a_verdict():
    rows = json.loads((fresh.RESULTS / "claims.json").read_text())
    one, other = (fresh.drawn(rows, 5, by, 100.0) for by in (1, 2))
    assert [r["method"] for r in one] == [r["method"] for r in fresh.drawn(rows, 5, 1, 100.0)]
    assert one != other and len(one) == 5
    assert all(r["verdict"] != "open" and r["of"]["kind"] != "exact" and r["seconds"] <= 100 for r in one + other)


def test_no_claim_is_measured_on_the_fresh_seeds():
    assert max(max(measured_on(e.claim)) for e in claimed().values()) < fresh.UNSEEN


def test_the_table_counts_what_turned_round():
    def side(verdict):
        return {"verdict": verdict, "figure": 0.5, "low": None, "high": None, "p": None, "seeds": 10}

    rows = [{"method": "a", "claim": "x | y", "holds": "<", "threshold": 1.0, "before": side(was), "after": side(now)}
            for was, now in (("holds", "holds"), ("holds", "fails"), ("fails", "open"))]
    said = fresh.table(rows)
    assert said.endswith("1 of 3 verdicts are the same, 1 turned round.") and "x   y" in said
