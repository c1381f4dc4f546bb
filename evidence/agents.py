"""The same agents alone, pooled and federated, in the same environments: `python -m evidence.agents` writes the page.

Each arm has the same episodes, and its rate from the same grid by seeds that are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from evidence.rigs.flipped import flipped
from evidence.rigs.insights import insights
from evidence.rigs.parts import parts
from evidence.rigs.skills import skills
from evidence.rigs.tool_worlds import tool_worlds
from evidence.rigs.toolbook import toolbook
from evidence.rigs.two_cues import two_cues

DOCS = Path(__file__).parents[1] / "docs" / "results"
SEEDS = tuple(range(4100, 4105))
TUNED = (2100, 2101)
ARMS: Mapping[str, Mapping[str, Any]] = {"alone": {"alone": True}, "pooled": {"pooled": True}, "federated": {}}
WORLDS: Mapping[str, Mapping[str, Any]] = {"sums": {"max_steps": 6}, "desk": {"max_steps": 8},
                                           "errands": {"max_steps": 16}}
POLICIES = {"lr": (5.0, 20.0, 80.0)}


class Agent(NamedTuple):
    """A method as it is compared: rounds, and the option that each arm gets from a grid."""

    method: str
    rounds: int
    grid: Mapping[str, Sequence[float]]
    arms: Sequence[str] = tuple(ARMS)
    worlds: Sequence[str] = tuple(WORLDS)


AGENTS = (Agent("fed_marl", 20, POLICIES), Agent("a_rladmm", 20, POLICIES, ("federated",)),
          Agent("olivia", 6, {"alpha": (0.05, 0.3)}, worlds=("sums", "desk")))


COUNTED = (("toolbook", toolbook, "fical"), ("insights", insights, "fot"), ("skills", skills, "federated_skill"),
           ("two_cues", two_cues, "skill_cmib"), ("flipped", flipped, "fedagent_rlkd"),
           ("parts", parts, "consensus_graph"))
"""Tasks of which is counted how often what is said is right."""


def run(agent: Agent, world: str, arm: str, seed: int, option: Mapping[str, float]) -> dict[str, float]:
    """One run of the rig: a rate is the recipe's, anything else a knob."""
    lr = {"lr": option["lr"]} if "lr" in option else {}
    knobs = {k: v for k, v in option.items() if k != "lr"}
    got = tool_worlds(agent.method, seed, env=world, rounds=agent.rounds, knobs=knobs, told=WORLDS[world], **lr,
                      **ARMS[arm])
    return {"return": got["return"], "elsewhere": got["elsewhere"]}


def tuned(agent: Agent, world: str, arm: str) -> dict[str, float]:
    """The option with which this arm's return at home is best on the seeds apart."""
    [(name, values)] = agent.grid.items()
    worth = {v: float(np.mean([run(agent, world, arm, s, {name: v})["return"] for s in TUNED])) for v in values}
    return {name: max(worth, key=lambda v: worth[v])}


def measured(have: Sequence[Mapping[str, Any]] = (), seeds: Sequence[int] = SEEDS) -> Iterator[dict[str, Any]]:
    """A row for each agent, world and arm that `have` lacks."""
    done = {(r["task"], r["agent"], r["arm"]) for r in have if r["seeds"] == list(seeds)}
    for world in WORLDS:
        for agent in (a for a in AGENTS if world in a.worlds):
            for arm in (a for a in agent.arms if (world, agent.method, a) not in done):
                option = tuned(agent, world, arm)
                each = [run(agent, world, arm, s, option) for s in seeds]
                yield {"task": world, "agent": agent.method, "arm": arm, "option": option, "seeds": list(seeds),
                       **{m: [e[m] for e in each] for m in ("return", "elsewhere")}}
    for task, rig, method in COUNTED:
        for arm, told in ((a, t) for a, t in ARMS.items() if (task, method, a) not in done):
            yield {"task": task, "agent": method, "arm": arm, "option": {}, "seeds": list(seeds),
                   "right": [rig(method, s, **told)["right"] for s in seeds]}


def cell(values: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of these rows."""
    at = {(r["task"], r["agent"], r["arm"]): r for r in rows}
    lines = [HEAD]
    for metric, title in (("return", "At home: each client's own environment"),
                          ("elsewhere", "In everybody's environments")):
        lines += [f"## {title}", "", COLUMNS, "|---|---|---|---|---|---|"]
        lines += [_line(at, r["task"], r["agent"], metric) for r in rows if metric in r and r["arm"] == "federated"]
        lines += [""]
    if said := [_line(at, r["task"], r["agent"], "right") for r in rows if "right" in r and r["arm"] == "federated"]:
        title = "## How often right: agents that share text, nets and vectors"
        lines += [title, "", COLUMNS, "|---|---|---|---|---|---|", *said]
    return "\n".join(lines).rstrip() + "\n"


def _line(at: Mapping[Any, Mapping[str, Any]], task: str, agent: str, metric: str) -> str:
    arms = [at.get((task, agent, arm)) for arm in ARMS]
    said = [cell(r[metric]) if r else "-" for r in arms]
    wins = "-"
    if arms[0] and arms[2]:
        above = sum(f > a for f, a in zip(arms[2][metric], arms[0][metric], strict=True))
        wins = f"{above} of {len(arms[0][metric])}"
    return f"| {task} | `{agent}` | {' | '.join(said)} | {wins} |"


COLUMNS = "| task | agent | alone | pooled | federated | federated above alone |"
HEAD = """# Agents alone, pooled and federated

Written by `python -m evidence.agents`. Four clients in environments in words (docs/rooms/environments.md), each with
its own part of the world: two of the four ways of putting a question (`sums`, `desk`), or the rooms of its own errands
in a house that is one for all (`errands`). *Alone* nobody shares, *pooled* one learner acts in all four environments.
All arms have the same episodes, and their rate (alpha for `olivia`) from the same grid on two seeds that are not
counted. Mean and deviation over five seeds; 1 minus the costs of lines is the best return. `fed_marl` and `a_rladmm`
(over a fading channel without noise) train a linear policy for 20 rounds of 8 episodes, `olivia` a bandit on the
embedded model's states for 6; it is not in `errands`, since it goes by what single steps are paid and a walk is paid
where it ends (alone it returned -0.21 there). The others have tasks of their own, and it is counted how often they are
right: the right tool is called, the right number or call said, the right action of four done (`two_cues`: a rule on a
card, a cue in a picture), the right class named where three of ten clients have turned labels (`flipped`), or of a
thing of which six owners hold a part each (`parts`; *alone* an owner by its own part, *pooled* one model of all parts).
"""


def main() -> None:
    """Measure, and write docs/results/agents.json and agents.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the page anew")
    parser.add_argument("--fresh", action="store_true", help="measure also what agents.json has; else go on with it")
    given = parser.parse_args()
    file = given.out / "agents.json"
    rows = json.loads(file.read_text()) if file.is_file() and not given.fresh else []
    for row in () if given.table else measured(rows):
        rows.append(row)
        Console().print(row["task"], row["agent"], row["arm"], cell(row.get("return") or row["right"]))
        file.write_text(json.dumps(rows, indent=1) + "\n")
    (given.out / "agents.md").write_text(page(rows))


if __name__ == "__main__":
    main()
