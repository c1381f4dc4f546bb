"""Where a run stands: its state, its tests on the way, and the checkpoints that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedllm.core.errors import RunError
from fedllm.core.record import Event, Record, is_test
from fedllm.models.cache import NOT_TAKEN, why
from fedllm.privacy.accountant import join, unaccounted
from fedllm.runs.began import same_as_began, stands_on
from fedllm.runs.beside import Beside
from fedllm.runs.best import Best
from fedllm.runs.build import Parts
from fedllm.runs.course import Course
from fedllm.runs.event_log import EventLog
from fedllm.runs.folder import RunFolder
from fedllm.runs.judge import Judge
from fedllm.runs.meter import Meter
from fedllm.runs.progress import Quiet
from fedllm.runs.result import Result
from fedllm.runs.store import Frozen, freeze
from fedllm.runs.tape import Tape
from fedllm.trackers.stream import Tracking

log = logging.getLogger(__name__)

Publish = Callable[[RunFolder, Result], None]
"""Writes what people see of a finished run into its folder."""


class Standing:
    """One run and its folder, at one moment: what the next round needs, and how that is kept."""

    def __init__(self, parts: Parts, folder: RunFolder, progress: Quiet, publish: Publish) -> None:
        self.parts, self.folder, self.progress, self.publish = parts, folder, progress, publish
        self.stands_on, found = stands_on(parts), folder.load()
        if found:
            same_as_began(folder, self.stands_on)
        self.at, self.kept = found or (0, {})
        self.events = EventLog(folder.path / "events.jsonl", self.kept.get("events", 0))
        self.tracking: Tracking | None = None
        self.record = Record(self._saw)
        self.tape = Tape(folder.path / "replies") if parts.recipe.record.replies else None
        if parts.recipe.engine.kind in ("in_process", "vectorized") and parts.engine is None:  # else work is elsewhere
            parts.world.limits = replace(parts.world.limits, did=progress.worked)
        self.course = Course(parts, parts.method, parts.layers, self.record, [self.tape] if self.tape else [])
        self.judge = Judge(parts, parts.method, self.record)
        self.frozen: dict[str, Frozen] = {}
        self.dirty: set[str] = set()
        self.skipped: list[int] = list(self.kept.get("skipped", []))
        self.why_skipped = ""
        self.before: dict[str, Any] = self.kept.get("before", {})
        self.answers_before: list[str] = self.kept.get("answers_before", [])
        self.best = Best(**self.kept["best"]) if self.kept.get("best") else Best()
        self.beside: Beside | None = None
        self.meter = Meter(*self.kept.get("spent", ()))
        if found:
            self._restore()
        self.tracking = Tracking(folder.path, parts.recipe.track, parts.recipe.model_dump(), self.record.totals())

    def _saw(self, event: Event) -> None:
        self.events.append(event)
        self.progress.saw(event)
        if self.tracking:
            self.tracking(event)

    def _restore(self) -> None:
        course, kept = self.course, self.kept
        course.state, course.states, course.failed_in_a_row = kept["state"], kept["layers"], kept["failed_in_a_row"]
        course.engine.memory = kept["memory"]
        self.dirty = set(kept["memory"])
        for way, phase, size in kept["bytes"]:
            as_one = "tests" not in kept and is_test(phase)  # a run begun before tests were booked apart
            (self.record.tests if as_one else self.record.bytes)[way, phase] = size
        for way, phase, size in kept.get("tests", ()):
            self.record.tests[way, phase] = size
        self.record.emit("resumed", round=self.at)

    def _test(self, round: int) -> dict[str, Any]:
        return self.judge.test(self.course.state, self.course.engine.memory, round)

    def _tested_between(self, done: int) -> bool:
        """Test after a round that is not the last, if it is time; whether a checkpoint was made of it."""
        e = self.parts.recipe.evaluate
        if not e.every or done % e.every:
            return False
        self.progress.note(f"testing after round {done}")
        tested = self._test(done)
        self.record.emit("evaluation", round=done, **tested)
        self.progress.tested(done, tested["global"])
        before, self.best = self.best, self.best.after(tested, done)
        if not (e.keep_best or e.patience):
            return False
        if not self._checkpoint(done) and self.best.round == done:
            self.best = before  # what is not kept cannot be gone back to
        return True

    def _back_to_best(self, total: int, final: Mapping[str, Any]) -> dict[str, Any] | None:
        """With keep_best: the state of the best round in the place of the last, and what it did; else nothing."""
        e = self.parts.recipe.evaluate
        self.best = self.best.after(final, total)
        if not e.keep_best or self.best.round == total or self.best.loss is None:
            return None
        found = self.folder.load(self.best.round) if self.best.round in self.folder.rounds() else None
        if found is None:
            log.warning("round %d was the best, and its checkpoint is gone: the run ends with its last round",
                        self.best.round)
            return None
        self.course.state, self.course.engine.memory = found[1]["state"], found[1]["memory"]
        self.record.emit("kept_best", **self.best.as_json())
        log.warning("the run keeps round %d, whose loss on %s was the best (%.4g)", self.best.round, self.best.of,
                    self.best.loss)
        return self._test(total)

    def _privacy(self) -> dict[str, Any] | None:
        """What layers and method say of the privacy that the run has spent; None where none of them says anything."""
        pairs = zip(self.course.layers, self.course.states, strict=True)
        said = [said for layer, state in pairs if (said := layer.statement(state))]
        said += [own] if (own := self.parts.method.statement(self.course.state)) else []
        return join(said, unaccounted(said, self.parts.recipe.evaluate.clients))

    def _checkpoint(self, round: int) -> bool:
        """Keep all that the next round needs. A full disk costs this checkpoint, never the run or the one before."""
        course, recipe = self.course, self.parts.recipe
        try:
            for client in sorted(self.dirty):
                self.frozen[client] = Frozen(freeze(course.engine.memory[client], self.folder.blobs, client))
            value = {
                "state": dict(course.state), "layers": course.states, "memory": self.frozen,
                "failed_in_a_row": course.failed_in_a_row, "skipped": self.skipped, "before": self.before,
                "answers_before": self.answers_before, "events": self.events.sync(), "chain": self.events.head,
                "bytes": [(*key, size) for key, size in self.record.bytes.items()],
                "tests": [(*key, size) for key, size in self.record.tests.items()],
                "spent": (self.meter.seconds(), self.meter.peak(), self.meter.joules()), "best": self.best.as_json()}
            first, best = round == 0 and self.tape is not None, recipe.evaluate.keep_best and self.best.round == round
            self.folder.save(round, value, pin=first or best or recipe.record.keep_rounds)
            if best and not recipe.record.keep_rounds:
                self.folder.unpin(but={round, *([0] if self.tape else [])})
            self.dirty.clear()
            return True
        except OSError as error:
            self.record.emit("checkpoint_failed", round=round, why=why(error))
            log.warning("the checkpoint before round %d could not be written (%s); the last one stands", round,
                        why(error))
            return False

    def _write(self, write: Callable[[], Any]) -> Any:
        """Write what the run made; when the disk refuses, say how to finish it."""
        try:
            return write()
        except NOT_TAKEN as error:
            at = self.folder.rounds()
            stand = f"its last checkpoint is before round {at[-1]}" if at else "it has no checkpoint yet"
            lost = isinstance(error, FileNotFoundError) and not (self.folder.path / "recipe.yaml").is_file()
            mend = "It was deleted or moved while the run worked; bring it back" if lost else "Make room"
            raise RunError(f"{self.folder.path} cannot be written: {why(error)}; {stand}. "
                           f"{mend}, then `fedllm resume {self.folder.path}`") from None
