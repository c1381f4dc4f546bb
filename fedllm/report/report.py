"""The report: one HTML file that needs nothing else, readable in a light and in a dark browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from fedllm.core.errors import RunError
from fedllm.report import charts
from fedllm.report.card import model_card
from fedllm.report.clients import clients
from fedllm.report.facts import (
    Facts,
    duration,
    figures,
    label,
    number,
    read_facts,
    shown,
)
from fedllm.report.page import note, page, section, sentence, side_by_side
from fedllm.report.statement import privacy_statement, seen, summary
from fedllm.runs.folder import RunFolder
from fedllm.runs.progress import size
from fedllm.runs.received import received
from fedllm.runs.result import Result
from fedllm.runs.store import reading


def publish(folder: RunFolder, result: Result) -> None:
    """Write `report.html`, `privacy_statement.md` and `model_card.md` of a finished run into its folder."""
    folder.write_text("report.html", report_html(folder, result))
    folder.write_text("privacy_statement.md", privacy_statement(folder, result))
    folder.write_text("model_card.md", model_card(folder, result))


def write_report(path: str | Path, trust_remote_code: bool = False, plugins: Sequence[str | Path] = ()) -> Path:
    """Write what `publish` writes afresh, from the record of the finished run in this folder."""
    folder = RunFolder.open(Path(path))
    try:
        with reading(folder.path):
            if read_facts(folder).recipe.get("plugins"):  # the card of a method of one's own is in its file
                received(folder.path, trust_remote_code, plugins)
            publish(folder, Result.load(folder.path))
    except OSError as error:
        raise RunError(f"{folder.path} cannot be written: {error.strerror or error}") from None
    return folder.path / "report.html"


def report_html(folder: RunFolder, result: Result) -> str:
    """The whole page."""
    facts = read_facts(folder)
    body = "\n".join(part for part in (
        _header(facts, result), _figures(facts, result), _table(result),
        _learning(facts, result),
        clients(facts, result), _samples(facts), _bytes(facts, result), _energy(result),
        _privacy(facts, result), _audit(folder), _cautions(facts), _trouble(facts), _recipe(facts)) if part)
    return page(facts.recipe["name"], body)


def _learning(facts: Facts, result: Result) -> str:
    baselines = result.evaluation.get("baselines", {})
    curves = {"training loss as clients report it": charts.training(facts),
              "the model on the global test": charts.testing(facts, baselines, result.metrics)}
    says = sentence(name for name, curve in curves.items() if curve)
    return section("Learning", says, side_by_side([*curves.values()]))


def _header(facts: Facts, result: Result) -> str:
    r = facts.recipe
    said = [f"method <b>{escape(result.method)}</b>", f"model <b>{escape(str(r['model']['name']))}</b>",
            f"trains <b>{escape(r['space']['name'])}</b>", f"<b>{len(facts.clients)}</b> clients",
            f"<b>{result.rounds}</b> rounds", f"seed <b>{result.seed}</b>", f"engine <b>{escape(result.engine)}</b>"]
    early = f"<p>Ended before round {result.rounds + 1} of {r['rounds']}: {escape(result.ended)}.</p>"
    best = result.best or {}
    if best.get("kept"):
        said.append(f"keeps round <b>{best['round']}</b>, the best on {escape(best['of'])}")
    failed = f"<p><b>Failed:</b> {escape(result.failed)}.</p>" if result.failed else ""
    return (f"<header><h1>{escape(r['name'])}</h1><p>{' &middot; '.join(said)}</p>{failed}"
            f"{early if result.ended else ''}</header>")


def _figures(facts: Facts, result: Result) -> str:
    before, after = (result.evaluation.get("before") or {}).get("global"), result.evaluation.get("global")
    cards = []
    for name in shown(result.metrics, after):
        was = f"before: {number(before[name], name)}" if before and name in before else ""
        cards.append((f"global test, {label(name, result.metrics)}", number(after[name], name), was))  # type: ignore[index]
    per_round = result.bytes["up"] / max(1, result.rounds) / max(1, len(facts.clients))
    cards += [("sent up", size(result.bytes["up"]), f"{size(per_round)} a client and round"),
              ("sent down", size(result.bytes["down"]), _tests(result)),
              ("time", duration(result.seconds),
               f"{result.joules:.0f} J by {result.joules_from}" if result.joules else ""),
              ("peak memory", size(result.peak_memory_bytes), "resident, whole process")]
    return "<div class='figures'>" + "".join(
        f"<div class='figure'><span>{escape(t)}</span><strong>{escape(v)}</strong><small>{escape(s)}</small></div>"
        for t, v, s in cards) + "</div>"


def _tests(result: Result) -> str:
    """What tests cost beside the rounds; runs of version 0.1.0 counted both as one."""
    of_tests = result.bytes.get("evaluation")
    return f"tests: {size(of_tests['up'])} up, {size(of_tests['down'])} down" if of_tests else "tests included"


def _table(result: Result) -> str:
    columns, rows = figures(result)
    if not columns:
        return ""
    head = "".join(f"<th>{escape(label(n, result.metrics))}<br><small>"
                   f"{'own tests, mean' if own else 'global test'}</small></th>" for own, n in columns)
    lines = []
    for name, cells in rows:
        mark = " class='mine'" if name.startswith("federated") else ""
        lines.append(f"<tr{mark}><th>{escape(name)}</th>{''.join(f'<td>{v}</td>' for v in cells)}</tr>")
    table = (f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead>"
             f"<tbody>{''.join(lines)}</tbody></table></div>")
    says = " ".join(text for name, text in BASELINES.items() if name in dict(rows))
    return section("What federation gives", says, table)


BASELINES = {
    "local only": "Local only: each client trains alone; its model is tested on the global test and the mean is shown.",
    "centralized": "Centralized: all rows pooled, which a simulation may do and a federation may not."}
"""What stands over the table of rows that are there."""


def _samples(facts: Facts) -> str:
    if any("picture" in s for s in facts.samples):
        return _pictures(facts)
    cards = []
    for s in facts.samples:
        good = "good" if s["after"].split() == s["expected"].split() else "off"
        cards.append(f"<div class='card sample'><pre>{escape(s['prompt'][-900:])}</pre><dl><dt>expected</dt><dd>"
                     f"{escape(s['expected'])}</dd><dt>before</dt><dd>{escape(s['before']) or '(nothing)'}</dd>"
                     f"<dt>after</dt><dd class='{good}'>{escape(s['after']) or '(nothing)'}</dd></dl></div>")
    return section("Answers before and after", "Prompts of the global test, as the model continues them.",
                    f"<div class='grid'>{''.join(cards)}</div>" if cards else None)


def _pictures(facts: Facts) -> str:
    """A few pictures, as the model names them."""
    cards = []
    for s in facts.samples:
        good, label = "good" if s["after"] == s["expected"] else "off", escape(s["expected"])
        asked = f"<p>{escape(s['prompt'])}</p>" if s["prompt"] else ""
        said = (f"<dt>before</dt><dd>{escape(s['before'])}</dd>"
                f"<dt>after</dt><dd class='{good}'>{escape(s['after'])}</dd>") if s["after"] else ""
        cards.append(f"<figure class='card'><img src='data:image/png;base64,{escape(s['picture'])}' alt='{label}'>"
                     f"<figcaption>{asked}<dl><dt>label</dt><dd>{label}</dd>{said}</dl><small>{escape(s['whose'])}"
                     "</small></figcaption></figure>")
    says = "A few pictures, and what the served model says of them before and after." if any(
        s["after"] for s in facts.samples) else "A few pictures; the run kept no served model's answers to them."
    return section("Pictures", says, f"<div class='pictures'>{''.join(cards)}</div>")


def _bytes(facts: Facts, result: Result) -> str:
    phases = dict(result.bytes["by_phase"])
    for phase, sizes in result.bytes.get("evaluation", {}).get("by_phase", {}).items():
        phases[f"test: {phase}"] = sizes
    chart = charts.traffic(phases)
    says = (f"Counted exactly, framing included: {result.bytes['up']:,} bytes up and {result.bytes['down']:,} down "
            f"({_tests(result)}). A phase is the client function that was asked for.")
    return section("On the wire", says, f"<div class='card'>{chart}</div>" if chart else None)


def _energy(result: Result) -> str:
    """What the meter says, where the recipe has an energy section."""
    e = result.reports.get("EdgeEnergy")
    if not e:
        return ""
    rows = [("tokens a joule (padding not counted)", f"{e['tokens_per_joule']:.4g}"),
            ("joules", f"{e['joules']:.4g}"),
            *((f"of these at {who}", f"{e['joules_by'][who]:.4g} J, {100 * share:.1f} %")
              for who, share in e["shares"].items()),
            ("granularity: computing / sending", f"{e['granularity']:.3g}"),
            ("use of the peak (MFU)", f"{100 * e['mfu']:.1f} %"),
            ("operations a token", f"{e['flops_per_token']:.4g}"),
            *((f"clients' seconds: {k}", f"{e[k + '_seconds']:.4g}") for k in ("compute", "receive", "send", "wait")),
            ("answers that never came", f"{e['unheard']:.0f}")]
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    shown = ("device", "link", "server_device", "server_link", "utilization")
    constants = yaml.safe_dump({k: e["constants"][k] for k in shown}, sort_keys=False)
    says = "Estimated from declared power, by the constants below" if e["estimated"] else (
        "Clients' computing as the counters of their machines have it, all else from declared power")
    says += f"; not measured: {e['not_measured']}." if e["not_measured"] else "."
    return section("Energy", says, f"<div class='card'><table><tbody>{lines}</tbody></table><details><summary>"
                    f"Constants</summary><pre>{escape(constants)}</pre></details></div>")


def _privacy(facts: Facts, result: Result) -> str:
    said = escape(" ".join(summary(result, facts)).replace("**", "").replace("`", ""))
    rows = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in seen(facts, result))
    table = ("<details><summary>Who saw what</summary><div class='scroll text'><table><thead><tr><th>party</th>"
             f"<th>phase</th><th>messages</th><th>bytes</th><th>what</th></tr></thead><tbody>{rows}</tbody></table>"
             "</div></details>")
    head = note(f"{result.audit['events']} events, head of their hash chain {result.audit['head']}: "
                "`fedllm audit verify` checks them.") if result.audit else ""
    return section("Privacy and evidence", "The whole statement is in privacy_statement.md.",
                    f"<div class='card'><p>{said}</p>{table}{head}</div>")


def _audit(folder: RunFolder) -> str:
    """What `fedllm audit` found, where it has been called."""
    if not (folder.path / "audit.json").is_file():
        return ""
    found = folder.read("audit.json")
    lines = [(c["name"].replace("_", " "), "pass" if c["holds"] else "FAIL", f"{c['figure']:.3f}", f"{c['limit']:g}",
              c["says"]) for c in found["checks"]]
    lines += [(name, "none", "", "", why) for name, why in found["left_out"].items()]
    rows = "".join(f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(v)}</td>" for v in rest) + "</tr>"
                   for name, *rest in lines)
    table = ("<div class='card'><div class='scroll text'><table><thead><tr><th>what</th><th></th><th>figure</th>"
             f"<th>at most</th><th>how it was measured</th></tr></thead><tbody>{rows}</tbody></table></div></div>")
    says = "What the model and the messages give away, by `fedllm audit`: " + (
        "every figure is within its limit." if found["pass"] else "a figure is over its limit.")
    return section("Audit", says, table)


def _cautions(facts: Facts) -> str:
    said = "".join(f"<li>{escape(why)}</li>" for why in facts.cautions)
    return section("To bear in mind", "What the run said of its rows, its model and its settings.",
                   f"<div class='card'><ul>{said}</ul></div>" if said else None)


def _trouble(facts: Facts) -> str:
    lines = [(r["round"] + 1, "round skipped", "", r["skipped"]) for r in facts.rounds if "skipped" in r]
    lines += [(t.get("round", -1) + 1 or "", t["kind"].replace("_", " "), t.get("client", ""), t.get("why", ""))
              for t in facts.trouble]
    if not lines:
        return ""
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in line) + "</tr>" for line in lines[:200])
    more = f"<p class='note'>and {len(lines) - 200} more in events.jsonl</p>" if len(lines) > 200 else ""
    table = ("<div class='scroll text'><table><thead><tr><th>round</th><th>what</th><th>client</th><th>why</th></tr>"
             f"</thead><tbody>{rows}</tbody></table></div>{more}")
    if len(lines) > 8:
        table = f"<details><summary>All {len(lines)} of them</summary>{table}</details>"
    counts = Counter(line[1] for line in lines)
    says = ", ".join(f"{n} x {what}" for what, n in counts.most_common())
    return section("Left out, missed and repaired", says, table)


def _recipe(facts: Facts) -> str:
    text = yaml.safe_dump(facts.recipe, sort_keys=False)
    title = "recipe.yaml, with every default written out"
    return section("Recipe", "", f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>")
