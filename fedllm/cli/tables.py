"""What the terminal shows: results, plans, methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from fedllm.core.card import Claim
from fedllm.methods.registry import method_class, source_of
from fedllm.report.facts import compared, duration, figures, label, number, rules, shown
from fedllm.runs.plan import Plan
from fedllm.runs.progress import size
from fedllm.runs.rehearse import Proposal
from fedllm.runs.result import Result
from fedllm.runs.store import read_json


def show_result(console: Console, result: Result) -> None:
    """The comparison, a few answers, and where everything lies."""
    if compared(result)[1]:
        console.print(comparison_table(result))
    else:
        console.print(f"{escape(result.method)}, {result.rounds} rounds: no test was given", highlight=False)
    show_samples(console, result)
    if result.skipped:
        console.print(f"[yellow]skipped rounds[/yellow] (too few answers): {[k + 1 for k in result.skipped]}")
    if result.failed:
        console.print(f"[bold red]failed[/bold red]: {escape(result.failed)}")
    if result.ended:
        console.print(f"[yellow]ended before round {result.rounds + 1}[/yellow]: {escape(result.ended)}")
    if result.best and result.best["kept"]:
        console.print(f"[yellow]kept round {result.best['round']}[/yellow]: its loss on {result.best['of']} was the "
                      f"best ({result.best['loss']:.4g})")
    where = Table.grid(padding=(0, 2))
    tests = result.bytes.get("evaluation")
    tested = f"; to test: {size(tests['up'])} up, {size(tests['down'])} down" if tests else ""
    for name, value in (("model", result.adapter_path or f"{result.folder}/clients (each client its own)"),
                        ("report", result.report_path), ("record", result.folder),
                        ("sent", f"{size(result.bytes['up'])} up, {size(result.bytes['down'])} down" + tested),
                        ("took", f"{duration(result.seconds)}, {size(result.peak_memory_bytes)} of memory"),
                        ("state", result.state_digest)):
        where.add_row(f"[dim]{name}[/dim]", escape(str(value)))
    console.print(where, soft_wrap=True)


def comparison_table(result: Result) -> Table:
    """before / local only / federated / centralized: the global test, and the mean over clients' own tests."""
    columns, rows = figures(result)
    table = Table(title=f"{result.method}, {result.rounds} rounds", title_justify="left", title_style="bold")
    table.add_column("")
    for own, n in columns:
        where = "clients' own tests" if own else "global test"
        table.add_column(f"{where}\n{label(n, result.metrics)}", justify="right")
    for name, cells in rows:
        table.add_row(name, *cells, style="bold green" if name.startswith("federated") else "")
    return table


def show_samples(console: Console, result: Result, most: int = 3) -> None:
    """Answers before and after."""
    path = result.folder / "samples.json"
    shown: list[dict[str, str]] = read_json(path)[:most] if path.exists() else []
    for s in shown:
        if "picture" in s and not s["after"]:
            continue  # nobody said what it shows
        grid = Table.grid(padding=(0, 2))
        grid.add_row("[dim]prompt[/dim]", escape(_short(s["prompt"] or "(a picture)")))
        grid.add_row("[dim]expected[/dim]", escape(s["expected"]))
        grid.add_row("[dim]before[/dim]", escape(_short(s["before"])) or "(nothing)")
        right = s["after"].split() == s["expected"].split()
        color = "green" if right else "yellow"
        grid.add_row("[dim]after[/dim]", f"[{color}]{escape(_short(s['after'])) or '(nothing)'}[/]")
        console.print(Panel(grid, border_style="dim"))


def _short(text: str, most: int = 300) -> str:
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    return text if len(text) <= most else "... " + text[-most:]


