"""The privacy statement: what a run promises to whom, what each party saw, and what is not covered, from its record."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.record import is_test
from fedllm.report.facts import Facts, read_facts
from fedllm.runs.folder import RunFolder
from fedllm.runs.layers import layer_classes, make_layer
from fedllm.runs.progress import size
from fedllm.runs.result import Result

FIELDS = ("unit", "adjacency", "sampling", "rate", "mechanism", "takes_part", "noise_multiplier", "clip", "releases",
          "noise", "holds against", "threshold", "identities", "sessions", "hides", "encrypted_share")
"""What of a layer's words the statement repeats, in this order."""


def privacy_statement(folder: RunFolder, result: Result) -> str:
    """Markdown, for whoever has to judge the run."""
    facts = read_facts(folder)
    lines = [f"# Privacy statement of {facts.recipe['name']}", "", *summary(result, facts), "", *_pictures(facts)]
    for layer in (result.privacy or {}).get("layers", []):
        lines += [f"## {layer['layer']}", "", *_layer(layer), ""]
    lines += ["## Who saw what", "", "| party | phase | messages | bytes | what |", "|---|---|---|---|---|",
              *(f"| {' | '.join(row)} |" for row in seen(facts, result)), "",
              *crossed(facts), "",
              "## The record", "",
              f"* {len(facts.clients)} clients, {result.rounds} rounds, seed {result.seed}, engine {result.engine}",
              f"* ledger: dp-accounting {importlib.metadata.version('dp-accounting')}, noise and sampling from torch's "
              "generator seeded by the operating system (no cryptographic generator)",
              *([f"* head of the record's hash chain: `{result.audit['head']}` ({result.audit['events']} events; "
                 "`fedllm audit verify` checks them)"] if result.audit else []),
              f"* final state: `{result.state_digest}`"]
    return "\n".join(lines) + "\n"


def _pictures(facts: Facts) -> list[str]:
    """What the record shows of private rows, which no layer covers."""
    count = sum(s.get("whose", "").startswith("PRIVATE") for s in facts.samples)
    return [f"**Not covered:** {count} pictures of private rows in the report and in samples.json, where the recipe's "
            "`evaluate.pictures: private` puts them.", ""] if count else []


def summary(result: Result, facts: Facts) -> list[str]:
    """The claim in a sentence or a few; "none" where any release was not accounted for, or nothing was released."""
    privacy = result.privacy
    if not privacy:
        return ["**No privacy claim.** The run had no layer that makes one."]
    void = [f"* {why}" for why in privacy.get("void", [])]
    if void:
        return ["**No privacy claim stands**, because of releases that no ledger covers:", "", *void]
    if not any(n for (test, _, way), n in facts.messages.items() if way == "up" and not test):
        return ["**No privacy claim.** No client answered, so there is nothing that a claim could be about."]
    out = [f"**({s['epsilon']:.4g}, {s['delta']:.3g})-differential privacy** of one {s['unit']} "
           f"({s['adjacency']}), by `{s['layer']}`." for s in privacy["layers"] if "epsilon" in s]
    out += [f"`{s['layer']}` hides {s['hides']}." for s in privacy["layers"] if "hides" in s]
    if not out:
        return ["**No privacy claim.**"]
    beside = sorted(result.evaluation.get("baselines", {}))
    note = (f"**Not covered:** the figures of the baselines {', '.join(beside)}, which were trained on the same rows "
            "without these layers; who publishes them publishes what no ledger above counts.")
    return [" ".join(out), *(["", note] if beside else [])]


