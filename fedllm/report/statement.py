"""The privacy statement: what a run promises to whom, what each party saw, and what is not covered, from its record."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.record import is_test
from fedllm.report.facts import Facts, read_facts, size
from fedllm.runs.folder import RunFolder
from fedllm.runs.layers import layer_classes, make_layer
from fedllm.runs.result import Result

FIELDS = ("unit", "adjacency", "sampling", "rate", "mechanism", "takes_part", "noise_multiplier", "clip", "releases",
          "threshold", "identities", "sessions", "hides", "encrypted_share")
"""What of a layer's words the statement repeats, in this order."""


def privacy_statement(folder: RunFolder, result: Result) -> str:
    """Markdown, for whoever has to judge the run."""
    facts = read_facts(folder)
    lines = [f"# Privacy statement of {facts.recipe['name']}", "", *summary(result), ""]
    for layer in (result.privacy or {}).get("layers", []):
        lines += [f"## {layer['layer']}", "", *_layer(layer), ""]
    lines += ["## Who saw what", "", "| party | phase | messages | bytes | what |", "|---|---|---|---|---|",
              *(f"| {' | '.join(row)} |" for row in seen(facts, result)), "",
              "Rows of training data left no client: no phase above carries them by itself. What a method puts into "
              "its messages is in its card; raw updates can be inverted (`fedllm.audits`).", "",
              "## The record", "",
              f"* {len(facts.clients)} clients, {result.rounds} rounds, seed {result.seed}, engine {result.engine}",
              f"* ledger: dp-accounting {importlib.metadata.version('dp-accounting')}, noise and sampling from torch's "
              "generator seeded by the operating system (no cryptographic generator)",
              *([f"* head of the record's hash chain: `{result.audit['head']}` ({result.audit['events']} events; "
                 "`fedllm audit verify` checks them)"] if result.audit else []),
              f"* final state: `{result.state_digest}`"]
    return "\n".join(lines) + "\n"


def summary(result: Result) -> list[str]:
    """The claim in a sentence or a few; "none" where any release was not accounted for."""
    privacy = result.privacy
    if not privacy:
        return ["**No privacy claim.** The run had no layer that makes one."]
    void = [f"* {why}" for why in privacy.get("void", [])]
    if void:
        return ["**No privacy claim stands**, because of releases that no ledger covers:", "", *void]
    out = [f"**({s['epsilon']:.4g}, {s['delta']:.3g})-differential privacy** of one {s['unit']} "
           f"({s['adjacency']}), by `{s['layer']}`." for s in privacy["layers"] if "epsilon" in s]
    out += [f"`{s['layer']}` hides {s['hides']}." for s in privacy["layers"] if "hides" in s]
    return [" ".join(out)] if out else ["**No privacy claim.**"]


def _layer(says: Mapping[str, Any]) -> list[str]:
    out = [f"* {name.replace('_', ' ')}: {_value(says[name])}" for name in FIELDS if name in says]
    if "epsilon" in says:
        out.insert(0, f"* epsilon {_value(says['epsilon'])} at delta {says['delta']:.3g}"
                   + (f" (by RDP: {_value(says['epsilon_rdp'])})" if "epsilon_rdp" in says else ""))
    if each := says.get("clients"):
        out.append(f"* epsilon of the {len(each)} clients: from {_value(min(each.values()))} to "
                   f"{_value(max(each.values()))}")
    out += [f"* not covered: {says['not_covered']}"] if says.get("not_covered") else []
    return out + [f"* **void**: {why}" for why in says.get("void", ())]


def _value(v: Any) -> str:
    if isinstance(v, float):
        return "infinite" if math.isinf(v) else f"{v:.4g}"
    return str(v)


def seen(facts: Facts, result: Result) -> list[Sequence[str]]:
    """(party, phase, messages, bytes, what it is), from the record's own counts and what the layers reveal."""
    own = {kind.__name__: name for name, kind in layer_classes().items()}
    stack = {x["name"]: make_layer(x["name"], {k: v for k, v in x.items() if k != "name"}, f"layers.{i}")
             for i, x in enumerate(facts.recipe["layers"])}
    hides = next((name for name, layer in stack.items() if layer.algebra.reveals == "sum"), None)
    rows = []
    of_tests = result.bytes.get("evaluation", {}).get("by_phase", {})  # tests run next to the wire, below every layer
    booked = [(is_test(phase), phase, sizes) for phase, sizes in result.bytes["by_phase"].items()]
    for test, phase, sizes in [*booked, *((True, phase, sizes) for phase, sizes in of_tests.items())]:
        layer = own.get(phase.partition(".")[0])
        up = ("test metrics of each client" if test else f"keys, shares or counts of {layer}" if layer
              else f"sums only, by {hides}" if hides else "each client's reply")
        down = "the model that is tested" if test else "keys, shares or requests" if layer else "the method's message"
        for party, way, what in (("server", "up", up), ("clients", "down", down)):
            if sizes[way]:
                rows.append((party, phase, str(facts.messages.get((test, phase, way), 0)), size(sizes[way]), what))
    return rows
