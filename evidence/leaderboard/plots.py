"""Pictures of the leaderboard: each method's quality against a cost, as SVG that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

Brief = Mapping[str, Any]
WIDE, HIGH, LEFT, DOWN, TOP, RIGHT = 900, 520, 66, 52, 40, 190
COLORS = ("#3b7dd8", "#d98b2b", "#2a9d6f", "#b5485d", "#7a5cc2", "#4aa3b5", "#8a8f3c", "#c06fb0", "#6b7a8f", "#a0522d",
          "#1d2733", "#e0674c", "#5b8c5a", "#99621e", "#2f4b9a", "#c9a227", "#7f7f7f", "#00796b")
INK, SOFT = "#1d2733", "#e6e9ee"
LETTER = 6.2
"""Width of a letter of a label."""


def scatter(rows: Sequence[Brief], world: Mapping[str, Any], which: str, cost: str, title: str) -> str:
    """The `which` ("global" or "personal") model of each method by family, with labels where there is room."""
    points = [(x, r[which][0], r) for r in rows if r[which] and (x := amount(r, cost)) is not None]
    if len(points) < 2:
        return ""
    families = sorted({r["family"] for _, _, r in points})
    least = min((x for x, _, _ in points if x > 0), default=1.0) / 3  # what is 0 stands left of all on a log axis
    xs = [math.log10(max(x, least)) for x, _, _ in points]
    ys = [y for _, y, _ in points]
    spans = [(min(v) - 0.04 * (max(v) - min(v) or 1), max(v) + 0.06 * (max(v) - min(v) or 1)) for v in (xs, ys)]
    place = [(_scaled(x, spans[0], LEFT, WIDE - RIGHT), _scaled(y, spans[1], HIGH - DOWN, TOP))
             for x, y in zip(xs, ys, strict=True)]
    none = any(x == 0 for x, _, _ in points)
    parts = _axes(spans, f"{world['metric']} of the {which} model", title, none, least)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in place]
    for (x, y), (_, _, r) in sorted(zip(place, points, strict=True), key=lambda p: which not in p[1][2]["front"]):
        color = COLORS[families.index(r["family"]) % len(COLORS)]
        fill = color if which in r["front"] else "white"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{color}" stroke-width="2">'
                     f'<title>{html.escape(r["method"])}</title></circle>')
        parts += _label(r["method"], x, y, taken)
    for i, family in enumerate(families):
        y = TOP + 18 * i
        parts.append(f'<circle cx="{WIDE - RIGHT + 24}" cy="{y}" r="5" fill="{COLORS[i % len(COLORS)]}"/>'
                     f'<text x="{WIDE - RIGHT + 36}" y="{y + 4}">{html.escape(family)}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" '
            f'font-size="12" fill="{INK}"><rect width="{WIDE}" height="{HIGH}" fill="white"/>' + "".join(parts)
            + "</svg>\n")


def amount(row: Brief, cost: str) -> float | None:
    """Bytes both ways, or another cost by its name."""
    if cost == "bytes":
        return None if row["up"] is None else row["up"] + row["down"]
    return row[cost]


def _scaled(value: float, span: tuple[float, float], low: float, high: float) -> float:
    return low + (value - span[0]) / (span[1] - span[0]) * (high - low)


def _axes(spans: Sequence[tuple[float, float]], metric: str, title: str, none: bool, least: float) -> list[str]:
    (x0, x1), (y0, y1) = spans
    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{metric} against {html.escape(title)}</text>']
    for i in range(6):
        value = y0 + (y1 - y0) * i / 5
        y = _scaled(value, spans[1], HIGH - DOWN, TOP)
        said = f"{100 * value:.0f} %" if metric.startswith("accuracy") else f"{value:.2f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{SOFT}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        if none and 10**power < 2 * least:
            continue
        x = _scaled(power, spans[0], LEFT, WIDE - RIGHT)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HIGH - DOWN}" stroke="{SOFT}"/>'
                     f'<text x="{x:.1f}" y="{HIGH - DOWN + 18}" text-anchor="middle">{short(10.0**power)}</text>')
    if none:
        x = _scaled(math.log10(least), spans[0], LEFT, WIDE - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HIGH - DOWN + 18}" text-anchor="middle">none</text>')
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 12}" text-anchor="middle">{html.escape(title)} '
                 "(filled: no other is as good for fewer bytes)</text>")
    return parts


def short(value: float) -> str:
    """1000 as 1k, 1000000 as 1M."""
    for power, sign in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:g}{sign}"
    return f"{value:g}"


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """The method's name beside its point, on the first side that is free; none where there is no room."""
    wide = LETTER * len(text)
    for left, up, anchor in ((x + 8, y + 4, "start"), (x - 8 - wide, y + 4, "end"), (x - wide / 2, y - 9, "middle"),
                             (x - wide / 2, y + 18, "middle"), (x + 8, y - 8, "start"), (x + 8, y + 15, "start")):
        box = (left, up - 10, left + wide, up + 2)
        inside = box[0] > LEFT - 8 and box[2] < WIDE - RIGHT + 14 and box[1] > TOP - 14 and box[3] < HIGH - DOWN + 4
        if inside and not any(a < box[2] and box[0] < c and b < box[3] and box[1] < d for a, b, c, d in taken):
            taken.append(box)
            at = {"start": left, "end": left + wide, "middle": left + wide / 2}[anchor]
            return [f'<text x="{at:.1f}" y="{up:.1f}" text-anchor="{anchor}" font-size="11">{html.escape(text)}</text>']
    return []
