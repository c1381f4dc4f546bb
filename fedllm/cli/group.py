"""`fedllm group`: a corpus of any size, grouped on disk into clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.outcome import out
from fedllm.cli.said import Json, put


def group(source: Annotated[list[str], typer.Argument(help="Files: .jsonl, .txt, .csv, .tsv, .parquet.")],
          to: Annotated[Path, typer.Option("--out", help="Folder to write.")],
          key: Annotated[str, typer.Option(help="column:NAME, host:NAME, random:GROUPS, "
                                                "dirichlet:COLUMN:GROUPS:ALPHA or call:module:function.")],
          shards: Annotated[int, typer.Option(help="Files to write.")] = 8,
          workers: Annotated[int, typer.Option(help="Processes that read.")] = 1,
          seed: Annotated[int, typer.Option(help="Of random and dirichlet.")] = 0,
          memory_mb: Annotated[int, typer.Option(help="What each worker holds before it writes.")] = 16,
          as_json: Json = False) -> None:
    """Group a corpus of any size on disk, each group a client: [bold]data.source: grouped:FOLDER[/bold] in a recipe."""
    from fedllm.data.grouper import group as go

    made = go(source, to, key, shards=shards, workers=workers, seed=seed, memory_mb=memory_mb)
    if as_json:
        return put({"groups": made.groups, "rows": made.rows, "bytes": made.bytes, "folder": str(to)})
    out.print(f"{made.groups:,} groups, {made.rows:,} rows, {made.bytes:,} bytes in {to}", highlight=False,
              markup=False)
