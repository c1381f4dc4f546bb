"""The report's part about clients: each on its own rows, by whose model, and what it sent."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fedllm.report import charts
from fedllm.report.facts import Facts, falls, headline, label, number, views
from fedllm.report.page import section, sentence
from fedllm.runs.progress import size
from fedllm.runs.result import Result


def clients(facts: Facts, result: Result) -> str:
    """Bars and tables, client by client and view by view."""
    found, held = views(result), charts.holdings(facts.clients)
    bars = charts.per_client(found, result.metrics)
    parts = "".join(f"<div class='card'>{p}</div>" for p in (bars, held) if p)
    says = sentence(text for text, part in (("each client on rows of its own that it did not train on", bars),
                                            ("what each holds to train on", held)) if part)
    return section("Clients", says, _views_table(result, found) + parts + _client_table(facts, result))


VIEWS = {
    "before": "the model before the first round", "local only": "a model that the client trained alone",
    "global": "what all share: the one model, as a client has it that keeps nothing",
    "nearest": "what all share, with the part of the client whose rows have the words most like its own: for a client "
               "that was not trained itself",
    "personal": "what all share, with the client's own part"}


def _views_table(result: Result, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose model does how well on clients' own rows: the mean, the worst client and the best."""
    name = headline(next((m for of in found.values() for m in of.values() if m), None), result.metrics)
    if name is None:
        return ""
    lines = []
    for view, of in found.items():
        each = sorted((m[name] for m in of.values() if name in m), reverse=falls(name, result.metrics))
        if each:
            cells = (number(sum(each) / len(each), name), number(each[0], name), number(each[-1], name), str(len(each)))
            told = f"<td style='min-width: 15em'>{escape(VIEWS[view])}</td>"
            lines.append(f"<tr><th>{view}</th>" + "".join(f"<td class='number'>{x}</td>" for x in cells) +
                         f"{told}</tr>")
    alone = "" if "personal" in found else (
        "<p class='note'>The method keeps no part of the model at clients: each uses the one that all share.</p>")
    return (f"<div class='scroll text'><table><thead><tr><th>view</th><th>"
            f"{escape(label(name, result.metrics))}, mean</th><th>worst client</th><th>best client</th><th>clients</th>"
            f"<th>the model</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>{alone}<p></p>")


def _client_table(facts: Facts, result: Result) -> str:
    after = result.evaluation.get("clients", {})
    name = headline(next((m for m in after.values() if m), None), result.metrics)
    lines = []
    for c in facts.clients[:500]:
        sent = facts.client_bytes.get(c["id"], {"up": 0, "down": 0})
        score = number(after.get(c["id"], {}).get(name), name) if name else "-"
        lines.append(f"<tr><th>{escape(c['id'])}</th><td>{escape(str(c['n']))}</td>"
                     f"<td>{escape(str(c['rank'] or '-'))}</td><td>{score}</td>"
                     f"<td>{size(sent['up'])}</td><td>{size(sent['down'])}</td></tr>")
    return ("<details><summary>Client by client</summary><div class='scroll'><table><thead><tr><th>client</th>"
            f"<th>rows</th><th>rank</th><th>{escape(label(name or 'own test'))}</th><th>sent up</th><th>sent down</th>"
            f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>")
