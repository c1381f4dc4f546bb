"""The figures of a comparison's page: quality against bytes, intervals, curves."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import plotly.graph_objects as go

from fedllm.comparisons.figures import GLOBAL, Row, Table
from fedllm.report.charts import html
from fedllm.report.facts import is_share, label, mean_metric
from fedllm.runs.folder import RunFolder

COLORS = ("#3b7dd8", "#d98b2b", "#2a9d6f", "#b5485d", "#7a5cc2", "#4aa3b5", "#8a8f3c", "#c06fb0", "#6b7a8f", "#a0522d")


def color(i: int) -> str:
    """Of the i-th arm."""
    return COLORS[i % len(COLORS)]


def _axis(table: Table) -> dict[str, str | None]:
    return {"title": label(table.metric), "tickformat": ".0%" if is_share(table.metric) else None}


def _decades(values: list[float]) -> dict[str, str | int]:
    """A log axis with marks at 1, 2 and 5, or where it spans more at 1: nine of a decade would lie on each other."""
    return {"type": "log", "dtick": "D2" if max(values) < 100 * min(values) else 1}


def _bar(row: Row) -> dict[str, object]:
    q = row.quality
    assert q is not None
    return {"type": "data", "array": [q.high - q.mean], "arrayminus": [q.mean - q.low], "thickness": 1.5}


def front(table: Table) -> str | None:
    """Each arm's mean against the bytes of a run, those that no other beats on a line."""
    have = [(i, r) for i, r in enumerate(table.rows) if r.quality]
    if len(have) < 2:
        return None
    figure = go.Figure()
    zero = any(r.up + r.down == 0 for _, r in have)  # a log axis has no place for it
    ends = sorted((r.up + r.down, r.quality.mean) for _, r in have if r.front and r.quality)
    figure.add_scatter(x=[x for x, _ in ends], y=[y for _, y in ends], mode="lines", showlegend=False,
                       line={"color": "#9aa4b1", "dash": "dot", "shape": "hv"}, hoverinfo="skip")
    for i, r in have:
        assert r.quality is not None
        figure.add_scatter(x=[r.up + r.down], y=[r.quality.mean], mode="markers", name=r.arm, error_y=_bar(r),
                           marker={"size": 11 if r.front else 8, "color": color(i),
                                   "symbol": "circle" if r.front else "circle-open"})
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title="bytes of a run", tickformat="~s",
                        **({} if zero else _decades([r.up + r.down for _, r in have])))
    figure.update_yaxes(**_axis(table))
    return html(figure, 360 + 12 * len(have))


def intervals(table: Table) -> str | None:
    """Each arm's mean and interval, and every seed as a dot."""
    have = [(i, r) for i, r in enumerate(table.rows) if r.quality]
    if not have:
        return None
    figure = go.Figure()
    for i, r in have:
        assert r.quality is not None
        figure.add_scatter(x=list(r.figures.values()), y=[r.arm] * len(r.figures), mode="markers", showlegend=False,
                           marker={"size": 6, "color": color(i), "opacity": 0.45}, name=f"{r.arm}, by seed")
        figure.add_scatter(x=[r.quality.mean], y=[r.arm], mode="markers", showlegend=False, name=r.arm,
                           error_x=_bar(r), marker={"size": 10, "color": color(i)})
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_xaxes(**_axis(table))
    return html(figure, 130 + 34 * len(have))


def curves(table: Table, folder: Path) -> str | None:
    """The metric by round, mean over seeds, of runs that were tested in between."""
    figure, most, last = go.Figure(), 0, 0
    for i, row in enumerate(table.rows):
        by_round: dict[int, list[float]] = defaultdict(list)
        for seed in row.figures:
            for event in RunFolder(folder / row.cells[seed]).events(lambda e: e["kind"] == "evaluation"):
                told = event.get("global") or {} if table.on == GLOBAL else None
                value = told.get(table.metric) if told is not None else mean_metric(event["clients"], table.metric)
                if value is not None:
                    by_round[event["round"]].append(float(value))
        rounds = sorted(r for r, v in by_round.items() if len(v) >= len(row.figures))
        most, last = max(most, len(rounds)), max([last, *rounds])
        figure.add_scatter(x=rounds, y=[sum(by_round[r]) / len(by_round[r]) for r in rounds], mode="lines+markers",
                           name=row.arm, line={"color": color(i), "width": 2}, marker={"size": 5})
    if most < 2:
        return None
    figure.update_xaxes(title="rounds done", dtick=max(1, math.ceil(last / 10)))  # no half of a round
    figure.update_yaxes(**_axis(table))
    return html(figure, 360 + 12 * len(table.rows))
