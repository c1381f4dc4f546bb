"""A comparison as people read it: a page of Markdown, and one of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedllm.comparisons import pictures
from fedllm.comparisons.axes import words
from fedllm.comparisons.chance import LEVEL
from fedllm.comparisons.figures import Row, Table, between, signed
from fedllm.comparisons.told import Comparison
from fedllm.report.facts import duration, label
from fedllm.report.page import page, section, side_by_side
from fedllm.runs.progress import size

HOW = (f"Means over seeds with {LEVEL:.0%} bootstrap intervals (BCa). Differences are paired by seed, with their "
       "interval and the two-sided p of a sign-flip permutation test. Better and worse are said where the interval "
       "lies on one side of 0 and the test, corrected for all differences of the table (Holm), is at 5 % or below.")


COSTS = ("up", "down", "time", "memory", "trained", "front")
"""The last columns of a table: bytes of a run's rounds, seconds, peak memory, numbers trained, and whether no other arm
is at least as good for no more bytes."""


def head(table: Table) -> list[str]:
    """The columns of a table."""
    name = label(table.metric) or "metric"
    least = " (less is better)" if table.better == "min" else ""
    return ["", f"{table.on}, {name}{least}", f"clients' own tests, {name}", f"against {table.baseline}", "", *COSTS]


def cells_of(row: Row, table: Table) -> list[str]:
    """A row of it, as text."""
    d, m = row.difference, table.metric
    ran = bool(row.figures)
    return [row.arm, between(row.quality, m), between(row.own, m), signed(d, m), d.verdict if d else "",
            *((size(row.up), size(row.down), duration(row.seconds), size(row.memory)) if ran else ("-",) * 4),
            f"{row.trained:,}" if row.trained is not None else "-", "yes" if row.front else ""]


def shows_own(table: Table) -> bool:
    """Whether the clients' own tests are more than what the first column says already."""
    return any(row.own for row in table.rows) and not table.on.startswith("clients")


def grid_of(table: Table) -> list[list[str]]:
    """The columns and rows that are shown."""
    lines = [head(table), *(cells_of(row, table) for row in table.rows)]
    return lines if shows_own(table) else [[x for i, x in enumerate(line) if i != 2] for line in lines]


def rates_said(table: Table) -> str:
    """The rates that were chosen, arm by arm; empty where there was no grid."""
    said = [f"{row.arm} {words(row.rates)}" for row in table.rows if row.rates]
    return f"Rates chosen: {'; '.join(said)}." if said else ""


def failures(table: Table) -> list[str]:
    """Cells without a figure."""
    return [f"{row.cells[seed]} has no figure: {why}" for row in table.rows for seed, why in row.failed.items()]


def seeds_said(found: Comparison) -> str:
    """Which seeds were measured, and on which rates were chosen."""
    said = f"Seeds {', '.join(map(str, found.seeds))}"
    if not found.tuned_on:
        return f"{said}."
    grid = "; ".join(f"{k} = {', '.join(map(str, v))}" for k, v in found.grid.items())
    return (f"{said}; each arm's rates are the best of the same grid ({grid}) on seeds "
            f"{', '.join(map(str, found.tuned_on))}, by the loss on the clients' own test rows (on the global test "
            "where they keep none).")


