"""Verdicts measured again, on seeds that no one has seen: `python -m evidence.fresh [--draw 10] [--by SEED]`.

Claims that hold or fail are drawn by chance, among those that are not exact and whose measurement took at most `--most`
seconds; both arms are tuned anew on seeds of their own and run on others, and the two verdicts stand side by side in
docs/results/fresh.json and in the table of docs/results/audit_of_claims.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence.claims import claimed, weigh
from evidence.verdict import fingerprint
from fedllm.core.rng import numpy_stream
from fedllm.runs.store import write_atomic

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
UNSEEN, BEGIN, END = 9000, "<!-- fresh -->", "<!-- /fresh -->"
"""The first of the seeds that these figures are of, and where the table stands in the page."""


def drawn(rows: Sequence[Mapping[str, Any]], count: int, by: int, most: float) -> list[Mapping[str, Any]]:
    """So many claims, by chance, among those with a verdict that is no identity and that can be had in the time."""
    known = claimed()
    open_to = [r for r in rows if r["verdict"] in ("holds", "fails") and r["of"]["kind"] != "exact"
               and r["seconds"] <= most and r["method"] in known and r["of"] == fingerprint(known[r["method"]].claim)]
    chosen = numpy_stream(by, "fresh claims").permutation(len(open_to))[:count]
    return [open_to[int(i)] for i in chosen]


def again(row: Mapping[str, Any], budget: float) -> dict[str, Any]:
    """The claim on seeds 9000 and on, beside what claims.json says."""
    name = row["method"]
    got = weigh(name, replace(claimed()[name].claim, unseen=UNSEEN), budget=budget)
    keep = ("verdict", "figure", "low", "high", "p")
    return {"method": name, "claim": row["claim"], "holds": row["of"]["holds"], "threshold": row["of"]["threshold"],
            "before": {k: row[k] for k in keep} | {"seeds": len(row["seeds"])},
            "after": {k: got[k] for k in keep} | {"seeds": len(got["seeds"])}, "seconds": got["seconds"]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    def told(side: Mapping[str, Any]) -> str:
        span = "" if side["low"] is None else f" ({side['low']:.3g} to {side['high']:.3g})"
        return f"{side['figure']:.3g}{span}, {side['seeds']} seeds | {side['verdict']}"

    lines = ["| claim | says | bar | before | verdict | seeds 9000 and on | verdict |", "|---|---|---|---|---|---|---|"]
    lines += [f"| `{r['method']}` | {r['claim'].replace('|', ' ')} | {r['holds']} {r['threshold']:g} | "
              f"{told(r['before'])} | {told(r['after'])} |" for r in rows]
    same = sum(r["before"]["verdict"] == r["after"]["verdict"] for r in rows)
    turned = sum({r["before"]["verdict"], r["after"]["verdict"]} == {"holds", "fails"} for r in rows)
    return "\n".join([*lines, "", f"{same} of {len(rows)} verdicts are the same, {turned} turned round."])


def main() -> None:
    """Draw, measure what the file lacks, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", type=int, default=10, help="how many claims")
    parser.add_argument("--by", type=int, default=20261130, help="seed of the draw")
    parser.add_argument("--most", type=float, default=100.0, help="most seconds that its measurement took")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each, after which no seed is begun")
    given = parser.parse_args()
    file, page = RESULTS / "fresh.json", RESULTS / "audit_of_claims.md"
    rows = drawn(json.loads((RESULTS / "claims.json").read_text()), given.draw, given.by, given.most)
    had = {r["method"]: r for r in (json.loads(file.read_text()) if file.is_file() else [])}
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(had.get(row["method"]) or again(row, given.budget))
        write_atomic(file, (json.dumps(done, indent=1) + "\n").encode())
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomic(page, f"{before}{BEGIN}\n\n{table(done)}\n\n{END}{after}".encode())


if __name__ == "__main__":
    main()
