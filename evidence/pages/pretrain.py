"""The page and the plot of the pre-training run, written from measured cells alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Cells = Sequence[Mapping[str, Any]]
INK, PAPER, GRID = "#1d2733", "#ffffff", "#d9dee5"
COLORS = {"ddp": "#1d2733", "diloco": "#3b7dd8", "streaming_diloco": "#2a9d6f", "sparse_loco": "#d98b2b",
          "photon": "#7a5cc2", "fedavg": "#9aa4b1"}
WANTED = {"diloco": 100.0, "streaming_diloco": 400.0, "sparse_loco": 1000.0}
"""How many times fewer bytes than DDP, within 2 % of its perplexity."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 760, 440, 62, 172, 30, 44


def write_page(found: Mapping[str, Any], folder: Path) -> None:
    """`pretrain.md` and `pretrain.svg`; nothing before there is a cell."""
    if found["cells"]:
        (folder / "pretrain.svg").write_text(picture(found["cells"]))
        (folder / "pretrain.md").write_text(page(found))


def grouped(cells: Cells) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """Cells by arm and H."""
    by: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for c in cells:
        by[c["arm"], c["H"]].append(c)
    return dict(by)


def compared(cells: Cells) -> list[dict[str, Any]]:
    """Each arm against DDP of the same seeds: perplexity over DDP's, and DDP's bytes over its own."""
    anchor = {c["seed"]: c for c in cells if c["arm"] == "ddp"}
    out = []
    for (arm, span), mine in sorted(grouped(cells).items(), key=lambda kv: (kv[0][1], kv[0][0])):
        both = [(c, anchor[c["seed"]]) for c in mine if c["seed"] in anchor]
        if both:
            out.append({"arm": arm, "H": span, "seeds": len(both), "perplexity": mean(c["perplexity"] for c, _ in both),
                        "over": mean(c["perplexity"] / d["perplexity"] for c, d in both),
                        "bytes": mean(c["bytes"] for c, _ in both),
                        "fewer": mean(d["bytes"] / c["bytes"] for c, d in both),
                        "cpu": mean(c["cpu_seconds"] for c, _ in both)})
    return out


def page(found: Mapping[str, Any]) -> str:
    """Markdown: what ran, the table, what was asked for and whether it holds; then the same of the long run."""
    s, rows = found["settings"], compared(found["cells"])
    tokens = s["steps"] * s["rows"] * s["clients"] * (s["length"] - 1)
    rates = tuned(found["tuning"], len(s["rates"]))
    head = f"""# Pre-training together: perplexity against bytes

Written by `make pretrain` (`python -m evidence.pretrain`); the cells are in [pretrain.json](pretrain.json). A Llama of
1,895,840 weights (4 layers, width 160, vocabulary {s['vocabulary']:,}) from random weights, fp32,
{s['clients']} clients with equal parts of TinyShakespeare and {s['office']:,} rows of the office stream that the
embedded model was pre-trained on (blocks of {s['length']} tokens, dealt at random; every 16th is held out, and
{s['held']} of those are tested). All arms learn from {tokens:,} tokens: {s['steps']} steps of {s['rows']} blocks a
client, AdamW with warm-up and a cosine over all steps. {rates}
Outer rates are the methods' own and were not tuned (streaming_diloco: DiLoCo's).

So short a run is hard on whoever synchronizes seldom: at H = 100 there are {s['steps'] // 100} outer steps in all,
at H = 30 {s['steps'] // 30}, and sparse_loco sends 1.6 % of the entries in each.

**Bytes** are what all clients sent and were sent, counted on the wire (names and framing too), without the starting
weights, which follow from the seed, and with the last model's way down. DDP is one process with the rows of all
clients in each step; its bytes are those of a gradient in fp32 to and from every client in every step.

![Perplexity against bytes](pretrain.svg)

"""
    return f"{head}{table(rows)}\n\n{asked(rows)}\n{longer(found)}\nMeasured on {found['cpu']}, one thread.\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row an arm and H."""
    return "\n".join(["| arm | H | seeds | perplexity | over DDP's | bytes | fewer than DDP | CPU s |",
                      "|---|---|---|---|---|---|---|---|", *(
        f"| {r['arm']} | {r['H']} | {r['seeds']} | {r['perplexity']:.1f} | {r['over'] - 1:+.1%} | "
        f"{r['bytes'] / 1e6:,.1f} MB | {r['fewer']:,.0f} x | {r['cpu']:.0f} |" for r in rows)])


