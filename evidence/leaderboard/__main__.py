"""Measure the leaderboard: `python -m evidence.leaderboard --world sst2 --method fedavg,fedit --budget 600`.

Every cell is a run's folder under `leaderboard/cells`; what is finished there is not run again, and a call that was
stopped is gone on with by the same command. Rows land in docs/results/leaderboard.json as they are done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from evidence.bench.rows import machine
from evidence.leaderboard.board import SEEDS, Board, known
from evidence.leaderboard.brief import PACKED, pack
from evidence.leaderboard.code import code_of
from evidence.leaderboard.page import write_pages
from evidence.leaderboard.worlds import WORLDS, World
from fedllm.comparisons.pool import pool
from fedllm.core.errors import FedLLMError, RecipeError, RunError
from fedllm.core.knobs import hint_of
from fedllm.methods.registry import METHODS
from fedllm.runs.result import Result

DOCS = Path(__file__).parents[2] / "docs"
ROOM = Path("leaderboard")


def main(args: Sequence[str] | None = None, worlds: Mapping[str, World] = WORLDS, console: Console | None = None
         ) -> None:
    """Measure some rows, or all; or write the pages anew; or repeat one cell."""
    given = _parsed(args, worlds)
    console = console or Console()
    names, methods = _listed(given.world, "--world", worlds), _listed(given.method, "--method", METHODS)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    board = Board(given.out / "results" / "leaderboard.json", given.room, {n: worlds[n] for n in names or worlds},
                  seeds=range(SEEDS[0], SEEDS[0] + given.seeds), budget=given.budget, tell=tell)
    if given.repeat:
        return repeat(board, given.repeat)

    def write() -> None:
        rows = list(board.rows.values())
        write_pages(rows, given.out, worlds, machine()["cpu"])
        if given.out == DOCS:
            pack(rows, PACKED, worlds)

    if not given.table:
        board.go(methods, write)
    write()


def _parsed(args: Sequence[str] | None, worlds: Mapping[str, World]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evidence.leaderboard", description=__doc__)
    parser.add_argument("--world", help=f"some of {', '.join(worlds)}, with commas; default: all, in this order")
    parser.add_argument("--method", help="ids of methods, with commas (rows that failed are tried again); default: all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many are measured, from {SEEDS[0]} on")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="no run is begun after it")
    parser.add_argument("--room", type=Path, default=ROOM, help="folder of the cells")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the pages anew")
    parser.add_argument("--repeat", metavar="WORLD/METHOD/SEED", help="make one cell again, and compare it to its row")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the docs")
    given = parser.parse_args(args)
    if given.budget is not None and not given.budget > 0:
        raise RecipeError(f"--budget {given.budget:g} is not allowed; it must be > 0 seconds")
    if given.seeds < 1:
        raise RecipeError(f"--seeds {given.seeds} is not allowed; it must be >= 1")
    return given


def repeat(board: Board, which: str) -> None:
    """Run one cell afresh under the rates of its row, beside all others, and say whether its end state is the same."""
    world, method, seed = [*which.split("/"), "", ""][:3]
    row = board.rows.get((world, method))
    if row is None or seed not in row.get("digests", ()):
        there = sorted(f"{w}/{m}/{s}" for (w, m), r in board.rows.items() for s in r.get("digests", ()))
        raise RecipeError(f"--repeat {which!r} is no measured cell{hint_of(which, there)} Allowed: "
                          f"{', '.join(there) or 'nothing; nothing has been measured'}")
    fresh = Board(board.file, board.room / "repeated" / time.strftime("%Y%m%d-%H%M%S"), board.worlds)
    fresh.room.mkdir(parents=True)
    with pool(1, fresh.room) as workers:
        folder, got = fresh.run(workers, world, row["form"], row["rates"], int(seed))
    if "error" in got:
        raise RunError(f"{folder}: {got['error']}")
    now, then = Result.load(folder).state_digest, row["digests"][seed]
    same = "the very state of the row" if now == then else f"another state than the row's ({then})" + (
        "; its code has changed since" if row["code"] != code_of(method) else "")
    board.tell(f"{folder}\nstate {now}: {same}")


def _listed(text: str | None, option: str, there: Mapping[str, object]) -> list[str] | None:
    """What is named between commas; None of nothing. RecipeError for all names that are none."""
    if text is None:
        return None
    names = [n.strip() for n in text.split(",")]
    if wrong := list(known(names, list(there), option)):
        raise RecipeError("\n".join(wrong))
    return names


if __name__ == "__main__":
    try:
        main()
    except FedLLMError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped by hand: what is finished is kept, and the same command goes on")
        raise SystemExit(130) from None
