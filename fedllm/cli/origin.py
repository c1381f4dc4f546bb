"""`fedllm origin`: which of some runs' models wrote each line of a file, or none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.said import Json, put
from fedllm.core.errors import DataError

out = Console()


def origin(texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="A file with a text on each line.",
                                                 show_default=False)],
           runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of the runs that may have "
                                                      "written them.", show_default=False)],
           nobody: Annotated[Path, typer.Option("--nobody", show_default=False, help=(
               "A file of texts like them that none of the models wrote, one on each line."))],
           false_positives: Annotated[float, typer.Option(help="Share of nobody's texts that may be laid at some "
                                                               "model's door.")] = 0.01,
           trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes "
                                                           "with a run's model.")] = False,
           as_json: Json = False) -> None:
    """Lay each text at the door of the run whose model wrote it, by likelihood: [bold]fedllm origin said.txt runs/a
    runs/b --nobody other.txt[/bold]. The first run's model before its training is the reference."""
    import numpy as np

    from fedllm.audits.origin_attribution import Origin, likelihood
    from fedllm.evaluation.trained import Trained

    how, asked, others = Origin(false_positives), _lines(texts), _lines(nobody)
    made = [Trained(path, trust_remote_code) for path in runs]

    def seen(arm: Any, rows: list[str]) -> Any:
        from fedllm.data.encode import encode_rows

        read = encode_rows([{"prompt": "", "response": t} for t in rows], arm.model.tokenizer, "generation", 1024)
        return likelihood(arm.model, arm.theta, arm.base, read, [len(t) for t in rows], arm.limits)

    arms = [run.after for run in made]
    margin = how.margin(np.stack([seen(a, others) for a in arms], 1), seen(made[0].before, others))
    found = how.attribute(np.stack([seen(a, asked) for a in arms], 1), seen(made[0].before, asked), margin)
    names = [None if i is None else str(runs[i]) for i in found]
    if as_json:
        return put({"margin": margin, "origin": names})
    known = sum(n is not None for n in names)
    table = Table("line", "run", "text", title=f"{known} of {len(names)} texts are some run's", title_justify="left")
    for i, (name, text) in enumerate(zip(names, asked, strict=True), 1):
        table.add_row(str(i), name or "none of them", text[:60])
    out.print(table)


def _lines(path: Path) -> list[str]:
    """The texts of a file; DataError where it has none."""
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    if not found:
        raise DataError(f"{path} has no text; allowed is a file with a text on each line")
    return found
