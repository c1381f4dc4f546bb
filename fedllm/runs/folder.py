"""A run's folder: recipe, events, checkpoints, and what the run made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from fedllm.core.errors import RunError
from fedllm.core.record import Event
from fedllm.runs.store import (
    Blobs,
    blobs_in,
    freeze,
    only_mine,
    private_folder,
    read_json,
    reading,
    sync_files,
    sync_folder,
    thaw,
    write_atomic,
)

KEEP = 2
"""Checkpoints kept: the newest, and one before it."""

QUESTIONS = "questions.jsonl"
"""In the folder of a run that answers questions: what each took, whom its answer rests on, and the gate's verdicts on
what left for it; never its words."""

RUN_ID = "run_id"
"""In a run's folder where the run is of a real federation: its name at the sites."""

STAGES = "stages"
"""Where the runs of a recipe of stages lie, each in a folder of its name."""


class Taken(RunError):
    """Another process has made this folder."""


def of_one_run(path: Path) -> None:
    """RunError for the folder of a recipe of stages, each of which is a run."""
    if stages := sorted(p.parent.name for p in path.glob(f"{STAGES}/*/recipe.yaml")):
        raise RunError(f"{path} is a run of stages, each a run of its own: name one of them, as in "
                       f"{path / STAGES / stages[0]} (there are {', '.join(stages)})")


