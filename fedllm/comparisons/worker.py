"""A process that runs cells one after the other, each in a process of its own that it forks: what is loaded is loaded
once, and memory is each cell's own.

It reads one JSON object a line (`do`, `recipe`, `folder`, `log`) and answers with one line each. It ends with the
process that began it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedllm.comparisons.match import not_as_asked
from fedllm.core.errors import FedLLMError, RunError
from fedllm.report.report import publish
from fedllm.runs.build import build
from fedllm.runs.progress import Lines
from fedllm.runs.recipe import load_recipe, read_recipe
from fedllm.runs.rows import look
from fedllm.runs.started import begin, go_on
from fedllm.runs.watch import end_with


def check(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make all parts of a run, and run nothing: what does not fit is refused here; how many numbers it trains."""
    parts = build(load_recipe(recipe))
    look(parts)
    return {"trained": sum(t.numel() for t in parts.world.model.initial().values())}


def cell(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A run to its end, from wherever its folder stands; CPU seconds of what was done now."""
    plugins = [p["file"] for p in recipe.get("plugins", ())]
    if (folder / "recipe.yaml").is_file():
        if why := not_as_asked(read_recipe(recipe), folder):
            raise RunError(why)
        go_on(folder, publish, plugins=plugins, trust_remote_code=True)  # its recipe is the one that was given here
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it was stopped before it had a recipe
        begin(recipe, folder.parent, {}, publish, Lines())
    return {"cpu_seconds": round(time.process_time(), 3)}  # of this process, which was forked for it


DO: Mapping[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {"check": check, "cell": cell}


def done(job: Mapping[str, Any]) -> dict[str, Any]:
    """What came of one job: its answer, or why there is none."""
    try:
        return DO[job["do"]](job["recipe"], Path(job["folder"]))
    except FedLLMError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except Exception as error:
        logging.exception("a fault of fedllm")
        return {"error": f"{type(error).__name__}: {error} (a fault of fedllm; {job['log']} has more)", "kind": "fault"}


def forked(job: Mapping[str, Any], parent: int) -> dict[str, Any]:
    """The job, done in a child; its words go to the job's log. A child that ends without an answer is an error."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        end_with(os.getppid())
        with open(job["log"], "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
        os.write(write, json.dumps(done(job)).encode())
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    said = b""
    while True:
        if select.select([read], [], [], 0.5)[0]:
            if not (piece := os.read(read, 1 << 16)):
                break
            said += piece
        elif os.getppid() != parent:  # nobody waits any longer
            os.kill(child, signal.SIGKILL)
            break
    os.close(read)
    _, status = os.waitpid(child, 0)
    ended = f"by signal {-code}" if (code := os.waitstatus_to_exitcode(status)) < 0 else f"with code {code}"
    return json.loads(said) if said else {"error": f"its process ended {ended}; {job['log']} has more", "kind": "died"}


def main(parent: int) -> None:
    """Answer line by line until there are no more."""
    importlib.import_module("plotly.offline")  # every run's report needs it: once here, not once in each child
    for line in sys.stdin:
        told = json.dumps(forked(json.loads(line), parent)) + "\n"
        try:
            sys.stdout.write(told)
            sys.stdout.flush()
        except BrokenPipeError:  # who asked was ended; its terminal need not hear of it
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
