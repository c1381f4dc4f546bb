"""The family of methods whose knowledge travels without weights: who belongs to it, and its table with what crossed.

`python -m evidence.pages.families knowledge` runs the cells and writes the page. A method that the family's file has
no arm for is tried in both settings by what its own trial says, so that a new one takes part by itself; what does not
fit a setting is refused by the build, and the page repeats the sentence.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

import fedllm
from fedllm.comparisons.design import make_design, pairs
from fedllm.comparisons.figures import GLOBAL, OWN, Spread, between, figures_on
from fedllm.comparisons.told import Comparison
from fedllm.comparisons.worker import check
from fedllm.core.errors import FedLLMError
from fedllm.core.method import Method
from fedllm.core.record import is_test
from fedllm.methods._blackbox import BlackBox
from fedllm.methods.registry import METHODS
from fedllm.report.facts import label
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import size
from fedllm.runs.result import Result

CHAPTERS = ("distillation", "transfer", "synthesis")
NOT = ("fedsd", "fedsdr")
"""Of these chapters, but nothing is transferred: a client's model rewrites its own answers."""
KINDS = ("weights", "logits", "features", "text", "rest")
TENSORS = {"logits": ("z", "w", "consensus", "p", "ce", "words", "grades", "y"), "features": ("x", "mean", "var"),
           "text": ("tokens",)}
"""What single tensors are by the names of their parts: what models say of rows, states or embeddings, and token ids of
public text. Trees are weights."""


def members() -> list[str]:
    """Methods by what they say of themselves: their chapter, a topic of transfer, or clients that hold an emulator."""
    chapter = {name: module.split(".")[-2] for name, module in METHODS.ours.items()}

    def thin(kind: type[Method]) -> bool:
        return kind.at_client is not Method.at_client and not issubclass(kind, BlackBox)

    return sorted(name for name, kind in METHODS.items() if name not in NOT and (
        chapter.get(name) in CHAPTERS or kind.card.topic.startswith("transfer") or thin(kind)))


class Misfit(NamedTuple):
    """A method that a setting's build refuses."""

    setting: str
    method: str
    why: str


def filled(family: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[Misfit]]:
    """The family with an arm for each member that fits a setting, and those that do not, with the build's sentence.

    What the file says of a method in a setting stays; elsewhere it comes as another setting has it, else with the knobs
    of its trial.
    """
    out, misfits = copy.deepcopy(dict(family)), []
    known = {method_of(edits): edits for s in reversed(family["settings"].values()) for edits in s["arms"].values()}
    for name, setting in out["settings"].items():
        there = {method_of(edits) for edits in setting["arms"].values()}
        for method in (m for m in members() if m not in there):
            edits = known.get(method) or {"method": {"name": method, **METHODS[method].trial.knobs}}
            one = {**out, "settings": {name: {**setting, "arms": {method: edits}, "baseline": method}}}
            if why := refused(one, folder):
                misfits.append(Misfit(name, method, why))
            else:
                setting["arms"][method] = edits
    return out, misfits


def refused(family: Mapping[str, Any], folder: Path) -> str:
    """Why the build takes none of the family's arms; empty: it does."""
    file = folder / "tried.yaml"
    file.write_text(yaml.safe_dump(dict(family), sort_keys=False), encoding="utf-8")
    try:
        design = make_design(file)
        for setting, arm in pairs(design):
            check(design.cell(setting, arm, design.seeds[0], {}).recipe.model_dump(), folder)
    except FedLLMError as error:
        return str(error)
    finally:
        file.unlink()
    return ""


def method_of(edits: Mapping[str, Any]) -> str:
    """The method of an arm."""
    said = edits["method"]
    return str(said if isinstance(said, str) else said["name"])


def kind_of(part: str) -> str:
    """What a part of a message is, of KINDS, by what the record calls it (`tree delta`, `tensor z`, `text new`)."""
    what, name = part.split(" ", 1)
    if name.startswith("_"):  # a layer's own
        return "rest"
    if what == "tree":
        return "rest" if name in ("note", "other") else "weights"
    if what == "tensor":
        return next((kind for kind, names in TENSORS.items() if name in names), "rest")
    return "text" if what == "text" else "rest"


def crossed(run: Path) -> dict[tuple[str, str], int]:
    """(kind, direction) -> bytes of the rounds; names and framing are among the rest."""
    out: dict[tuple[str, str], int] = defaultdict(int)
    for event in RunFolder(run).events(lambda e: e["kind"] == "wire"):
        if is_test(event["phase"], event.get("purpose")):
            continue
        for part, count in event["parts"].items():
            out[kind_of(part), event["direction"]] += count
        out["rest", event["direction"]] += event["bytes"] - sum(event["parts"].values())
    return dict(out)


def epsilon_of(result: Result) -> float | None:
    """What the run promises, the largest of any client: the statement's, or a method's own of its exchange of words."""
    told = [*(result.privacy or {}).get("layers", ()), *(r for r in result.reports.values() if isinstance(r, Mapping))]
    found = [float(e) for r in told for e in (r.get("epsilon"), *(r.get("clients") or {}).values())
             if isinstance(e, int | float)]
    return max(found) if found else None