def client_table(console: Console, result: Result) -> Table:
    """Every client's own test before, alone and federated, by as many metrics as the terminal is wide, at least one."""
    e = result.evaluation
    columns = [("before", (e.get("before") or {}).get("clients", {})),
               ("local only", (e.get("baselines", {}).get("local_only") or {}).get("clients", {})),
               ("federated", e.get("clients", {})),
               ("centralized", (e.get("baselines", {}).get("centralized") or {}).get("clients", {})),
               *((name.replace("_", " "), rule["clients"]) for name, rule in rules(result).items())]
    columns = [(name, m) for name, m in columns if m]
    metrics = shown(result.metrics, *(m for _, c in columns for m in c.values()))
    for count in range(max(1, len(metrics)), 0, -1):
        table = _clients(result, columns, metrics[:count])
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
            break
    if left := metrics[count:]:
        table.caption = f"{', '.join(label(n, result.metrics) for n in left)}: in the report"
    return table


def _clients(result: Result, columns: Sequence[tuple[str, Any]], metrics: Sequence[str]) -> Table:
    """These metrics of every client, each before, alone and so on."""
    table = Table(title="each client on rows of its own", title_justify="left", title_style="bold")
    table.add_column("client")
    for n in metrics:
        for name, _ in columns:
            table.add_column(f"{label(n, result.metrics)}\n{name}", justify="right")
    for client in result.evaluation.get("clients", {}):
        table.add_row(client, *(number(c.get(client, {}).get(n), n) for n in metrics for _, c in columns))
    return table