def longer(found: Mapping[str, Any]) -> str:
    """The run of more steps, where there is one."""
    cells = found.get("longer", [])
    if not cells:
        return ""
    rows, times = compared(cells), cells[0]["tokens"] // found["cells"][0]["tokens"]
    return f"""
## {times} times as long

`python -m evidence.pretrain longer`: {times} times the steps and tokens, at the rates of the table above (a rate of its
own for this length was not looked for); the rows are read {times} times as often.

{table(rows)}

{asked(rows)}
"""


def tuned(found: Mapping[str, Mapping[str, float]], grid: int) -> str:
    """Where each arm's inner rate is from, and whose is not its own."""
    own = "; ".join(f"{name} {', '.join(f'{r}: {p:.1f}' for r, p in seen.items())}" for name, seen in found.items())
    lacking = [name for name in COLORS if len(found.get(name, {})) < grid]
    names = ", ".join(lacking)
    rest = f"\n\n**Not tuned yet, at DDP's rate: {names}.** Nothing is said of their best." if lacking else ""
    return f"Inner rates are from one grid, on a seed apart (perplexity by rate: {own}).{rest}\n"


def asked(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the issue asks for, and what came of it."""
    lines = ["| asked for | at H | fewer bytes | perplexity | holds |", "|---|---|---|---|---|"]
    for arm, times in WANTED.items():
        for r in rows:
            if r["arm"] == arm:
                holds = "yes" if r["over"] <= 1.02 and r["fewer"] >= times else "no: " + " and ".join(
                    what for what, bad in ((f"{r['over'] - 1:+.1%} perplexity", r["over"] > 1.02),
                                           (f"{r['fewer']:,.0f} x", r["fewer"] < times)) if bad)
                lines.append(f"| {arm}: within 2 % of DDP at {times:,.0f} x fewer bytes | {r['H']} | "
                             f"{r['fewer']:,.0f} x | {r['over'] - 1:+.1%} | {holds} |")
    return "\n".join(lines)


def picture(cells: Cells) -> str:
    """Lines from test to test, bytes on a logarithmic axis, the mean over the seeds there are."""
    lines = {key: [tuple(mean(c["points"][i][j] for c in mine) for j in (1, 2)) for i in range(len(mine[0]["points"]))]
             for key, mine in grouped(cells).items()}
    xs, ys = ([p[i] for line in lines.values() for p in line] for i in (0, 1))
    low, high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    least, most = 0.95 * min(ys), 1.02 * max(ys)

    def at(x: float, y: float) -> str:
        across = (math.log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        up = (math.log(y) - math.log(least)) / (math.log(most) - math.log(least)) * (HEIGHT - TOP - FOOT)
        return f"{LEFT + across:.1f},{HEIGHT - FOOT - up:.1f}"

    out = []
    for e in range(low, high + 1):
        x = at(10**e, least).split(",")[0]
        out.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - FOOT}" stroke="{GRID}"/>'
                   f'<text x="{x}" y="{HEIGHT - FOOT + 16}" text-anchor="middle" fill="{INK}">1e{e}</text>')
    for y in (25, 50, 75, 100, 150, 200, 300, 400, 600, 800):
        if least < y < most:
            h = at(10**low, y).split(",")[1]
            out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{h}" y2="{h}" stroke="{GRID}"/>'
                       f'<text x="{LEFT - 8}" y="{float(h) + 4}" text-anchor="end" fill="{INK}">{y}</text>')
    for i, ((arm, span), line) in enumerate(sorted(lines.items())):
        dash = ' stroke-dasharray="5 4"' if span == 30 else ""
        out.append(f'<polyline points="{" ".join(at(*p) for p in line)}" fill="none" stroke="{COLORS[arm]}" '
                   f'stroke-width="2"{dash}/>')
        y = TOP + 10 + 18 * i
        out.append(f'<line x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 36}" y1="{y}" y2="{y}" '
                   f'stroke="{COLORS[arm]}" stroke-width="2"{dash}/>'
                   f'<text x="{WIDTH - RIGHT + 42}" y="{y + 4}" fill="{INK}">{arm} '
                   f'{"" if arm == "ddp" else f"H {span}"}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="{PAPER}"/>{"".join(out)}'
            f'<text x="{LEFT}" y="16" fill="{INK}">perplexity on held-out text</text>'
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="{INK}">bytes of all clients, both '
            'ways</text></svg>\n')