class RunFolder:
    """The folder of one run; every file in it is either whole or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.blobs = Blobs(self.checkpoints / "blobs")

    @property
    def at_sites(self) -> bool:
        """Whether this is a run of a real federation, whose clients are elsewhere."""
        return (self.path / RUN_ID).exists()

    @classmethod
    def create(cls, path: Path, recipe: Mapping[str, Any]) -> RunFolder:
        """A fresh folder with its resolved recipe."""
        folder = cls(path)
        try:
            private_folder(path)
            folder.checkpoints.mkdir()
            write_atomic(path / "recipe.yaml", yaml.safe_dump(dict(recipe), sort_keys=False).encode())
        except FileExistsError:
            if not path.is_dir():  # a link that leads nowhere stands on the way: no other name would help
                raise RunError(f"the run folder {path} cannot be made: a link or a file stands on the way") from None
            raise Taken(f"the run folder {path} is there already") from None
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be made: {error.strerror}") from None
        return folder

    @classmethod
    def fresh(cls, root: Path, name: str, recipe: Mapping[str, Any]) -> RunFolder:
        """A fresh folder under the next free name; of many that start at once each gets one of its own."""
        while True:
            try:
                return cls.create(fresh_path(root, name), recipe)
            except Taken:
                continue

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that a run left; a RunError when it is none."""
        if not (path / "recipe.yaml").is_file():
            hint = ""
            for room in (path, *path.absolute().parents[:3]):  # a folder of runs, a run's part, a misspelled name
                if room != path and (room / "recipe.yaml").is_file() and room / "recipe.yaml" != path.absolute():
                    hint = f"; did you mean {os.path.relpath(room)}?"
                elif near := sorted(p.parent.name for p in room.glob("*/recipe.yaml")) if room.is_dir() else []:
                    hint = f"; {os.path.relpath(room)} has {', '.join(near[:8])}"
                if hint:
                    break
            raise RunError(f"{path} is no run folder (it has no recipe.yaml){hint}")
        of_one_run(path)
        return cls(path)

    @contextlib.contextmanager
    def held(self, wait: float = 2.0, name: str = ".lock") -> Iterator[None]:
        """One process at a time works on this run: RunError when another one still does after `wait` seconds.

        The system takes the lock back when its process ends, however it ends, so that none is ever stale.
        """
        with contextlib.ExitStack() as open_:
            try:
                file = open_.enter_context(open(self.path / name, "a+", opener=only_mine))
                ends = time.monotonic() + wait
                while not _locked(file):
                    if time.monotonic() > ends:
                        file.seek(0)
                        raise RunError(f"{self.path} is being worked on by process {file.read().strip() or '?'}; wait "
                                       "for it, or end it")
                    time.sleep(0.05)
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())  # what a buffer keeps would fail again at its end
            except OSError as error:
                raise RunError(f"{self.path / name} cannot be written: {error.strerror}; make room, or let the run's "
                               "folder be written into") from None
            yield

    def is_held(self, name: str = ".lock") -> bool:
        """Whether a living process holds this lock."""
        try:
            with (self.path / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def rewrite(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change every checkpoint there is; what no checkpoint names any longer goes. May raise OSError."""
        for number in self.rounds():
            value = self.load(number)[1]  # type: ignore[index]
            change(value)
            doc = json.dumps(freeze(value, self.blobs), separators=(",", ":"))
            write_atomic(self.checkpoints / f"{number:06d}.json", doc.encode())
        self._prune()

    def close_to_others(self) -> None:
        """Only the owner may open what lies in this folder, whoever wrote it."""
        for path in [self.path, *self.path.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)

    def save(self, round: int, value: Mapping[str, Any], *, pin: bool = False) -> None:
        """A checkpoint before `round`; a crash at any moment leaves it or the one before it. May raise OSError.

        Its tensors are stored first, so that a checkpoint that exists is complete. A pinned one is never pruned.
        """
        doc = freeze(value, self.blobs)
        if pin:
            write_atomic(self.checkpoints / f"{round:06d}.pin", b"")
        write_atomic(self.checkpoints / f"{round:06d}.json", json.dumps(doc, separators=(",", ":")).encode())
        self._prune()

    def unpin(self, but: Collection[int]) -> None:
        """Let go of all pinned checkpoints but these; they are pruned with the next save."""
        for path in self.checkpoints.glob("[0-9]*.pin"):
            if int(path.stem) not in but:
                path.unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """The rounds before which there is a checkpoint, oldest first."""
        return sorted(int(p.stem) for p in self.checkpoints.glob("[0-9]*.json"))

    def load(self, round: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is whole (or the one before `round`), None when there is none."""
        for number in reversed(self.rounds()) if round is None else [round]:
            path = self.checkpoints / f"{number:06d}.json"
            try:
                with reading(path):
                    return number, dict(thaw(read_json(path), self.blobs))
            except RunError:
                if round is not None:
                    raise
        return None

    def _prune(self) -> None:
        pinned = {int(p.stem) for p in self.checkpoints.glob("[0-9]*.pin")}
        rounds = self.rounds()
        for number in rounds[:-KEEP]:
            if number not in pinned:
                with contextlib.suppress(OSError):
                    (self.checkpoints / f"{number:06d}.json").unlink()
        needed: set[str] = set()
        for number in self.rounds():
            needed.update(blobs_in(read_json(self.checkpoints / f"{number:06d}.json")))
        self.blobs.keep(needed)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary folder that takes the place of folder `name` when the block ends well."""
        temp, goal = self.path / f".{name.replace('/', '_')}.tmp", self.path / name
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        try:
            yield temp
            sync_files(temp)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(goal, ignore_errors=True)
        temp.replace(goal)
        sync_folder(goal.parent)

    def write_json(self, name: str, value: Any) -> None:
        """One JSON file, atomically."""
        write_atomic(self.path / name, (json.dumps(value, indent=2, default=str) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """One text file, atomically."""
        write_atomic(self.path / name, text.encode())

    def read(self, name: str) -> Any:
        """One of the folder's JSON files."""
        return read_json(self.path / name)

    def events(self, want: Callable[[Event], bool] = lambda event: True) -> list[Event]:
        """The events so far, or those that `want` picks; a last line that was cut off is not counted."""
        out = []
        with (self.path / "events.jsonl").open("rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line or line.endswith(b"\n"):
                    try:
                        event = json.loads(line)
                    except ValueError:
                        raise RunError(f"{file.name} is damaged on line {number}; `fedllm audit verify {self.path}` "
                                       "lists what does not fit") from None
                    event.pop("chain", None)
                    if want(event):
                        out.append(event)
        return out


def _locked(file: IO[str]) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def fresh_path(root: Path, name: str) -> Path:
    """`root/name`, or `root/name-2`, `-3`, ... where a run is already there: no run is ever overwritten."""
    path, n = root / name, 2
    while path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        path, n = root / f"{name}-{n}", n + 1
    return path