def crossed(facts: Facts) -> list[str]:
    """What left clients so that it could be read, from the record: said by kind and phase, never by a method's name."""
    def named(kind: str) -> list[str]:
        return sorted(f"`{phase}`" for (test, phase), kinds in facts.clear.items() if kind in kinds)

    own = {kind.__name__ for kind in layer_classes().values()}
    hidden = sorted({layer for of in facts.hidden.values() for layer in of})
    trained = sorted(f"`{phase}` ({', '.join(sorted(kinds - {'names'}))})" for (test, phase), kinds
                     in facts.clear.items()
                     if not test and kinds - {"names"} and phase.partition(".")[0] not in own)
    out = []
    if text := named("text"):
        out.append(f"**Text left clients in the clear**, in {', '.join(text)}: it may be, or may quote, their rows.")
    elif facts.clear or facts.hidden:
        out.append("No text of rows left a client: no reply of any phase above held text.")
    if hidden:
        out.append(f"Parts of replies could not be read one by one, by {', '.join(hidden)}.")
    if trained:
        out.append(f"In the clear, each client's own: {'; '.join(trained)}.")
    return [*out, "What a method puts into its messages is in its card; raw updates can be inverted (`fedllm.audits`)."]


def _layer(says: Mapping[str, Any]) -> list[str]:
    out = [f"* {name.replace('_', ' ')}: {_value(says[name])}" for name in FIELDS if name in says]
    if "epsilon" in says:
        out.insert(0, f"* epsilon {_value(says['epsilon'])} at delta {says['delta']:.3g}"
                   + (f" (by RDP: {_value(says['epsilon_rdp'])})" if "epsilon_rdp" in says else ""))
    if sees := says.get("sees"):
        out.append("* epsilon against the server and so many colluding clients, with the fewest answers: "
                   + ", ".join(f"{t}: {_value(e)}" for t, e in sees.items()))
    if each := says.get("clients"):
        out.append(f"* epsilon of the {len(each)} clients: from {_value(min(each.values()))} to "
                   f"{_value(max(each.values()))}")
    out += [f"* not covered: {says['not_covered']}"] if says.get("not_covered") else []
    return out + [f"* **void**: {why}" for why in says.get("void", ())]


def _value(v: Any) -> str:
    if isinstance(v, float):
        return "infinite" if math.isinf(v) else f"{v:.4g}"
    return str(v)


def reply_of(facts: Facts, phase: str, hides: str | None) -> str:
    """What the server could read of the replies of one phase of the method's own."""
    clear = sorted(facts.clear.get((False, phase), set()) - {"names"})
    if not hides:
        return "each client's reply" + (f": {', '.join(clear)}" if clear else "")
    beside = f"; beside them in the clear, from each client: {', '.join(clear)}" if clear else ""
    return (f"sums only, by {hides}" if facts.hidden.get((False, phase)) else "each client's reply") + beside


def seen(facts: Facts, result: Result) -> list[Sequence[str]]:
    """(party, phase, messages, bytes, what it is), from the record's own counts and what the layers reveal."""
    own = {kind.__name__: name for name, kind in layer_classes().items()}
    stack = {x["name"]: make_layer(x["name"], {k: v for k, v in x.items() if k != "name"}, f"layers.{i}")
             for i, x in enumerate(facts.recipe["layers"])}
    hides = next((name for name, layer in stack.items() if layer.algebra.reveals == "sum"), None)
    rows: list[Sequence[str]] = []
    of_tests = result.bytes.get("evaluation", {}).get("by_phase", {})  # tests run next to the wire, below every layer
    booked = [(is_test(phase), phase, sizes) for phase, sizes in result.bytes["by_phase"].items()]
    for test, phase, sizes in [*booked, *((True, phase, sizes) for phase, sizes in of_tests.items())]:
        layer = own.get(phase.partition(".")[0])
        up = ("test metrics of each client" if test else f"keys, shares or counts of {layer}" if layer
              else reply_of(facts, phase, hides))
        down = "the model that is tested" if test else "keys, shares or requests" if layer else "the method's message"
        for party, way, what in (("server", "up", up), ("clients", "down", down)):
            if sizes[way]:
                rows.append((party, phase, str(facts.messages.get((test, phase, way), 0)), size(sizes[way]), what))
    return rows
