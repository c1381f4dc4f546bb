"""`fedllm replay RUN --without CLIENT`: a client taken out of a run, and what is left of it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedllm.audits.left import left
from fedllm.cli.said import put
from fedllm.cli.tables import size
from fedllm.core.errors import RecipeError
from fedllm.runs.without import remove

FORGOTTEN = ("What was handed out before cannot be recalled: copies of the old model, and what trackers, backups and "
             "people noted of it.")


def take_out(console: Console, path: Path, client: str, reducer: str | None, trust_remote_code: bool,
             as_json: bool = False) -> None:
    """Take it out, test what is left, and say both."""
    if reducer is not None:
        raise RecipeError(f"--reducer {reducer} and --without {client} do not go together; give one of them")
    done = remove(path, client, trust_remote_code)
    tests = left(done)
    if as_json:
        return put({**done.as_json(), "folder": str(done.folder), "tests": tests})

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"{done.rounds} rounds without {client}, which first answered in round {done.first}: {done.taken} replies from "
        f"the record, {done.asked} asked anew ({size(done.bytes['up'])} up, {size(done.bytes['down'])} down)")
    if "left_out" in tests:
        say(f"not tested: {tests['left_out']}")
    else:
        names = [n for n in ("loss", "auc", "exposure") if n in tests["with"]]
        table = Table(title=f"{client}'s rows under the model", title_justify="left", title_style="bold")
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        for kind, what in (("with", "that learned from it"), ("without", "without it"), ("start", "at the start")):
            table.add_row(what, *(f"{tests[kind][n]:.3f}" for n in names))
        console.print(table)
    for name, what in done.holds.items():
        say(f"still held  {path / name}: {what}")
    say(FORGOTTEN)
    say(f"state  {done.state_digest}\nmodel  {done.folder}")
