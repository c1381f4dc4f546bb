"""What stands around a command: an error is one red panel (with --json one object), Ctrl-C says what is kept."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel

from fedllm.cli.consoles import flushed, in_a_folder, leads_nowhere, takes_nothing, told_to_end
from fedllm.cli.said import printable, put_error
from fedllm.core.errors import (
    BudgetSpent,
    ClientError,
    EndpointError,
    FedLLMError,
    PayloadError,
    QuorumError,
    RunError,
    RunFailed,
)

err = Console(stderr=True)

FAILED = (BudgetSpent, ClientError, EndpointError, PayloadError, QuorumError, RunFailed)
"""What ends a command with code 1: it was begun, and failed. Every other error of ours is of its input, and is 2."""

PLACES = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC,
          errno.EDQUOT)
"""What may be wrong with a place that was given, and is no fault of fedllm."""

PROGRESS = "fedllm.progress"
"""The logger of progress lines; without a terminal they take the place of bars."""


@contextlib.contextmanager
def stopped(otherwise: str) -> Iterator[None]:
    """Say on Ctrl-C (or SIGTERM, SIGHUP) what was kept and how to go on (typer would end first, without a word)."""
    with told_to_end() as told:
        try:
            yield
        except KeyboardInterrupt as error:
            said = str(error) or f"stopped by hand: {otherwise}"  # without words it is an exception nevertheless
            err.print(f"\n{said}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(128 + (told[0] if told else signal.SIGINT)) from None


def guarded(work: Callable[[], Any], debug: bool, as_json: bool = False) -> None:
    """Do it; bad input ends with code 2, a run that failed and a fault of ours with 1, all in a sentence."""
    try:
        try:
            work()
        finally:
            flushed()
    except FedLLMError as error:
        if debug:
            raise
        refuse(error, as_json)
    except KeyboardInterrupt:
        err.print("\ninterrupted; `fedllm resume runs/NAME` goes on where the run stood")
        raise SystemExit(130) from None
    except BrokenPipeError:
        leads_nowhere()
        raise SystemExit(0) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is None and takes_nothing():
            leads_nowhere()
            err.print(f"standard output cannot be written: {error.strerror}", markup=False, highlight=False)
            raise SystemExit(1) from None
        if isinstance(error, FileNotFoundError) and not in_a_folder():
            return refuse(RunError("the folder that this was started in is gone; change into another one"), as_json)
        if isinstance(error, OSError) and error.filename is not None and error.errno in PLACES:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return refuse((RunFailed if full else RunError)(f"{error.filename}: {error.strerror}"), as_json)
        err.print(Panel(escape(f"{type(error).__name__}: {error}\n\nThis is a fault of fedllm, not of yours. The same "
                               "command with --debug shows where; please report it."), title="unexpected error",
                        title_align="left", border_style="red"))
        raise SystemExit(1) from None


def refuse(error: FedLLMError, as_json: bool = False) -> None:
    """Say why and end with the error's code; `as_json`: as one object on standard error."""
    if as_json:
        put_error(error, printable(str(error)))
    else:
        name = type(error).__name__
        title = f"{name.removesuffix('Error').lower()} error" if name.endswith("Error") else "run error"
        err.print(Panel(escape(printable(str(error))), title=title, title_align="left", border_style="red"))
    raise SystemExit(1 if isinstance(error, FAILED) else 2)


def quiet(debug: bool) -> None:
    """Warnings of ours to the terminal; those of the libraries below only with --debug."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s",
                        handlers=[RichHandler(console=err, show_time=False, show_path=False)])
    logging.getLogger(PROGRESS).setLevel(logging.INFO)
    if debug:
        return
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "datasets", "huggingface_hub", "peft", "bitsandbytes", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