def show_plan(console: Console, plan: Plan) -> None:
    """What a run is expected to need."""
    table = Table(title=f"{plan.rounds} rounds of {plan.cohort} clients", title_justify="left", title_style="bold")
    for name in ("phase", "up", "down"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, sizes in plan.by_phase.items():
        table.add_row(phase, size(sizes["up"]), size(sizes["down"]))
    table.add_section()
    table.add_row("rounds, in all", size(plan.up), size(plan.down), style="bold")
    if plan.evaluation["by_phase"]:
        table.add_row("tests, beside them", size(plan.evaluation["up"]), size(plan.evaluation["down"]))
    console.print(table)
    if plan.metrics:
        console.print("tested by " + ", ".join(label(n, plan.metrics) for n in plan.metrics), highlight=False)
    extra = f", baselines {duration(plan.seconds_baselines)} more" if plan.seconds_baselines else ""
    privacy = "\n        ".join(map(privacy_line, plan.privacy)) or "no layer that accounts for it"
    for why in plan.cautions:
        console.print(f"[yellow]mind[/]    {escape(why)}", highlight=False)
    console.print(f"time    {duration(plan.seconds)}{extra}\nmemory  {size(plan.peak_memory_bytes)} at the peak\n"
                  f"privacy {escape(privacy)}", highlight=False)


def show_proposal(console: Console, found: Proposal) -> None:
    """The settings that were rehearsed, the best first."""
    table = Table(title=f"epsilon {found.epsilon:g} at delta {found.delta:.3g}, rehearsed on {found.rows} public rows, "
                        f"tested on {found.tested}", title_justify="left", title_style="bold")
    cols = ("loss", "accuracy") if found.metric == "accuracy" else ("loss",)
    server = found.own.setting.server_lr is not None
    for name in ("rounds", "rate", "clip", "batch", *(["server's rate"] if server else []), "noise", *cols, "seeds"):
        table.add_column(name, justify="right")
    for t in found.tried[:10]:
        s = t.setting
        table.add_row(str(s.rounds), f"{s.lr:.3g}", f"{s.clip_norm:.3g}", str(s.batch_size),
                      *([f"{s.server_lr:.3g}"] if s.server_lr is not None else []),
                      f"{t.noise_multiplier:.3g}", *(f"{x:.4g}" for x in (t.loss, t.score)[:len(cols)]), str(t.seeds),
                      style="bold" if t is found.tried[0] else "")
    console.print(table)
    console.print(f"as the recipe says it: {found.metric} {found.own.score:.4g}\nproposed: {' '.join(found.overrides)}",
                  highlight=False, soft_wrap=True)


def privacy_line(says: Mapping[str, Any]) -> str:
    """For example `dp_fedavg: epsilon 7.99 at delta 1e-05 with noise multiplier 0.94; 10 rounds fit the budget`."""
    z, spent = says["noise_multiplier"], format(says["epsilon"], ".2f" if says["epsilon"] >= 0.1 else ".2g")
    fits = says.get("rounds_that_fit")
    return (f"{says['layer']}: epsilon {spent} at delta {says['delta']:.3g} with noise multiplier {z:.3g}"
            + ("" if fits is None else f"; {fits} rounds fit the budget")
            + ("; noise is {:.2g} of the longest way that the run can go{}".format(
                share, ": hardly anything will be learned" if share > 0.3 else "")
               if (share := says.get("noise_share")) is not None else ""))


def show_methods(console: Console, names: Sequence[str]) -> None:
    """These methods: id, topic, title."""
    table = Table(title=f"{len(names)} methods", title_justify="left", title_style="bold")
    table.add_column("id", style="bold", no_wrap=True)
    table.add_column("topic")
    table.add_column("what it is")
    wide = console.width >= 120
    if wide:
        table.add_column("sends")
    for name in names:
        card = method_class(name).card
        table.add_row(name, card.topic, card.title.partition(": ")[2] or card.title, *([card.sends] if wide else []))
    console.print(table)
    console.print("[dim]fedllm methods ID shows its card, knobs, claim and file[/dim]")


def method_facts(name: str) -> dict[str, Any]:
    """One method's card, knobs and claim as plain values."""
    kind = method_class(name)
    card = {k: v for k, v in vars(kind.card).items() if isinstance(v, str | int | float | bool | tuple | None)}
    card["moves"] = None if kind.card.moves is None else vars(kind.card.moves)
    return {"id": name, **card, "claim": vars(kind.card.claim), "knobs": kind.knobs(), "file": source_of(name)}


def show_method(console: Console, name: str) -> None:
    """One method's card, knobs, claim, and where its code is."""
    kind = method_class(name)
    card, claim = kind.card, kind.card.claim
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("method", f"{name}: {card.title}"), ("paper", card.paper), ("topic", card.topic), ("sends", card.sends),
        ("needs", card.needs), ("moves", card.moves and card.moves.words),
        ("claim", f"{claim.says} (rig {claim.rig}: {_figure(claim)} {claim.holds} {claim.threshold:g}, "
                  f"{_seeds(claim)})"),
        ("evidence", card.evidence)]
    for key, value in rows:
        if value:
            grid.add_row(key, escape(str(value)))
    console.print(grid)
    console.print(f"[dim]{'file':8}[/dim]  {escape(_relative(source_of(name)))}", highlight=False, soft_wrap=True)
    console.print(f"\n[italic]{escape((kind.__doc__ or '').strip().partition(chr(10) * 2)[0])}[/italic]")
    if knobs := kind.knobs():
        table = Table(title="knobs (method.KEY in a recipe)", title_justify="left", title_style="bold")
        for column in ("knob", "default", "allowed", "what it does"):
            table.add_column(column)
        for key, k in knobs.items():
            table.add_row(key, str(k["default"]), escape(allowed(k)), escape(k.get("doc", "")))
        console.print(table)


def _figure(claim: Claim) -> str:
    """What a claim compares with its threshold."""
    sign = {"own": "", "ratio": f" / that of {claim.baseline}", "difference": f" - that of {claim.baseline}"}
    return claim.metric + sign[claim.relative]


def _seeds(claim: Claim) -> str:
    """On how many seeds it is measured; what no seed moves on few."""
    return f"{claim.seeds} seeds" if claim.seeds else "3 seeds" if claim.sort == "exact" else "10 seeds or more"


def allowed(knob: dict[str, Any]) -> str:
    """The values that a knob takes, as text."""
    if knob.get("options"):
        return ", ".join(str(o) for o in knob["options"])
    limits = [f"{sign} {knob[op]:g}" for op, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
              if knob.get(op) is not None]
    return " and ".join(limits) or str(knob["type"])


def _relative(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