def as_markdown(found: Comparison) -> str:
    """`comparison.md`."""
    out = [f"# {found.card.get('title', found.name)}", ""]
    if found.card:
        out += [f"{found.card['paper']}", "", *(f"- {s}" for s in found.card["shows"]), ""]
        out += [found.card["about"], ""] if found.card["about"] else []
    out += [f"{seeds_said(found)} {HOW}", ""]
    for table in found.tables:
        out += [f"## {table.setting}", "", *([table.about, ""] if table.about else [])] if table.setting else []
        out += [f"**{_cell(table.says)}**", ""]
        first, *rest = [[_cell(x) for x in line] for line in grid_of(table)]
        out += ["| " + " | ".join(first) + " |", "|---" + "|---:" * (len(first) - 1) + "|",
                *("| " + " | ".join(line) + " |" for line in rest), ""]
        out += [x for line in (rates_said(table), *failures(table)) if line for x in (_cell(line), "")]
    out += [f"- {_cell(c)}" for c in found.cautions] + ([""] if found.cautions else [])
    out += ["Each cell is a run's folder: `fedllm run FOLDER/recipe.yaml` repeats it, and its `report.html` tells it "
            "whole.", ""]
    return "\n".join(out)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def report_html(found: Comparison, folder: Path) -> str:
    """`report.html`: the tables, quality against bytes, curves, and every cell."""
    card = found.card
    said = "".join(f"<p>{escape(str(x))}</p>" for x in (card.get("paper"), card.get("about")) if x)
    shows = "".join(f"<li>{escape(s)}</li>" for s in card.get("shows", ()))
    top = (f"<header><h1>{escape(card.get('title', found.name))}</h1>{said}{f'<ul>{shows}</ul>' if shows else ''}"
           f"<p>{escape(seeds_said(found))}</p></header>")
    parts = [part for table in found.tables for part in _of_table(table, folder)]
    mind = "".join(f"<li>{escape(c)}</li>" for c in found.cautions)
    parts.append(section("What to mind", "", f"<div class='card'><ul>{mind}</ul></div>" if mind else None))
    parts.append(section("Cells", "Each is a run's folder beside this page: fedllm run FOLDER/recipe.yaml repeats it.",
                         _runs(found.tables, len(found.tables) > 1)))
    return page(f"{found.name}: comparison", "\n".join([top, *filter(None, parts)]))


def _of_table(table: Table, folder: Path) -> list[str]:
    first, *rest = grid_of(table)
    lines = "".join(f"<tr{' class=mine' if line[0] == table.baseline else ''}><th>{escape(line[0])}</th>"
                    + "".join(f"<td>{_broken(x)}</td>" for x in line[1:]) + "</tr>" for line in rest)
    markup = ("<div class='scroll tight'><table><thead><tr>" + "".join(f"<th>{escape(x)}</th>" for x in first)
              + f"</tr></thead><tbody>{lines}</tbody></table></div>")
    markup += "<p></p>"
    notes = "".join(f"<p class='note'>{escape(x)}</p>" for x in (rates_said(table), *failures(table)) if x)
    title = table.setting or "Which differences mean something"
    charts = side_by_side([pictures.front(table), pictures.curves(table, folder)]) or ""
    each = pictures.intervals(table)
    return [section(title, table.about, f"<p><b>{escape(table.says)}</b></p>{markup}{notes}"
                    f"<p class='note'>{escape(HOW)}</p>"),
            section("Pictures" + (f": {table.setting}" if table.setting else ""),
                    "Quality against bytes of a whole run, up and down together; each arm over all seeds; the metric "
                    "by round, mean over seeds.", charts + (f"<p></p><div class='card'>{each}</div>" if each else ""))]


def _broken(text: str) -> str:
    """A figure, its interval and its test under each other, as markup."""
    small = escape(text).replace(" (", "<br><small>(").replace("), ", ")</small><br><small>")
    return small + "</small>" * (" (" in text)


def _runs(tables: Sequence[Table], many: bool) -> str:
    lines = []
    for table in tables:
        for row in table.rows:
            for seed, name in row.cells.items():
                value: Any = row.figures.get(seed)
                told = "-" if value is None else f"{value:.4g}"
                link = f"<a href='{escape(name)}/report.html'>{escape(name)}</a>"
                arm = escape(f"{table.setting} " * many + row.arm)
                lines.append(f"<tr><th>{arm}</th><td>{seed}</td><td>{told}</td>"
                             f"<td>{escape(row.failed.get(seed, ''))}</td><td>{link}</td></tr>")
    return ("<details><summary>Run by run</summary><div class='scroll text'><table><thead><tr><th>arm</th><th>seed</th>"
            f"<th>figure</th><th>trouble</th><th>folder</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
            "</details>")