def asked(result: Result) -> tuple[float, float]:
    """Calls of models by name, and tokens that they read and said; a call is one row or one prompt."""
    told = result.reports.get("ModelUsage") or {}
    return (sum(m["calls"] for m in told.values()),
            sum(m["prompt_tokens"] + m["completion_tokens"] for m in told.values()))


def row(name: str, runs: Sequence[Result], metric: str, seconds: Sequence[float]) -> list[str]:
    """A line of the table: means over seeds."""
    whole, own = ([f[m] for r in runs if (m := next((n for n in (metric, "exact_match") if n in (
        f := figures_on(r, on))), None))] for on in (GLOBAL, OWN))
    sums = [crossed(r.folder) for r in runs]
    mean = lambda each: float(np.mean(each)) if each else 0.0  # noqa: E731
    bytes_ = []
    for kind in KINDS:
        up, down = (mean([s.get((kind, way), 0) for s in sums]) for way in ("up", "down"))
        bytes_.append(f"{size(up)} / {size(down)}" if up or down else "")
    eps = [e for r in runs if (e := epsilon_of(r)) is not None]
    calls, tokens = (mean(x) for x in zip(*map(asked, runs), strict=True))
    return [name, between(Spread.of(whole), metric), between(Spread.of(own), metric), *bytes_,
            f"{max(eps):.3g}" if eps else "", f"{calls:,.0f}" if calls else "", f"{tokens:,.0f}" if calls else "",
            f"{mean(seconds):.1f}" if seconds else "-"]


def tables(found: Comparison, spent: Mapping[str, float]) -> list[str]:
    """Each setting's table as lines of Markdown."""
    out = []
    for table in found.tables:
        head = ["", f"{label(table.metric)}, global test", "own tests", *(f"{k}, up / down" for k in KINDS), "epsilon",
                "calls", "tokens", "CPU s"]
        out += [f"## {table.setting}", "", " ".join(table.about.split()), "", "| " + " | ".join(head) + " |",
                "|---" + "|---:" * (len(head) - 1) + "|"]
        for arm in table.rows:
            there = [c for seed, c in arm.cells.items() if seed not in arm.failed]
            runs = [Result.load(found.folder / c) for c in there]
            if runs:
                line = row(arm.arm, runs, table.metric, [spent[c] for c in there if c in spent])
                out.append("| " + " | ".join(line) + " |")
        why = {w for arm in table.rows for w in ((arm.arm, x) for x in arm.failed.values())}
        lines = [f"- {arm} has no figure: {' '.join(x.split())}" for arm, x in sorted(why)]
        out += ["", *lines, *([""] if lines else [])]
    return out


def run(file: Path, out: Path, seeds: int) -> tuple[Comparison, list[Misfit], dict[str, float]]:
    """All cells that fit, from wherever the folder stands; CPU seconds of each, as far as they were counted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    family, misfits = filled(yaml.safe_load(file.read_text(encoding="utf-8")), out.parent)
    whole, clock = out.parent / f"{file.stem}.yaml", out.parent / f"{file.stem}-seconds.json"
    whole.write_text(yaml.safe_dump(family, sort_keys=False), encoding="utf-8")
    spent: dict[str, float] = json.loads(clock.read_text()) if clock.is_file() else {}

    def tell(what: str, facts: Mapping[str, Any]) -> None:
        if what == "cell" and "cpu_seconds" in facts:
            spent[Path(facts["folder"]).name] = facts["cpu_seconds"]
            clock.write_text(json.dumps(spent))

    return fedllm.compare(whole, out=out, seeds=seeds, tell=tell), misfits, spent


NOTES = """Bytes are of all clients over a whole run without its tests, mean over seeds; `logits` are what models say
of rows (grades and soft labels among them), `features` states and embeddings, `rest` numbers, names and framing.
`calls` are rows or prompts that models by name were asked (by the server, but for a generator that clients hold),
`tokens` what these read and said; where a layer of privacy stands, nobody counts them. `epsilon` is what the run's own
ledger says. CPU seconds are of a cell with its tests and its report. `own tests` are a few rows of each client, of its
own mix; `inferdpt` answers these and no test. Methods that the family's file has no arm for run with the knobs of their
trial, which are tiny."""


def page(found: Comparison, misfits: Sequence[Misfit], spent: Mapping[str, float], line: str) -> str:
    """The whole page."""
    card = found.card
    out = [f"<!-- {line} -->", f"# {card['title']}", "", " ".join(card["paper"].split()), "",
           *(f"- {s}" for s in card["shows"]), "", " ".join(card["about"].split()), "",
           f"Seeds {', '.join(map(str, found.seeds))}; means with 95 % bootstrap intervals. {' '.join(NOTES.split())}",
           ""]
    out += tables(found, spent)
    if misfits:
        out += ["## What does not fit", "", "As the build says it, tried with the knobs of the other table or of the "
                "method's own trial.", "", "| setting | method | why |", "|---|---|---|"]
        out += [f"| {m.setting} | {m.method} | {' '.join(m.why.split())} |" for m in misfits]
        out.append("")
    out += ["Each cell is a run's folder: `fedllm run FOLDER/recipe.yaml` repeats it, and its `report.html` tells it "
            "whole.", ""]
    return "\n".join(out)
