"""The main job, start to end: institutions with different records tune the embedded model together."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from fedllm.cli.tables import client_table, show_result
from fedllm.report.facts import duration
from fedllm.report.report import publish
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe
from fedllm.runs.resolved import resolved
from fedllm.runs.run import Run
from fedllm.runs.terminal import progress_bars

RECIPE, LLM = (Path(__file__).with_name(name) for name in ("demo.yaml", "demo_llm.yaml"))


def demo(console: Console, root: Path, recipe: Path = RECIPE) -> None:
    """Run the demo's recipe and show what federation gives: globally, client by client, and in answers."""
    started = time.perf_counter()
    parts = build(load_recipe(recipe))
    shards = parts.world.federation.clients
    rows = [len(s.train) for s in shards.values()]
    kinds = [len(s.info.get("categories", ())) for s in shards.values()]
    console.print(Panel(
        f"{len(shards)} institutions hold {min(rows)} to {max(rows)} records, of {min(kinds)} to {max(kinds)} kinds. "
        "Each knows the routing codes of its own kinds only, and none may show its records to another. They tune a "
        f"language model ({parts.recipe.model.name}) together (LoRA), and the test asks for every kind. Then each "
        "trains alone, and all in one place, for comparison.", title="fedllm demo", border_style="blue"))
    folder = RunFolder.fresh(root, parts.recipe.name, resolved(parts))
    with progress_bars(console) as progress:
        result = Run(parts, folder, progress, publish).go()
    console.print(client_table(console, result))
    show_result(console, result)
    console.print(f"[dim]demo took {duration(time.perf_counter() - started)}; next: fedllm chat {result.folder}, or "
                  "fedllm methods[/dim]", soft_wrap=True)
