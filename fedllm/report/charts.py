"""The report's figures, as plotly draws them; colors of text and grid follow the browser's light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from fedllm.report.facts import Facts, falls, headline, is_share, label

BLUE, GRAY, GREEN, AMBER, PURPLE = "#3b7dd8", "#9aa4b1", "#2a9d6f", "#d98b2b", "#7a5cc2"
CONFIG = {"displaylogo": False, "responsive": True, "displayModeBar": False}


def html(figure: go.Figure, height: int = 340) -> str:
    """A figure's markup, without the library, which the page holds once."""
    figure.update_layout(
        height=height, margin={"l": 56, "r": 20, "t": 20, "b": 48}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="x unified", bargap=0.25)
    return figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)


def training(facts: Facts) -> str | None:
    """Training loss by round, skipped rounds left as gaps."""
    rounds = [r["round"] + 1 for r in facts.rounds]
    losses = [r.get("loss") for r in facts.rounds]
    if not any(v is not None for v in losses):
        return None
    figure = go.Figure(go.Scatter(x=rounds, y=losses, mode="lines+markers", name="mean training loss",
                                  line={"color": BLUE, "width": 2.5}, marker={"size": 6}))
    figure.update_xaxes(title="round", dtick=max(1, len(rounds) // 10))  # no half of a round
    figure.update_yaxes(title="training loss", rangemode="tozero")
    return html(figure)


def testing(facts: Facts, baselines: Mapping[str, Any], own: Mapping[str, str]) -> str | None:
    """Metrics of the global test by round, with the baselines as lines across."""
    points = [e for e in facts.evaluations if e.get("global")]
    name = headline(points[-1]["global"], own) if points else None
    if name is None:
        return None
    figure = go.Figure(go.Scatter(x=[e["round"] for e in points], y=[e["global"].get(name) for e in points],
                                  mode="lines+markers", name="federated", line={"color": BLUE, "width": 2.5},
                                  marker={"size": 7}))
    colors = {"local_only": AMBER, "centralized": GREEN}
    for key in (*colors, *(name for name in baselines if name not in colors)):
        text, color = key.replace("_", " "), colors.get(key, GRAY)
        if (value := ((baselines.get(key) or {}).get("global") or {}).get(name)) is not None:
            side = "bottom right" if falls(name, own) else "bottom left"  # where the curve is not
            figure.add_hline(y=value, line={"color": color, "dash": "dash", "width": 2}, annotation_text=text,
                             annotation_position=side, annotation_font_color=color)
    figure.update_xaxes(title="rounds done", dtick=max(1, points[-1]["round"] // 10))
    share = is_share(name)
    figure.update_yaxes(title=f"global test: {label(name, own)}", rangemode="tozero",
                        tickformat=".0%" if share else None, range=[0, 1.05] if share else None)
    return html(figure)


COLORS = {"before": GRAY, "local only": AMBER, "global": BLUE, "nearest": PURPLE, "personal": GREEN}
"""Of whose model a client is tested with."""


def per_client(views: Mapping[str, Mapping[str, Any]], own: Mapping[str, str]) -> str | None:
    """Each client on its own rows, by whose model it is: before, alone where known, what all share, its own."""
    after = views.get("personal") or views.get("global") or {}
    clients = sorted(c for c in after if after[c])[:60]
    name = headline(after[clients[0]], own) if clients else None
    if name is None:
        return None
    figure = go.Figure()
    for title, metrics in views.items():
        figure.add_bar(x=clients, y=[metrics.get(c, {}).get(name) for c in clients], name=title,
                       marker_color=COLORS[title])
    figure.update_yaxes(title=f"own test: {label(name, own)}", tickformat=".0%" if is_share(name) else None)
    figure.update_xaxes(type="category")
    return html(figure, 380)


def traffic(by_phase: Mapping[str, Mapping[str, int]]) -> str | None:
    """Bytes by phase, both ways."""
    if not by_phase:
        return None
    figure = go.Figure()
    phases = list(by_phase)
    for way, color in (("down", GRAY), ("up", BLUE)):
        figure.add_bar(y=phases, x=[by_phase[p][way] for p in phases], name=f"{way} (bytes)", orientation="h",
                       marker_color=color)
    figure.update_xaxes(title="bytes on the wire, whole run", tickformat="~s")
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(automargin=True)
    return html(figure, 160 + 60 * len(phases))


def holdings(clients: Sequence[Mapping[str, Any]]) -> str | None:
    """Which client holds how many rows of what."""
    held = {c["id"]: c["info"].get("categories") for c in clients[:60]}
    if not any(held.values()):
        return figure_of_sizes(clients)
    kinds = sorted({k for row in held.values() for k in (row or {})})
    z = [[(held[c] or {}).get(k, 0) for k in kinds] for c in held]
    figure = go.Figure(go.Heatmap(z=z, x=kinds, y=list(held), colorscale=[[0, "rgba(59,125,216,0.04)"], [1, BLUE]],
                                  texttemplate="%{z}", hovertemplate="%{y} holds %{z} rows of %{x}<extra></extra>",
                                  showscale=False, xgap=2, ygap=2))
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(type="category", automargin=True)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return html(figure, 130 + 30 * len(held))


def figure_of_sizes(clients: Sequence[Mapping[str, Any]]) -> str | None:
    """Rows of each client, where rows have no category."""
    if not clients:
        return None
    figure = go.Figure(go.Bar(x=[c["id"] for c in clients[:60]], y=[c["n"] for c in clients[:60]], marker_color=BLUE))
    figure.update_yaxes(title="training rows")
    figure.update_xaxes(type="category")
    return html(figure)
