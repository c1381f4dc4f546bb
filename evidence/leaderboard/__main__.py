"""Measure the leaderboard: `python -m evidence.leaderboard --world sst2 --method fedavg,fedit --budget 600`.

Every cell is a run's folder under `leaderboard/cells`; what is finished there is not run again, and a call that was
stopped is gone on with by the same command. Rows land in docs/results/leaderboard.json as they are done.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from evidence.leaderboard.board import SEEDS, Board, known
from evidence.leaderboard.worlds import WORLDS, World
from fedllm.core.errors import RecipeError
from fedllm.methods.registry import METHODS

DOCS = Path(__file__).parents[2] / "docs"
ROOM = Path("leaderboard")


def main(args: Sequence[str] | None = None, worlds: Mapping[str, World] = WORLDS, console: Console | None = None
         ) -> None:
    """Measure some rows, or all; or write the pages anew; or repeat one cell."""
    parser = argparse.ArgumentParser(prog="python -m evidence.leaderboard", description=__doc__)
    parser.add_argument("--world", help=f"some of {', '.join(worlds)}, with commas; default: all, in this order")
    parser.add_argument("--method", help="ids of methods, with commas (rows that failed are tried again); default: all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many are measured, from {SEEDS[0]} on")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="no run is begun after it")
    parser.add_argument("--room", type=Path, default=ROOM, help="folder of the cells")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the docs")
    given = parser.parse_args(args)
    console = console or Console()
    if given.budget is not None and not given.budget > 0:
        raise RecipeError(f"--budget {given.budget:g} is not allowed; it must be > 0 seconds")
    if given.seeds < 1:
        raise RecipeError(f"--seeds {given.seeds} is not allowed; it must be >= 1")
    names, methods = _listed(given.world, "--world", worlds), _listed(given.method, "--method", METHODS)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    board = Board(given.out / "results" / "leaderboard.json", given.room, {n: worlds[n] for n in names or worlds},
                  seeds=range(SEEDS[0], SEEDS[0] + given.seeds), budget=given.budget, tell=tell)
    board.go(methods)


def _listed(text: str | None, option: str, there: Mapping[str, object]) -> list[str] | None:
    """What is named between commas; None of nothing. RecipeError for all names that are none."""
    if text is None:
        return None
    names = [n.strip() for n in text.split(",")]
    if wrong := list(known(names, list(there), option)):
        raise RecipeError("\n".join(wrong))
    return names


if __name__ == "__main__":
    main()
