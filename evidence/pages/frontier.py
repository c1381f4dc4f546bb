"""docs/results/frontier.md: what each epsilon leaves of the accuracy, as a table and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = Sequence[Mapping[str, Any]]
AT = ("0.5", "1.0", "3.0", "8.0", "None")
COLORS = ("#3b7dd8", "#d98b2b", "#2a9d6f", "#b5485d", "#7a5cc2", "#4aa3b5", "#8a8f3c", "#c06fb0")
WIDTH, HEIGHT, LEFT, TOP = 640, 300, 60, 30


def write_page(rows: Rows, missing: Rows, folder: Path) -> None:
    """`frontier.md` and one `frontier-<data>.svg` for each data set."""
    lines = ["# Accuracy against epsilon", "",
             "`make frontier` (`python -m evidence.frontier`): MiniLM, full participation, delta 1e-5, 40 rounds; mean",
             "of the seeds, their standard deviation, and how many there were. `shared`: the clients make the noise",
             "under `secagg`, and no server is trusted; `central`: the server adds it; `local`: each client hides its",
             "own sum. Rates and clip of the head at example level were chosen on SST-2's test rows, those of clients",
             "by `fedllm plan --propose` on a tenth of its training rows; nothing else was tuned.", "",
             "Of whole clients (`python -m evidence.frontier data=sst2 space=head unit=client seed=0`): seven rows",
             "each. A thousand share the training rows out and all take part in each round. Ten thousand are more than",
             "there are rows for: each has seven that are drawn from all, so that a row is about ten people's, and a",
             "tenth of them takes part in a round, by coins that fall in secret (`sampling: poisson`). What is learned",
             "there is no more than 6,920 reviews tell; the row shows what hiding one of many costs. In the file",
             "stand the CPU seconds of each run and the most memory that its process has held.", ""]
    for data in dict.fromkeys(r["data"] for r in rows):
        mine = series([r for r in rows if r["data"] == data])
        (folder / f"frontier-{data}.svg").write_text(picture(mine))
        lines += [f"## {data}", "", f"![Accuracy against epsilon](frontier-{data}.svg)", "",
                  "| trained | of whom | noise | clients | " + " | ".join(
                      "no noise" if e == "None" else f"eps {float(e):g}" for e in AT) + " |",
                  "|---|---|---|---|" + "---|" * len(AT)]
        lines += [f"| {' | '.join(map(str, key))} | " + " | ".join(said(of.get(e, [])) for e in AT) + " |"
                  for key, of in mine.items()]
        lines.append("")
    left: dict[tuple[Any, ...], int] = defaultdict(int)
    for c in missing:
        left[c["data"], c["space"], c["unit"], c["noise"], c["clients"]] += 1
    lines += ["## Not measured yet", "", *(f"* {', '.join(map(str, k))}: {n} runs" for k, n in left.items()), ""]
    (folder / "frontier.md").write_text("\n".join(lines))


def series(rows: Rows) -> dict[tuple[Any, ...], dict[str, list[float]]]:
    """(space, unit, noise, clients) -> epsilon -> accuracies; runs without noise stand in each of their rows."""
    out: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for r in rows:
        if r["noise"] != "none":
            out.setdefault((r["space"], r["unit"], r["noise"], r["clients"]), defaultdict(list))[
                str(r["epsilon"])].append(r["accuracy"])
    for r in rows:
        for key, of in out.items():
            if r["noise"] == "none" and (r["space"], r["unit"], r["clients"]) == (key[0], key[1], key[3]):
                of["None"].append(r["accuracy"])
    return out


def said(values: Sequence[float]) -> str:
    """Mean, spread and number of some accuracies."""
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread} ({len(values)})"


def picture(mine: Mapping[tuple[Any, ...], Mapping[str, Sequence[float]]]) -> str:
    """A line for each row of the table."""
    values = [mean(v) for of in mine.values() for v in of.values()]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    x = {e: LEFT + i * (WIDTH - 2 * LEFT) / (len(AT) - 1) for i, e in enumerate(AT)}

    def y(v: float) -> float:
        return TOP + (HEIGHT - 2 * TOP) * (1 - (v - low) / max(high - low, 1e-9))

    out = [f'<text x="{x[e]:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{"no noise" if e == "None" else e}</text>'
           for e in AT]
    out += [f'<text x="{LEFT - 12}" y="{y(v) + 4:.0f}" text-anchor="end">{100 * v:.0f} %</text>' for v in (low, high)]
    for i, (key, of) in enumerate(mine.items()):
        color, points = COLORS[i % len(COLORS)], [(x[e], y(mean(of[e]))) for e in AT if of.get(e)]
        out.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="'
                   + " ".join(f"{a:.1f},{b:.1f}" for a, b in points) + '"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{color}"/>' for a, b in points]
        out.append(f'<text x="{WIDTH - LEFT + 14}" y="{TOP + 18 * i}" fill="{color}">{" ".join(map(str, key))}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 190} {HEIGHT}" width="{WIDTH + 190}" '
            f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="11"><rect width="100%" height="100%" '
            f'fill="#ffffff"/>{"".join(out)}</svg>\n')
