"""Run a recipe from its first test to its report, or go on where a killed run stood."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedllm.core.client import SERVER
from fedllm.core.errors import DataError, FedLLMError, RunError
from fedllm.core.payload import digest
from fedllm.core.record import Event, Record, is_test
from fedllm.privacy.accountant import BudgetSpent, join, unaccounted
from fedllm.runs import judge as judging
from fedllm.runs.began import from_elsewhere, same_as_began, stands_on, write_began
from fedllm.runs.beside import Beside, beside, run_baselines
from fedllm.runs.best import Best
from fedllm.runs.build import FAR, Parts, build, cohort_size, resolved
from fedllm.runs.course import Course
from fedllm.runs.folder import EventLog, RunFolder
from fedllm.runs.judge import Judge
from fedllm.runs.meter import Meter
from fedllm.runs.more import check_layers, grown, write_rounds
from fedllm.runs.products import write_clients, write_served
from fedllm.runs.progress import Quiet
from fedllm.runs.received import received
from fedllm.runs.recipe import OWN, Recipe, load_recipe
from fedllm.runs.result import Result, finished
from fedllm.runs.rows import look
from fedllm.runs.seal import figures_digest, sealed
from fedllm.runs.spread import spread
from fedllm.runs.store import Frozen, freeze
from fedllm.runs.tape import Tape
from fedllm.runs.terminal import progress_bars
from fedllm.runs.training import cautions
from fedllm.runs.views import views
from fedllm.trackers.stream import Tracking

log = logging.getLogger(__name__)

Publish = Callable[[RunFolder, Result], None]
"""Writes what people see of a finished run into its folder."""


def begin(recipe: str | Path | Mapping[str, Any] | Recipe, root: str | Path, overrides: Mapping[str, Any],
          publish: Publish, shown: Quiet | None = None) -> Result:
    """A new run, from its first test to its end; `shown` in the place of bars or lines."""
    parts = build(load_recipe(recipe, overrides))
    look(parts)  # rows that cannot be read are refused before there is a folder
    folder = RunFolder.fresh(Path(root), parts.recipe.name, resolved(parts))
    say_name(folder, Path(root), parts.recipe.name)
    with folder.held(), spread(parts), contextlib.nullcontext(shown) if shown else progress_bars() as progress:
        return Run(parts, folder, progress, publish).go()


def say_name(folder: RunFolder, root: Path, name: str) -> None:
    """A run whose name was taken has another folder."""
    if folder.path.name != name:
        log.warning("%s is there already; this run goes to %s", root / name, folder.path)


def go_on(path: str | Path, publish: Publish, *, plugins: Sequence[str | Path] = (), trust_remote_code: bool = False,
          overrides: Mapping[str, Any] | None = None, shown: Quiet | None = None) -> Result:
    """A run that was stopped at any moment, to its end; `plugins` are the places of the plugin files that it has, and
    other code that it names runs only if it is trusted. `overrides` may hold more `rounds`, and nothing else."""
    folder = RunFolder.open(Path(path))
    if (folder.path / "result.json").exists() and not overrides:
        return finished(folder.path)
    recipe = received(folder.path, plugins=plugins, trust_remote_code=trust_remote_code)
    more = grown(recipe, overrides or {})
    if recipe.data.source == OWN:
        raise RunError(f"{path} is a run of a real federation: "
                       f"`fedllm serve {path} --federation FOLDER` goes on with it")
    with folder.held():
        if more.rounds == recipe.rounds and (folder.path / "result.json").exists():
            return finished(folder.path)
        try:
            parts = build(recipe)
        except DataError as error:
            raise from_elsewhere(folder, error) from None
        if more.rounds > recipe.rounds:
            longer = build(more)
            check_layers(parts, longer, folder)
            write_rounds(folder, more.rounds)
            parts = longer
        return _go_on(parts, folder, publish, recipe.rounds if more.rounds > recipe.rounds else None, shown)


def _go_on(parts: Parts, folder: RunFolder, publish: Publish, ended: int | None, shown: Quiet | None) -> Result:
    with spread(parts), contextlib.nullcontext(shown) if shown else progress_bars() as progress:
        return Run(parts, folder, progress, publish).go(ended)


class Run:
    """One run and its folder."""

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

    def go(self, was_last: int | None = None) -> Result:
        """From wherever the run stands to its end; DidNothing when no round on the way counted.

        `was_last`: the round that was the run's last before it was given more, whose test was that of the end.
        """
        total = self.parts.recipe.rounds
        self.progress.rounds(total, self.at)
        self.beside = beside(self.parts, self.folder)
        ended = ""
        try:
            if not self.kept:
                self._begin()
            if self.at == was_last:
                self._tested_between(was_last)
            for round in range(self.at, total):
                if why := self.best.over(self.parts.recipe.evaluate.patience):
                    self.record.emit("early_stop", round=round, why=why)
                    log.warning("the run ends before round %d: %s", round + 1, why)
                    total, ended = round, why
                    break
                try:
                    self._round(round, total)
                except BudgetSpent as spent:  # the next round would break a promise; this is the result
                    if round not in self.folder.rounds():
                        self._checkpoint(round)
                    self.record.emit("budget_spent", round=round, why=str(spent))
                    log.warning("the run ends before round %d: %s", round, spent)
                    total, ended = round, str(spent)
                    break
            result = self._finish(total, ended)
        except FedLLMError as error:
            self.record.emit("stopped", why=str(error))
            raise
        except KeyboardInterrupt:
            self.record.emit("stopped", why="by hand")
            at = self.folder.rounds()
            kept = f"{at[-1]} of {total} rounds are kept" if at else "nothing is kept yet"
            raise KeyboardInterrupt(f"stopped by hand: {kept} in {self.folder.path}; `fedllm resume "
                                    f"{self.folder.path}` goes on where the run stood") from None
        finally:
            if self.beside:
                self.beside.stop()
            if self.tape:
                self.tape.close()
            if self.tracking:
                self.tracking.close()
            self.events.close()
        return finished(self.folder.path) if result.failed else result

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

    def _begin(self) -> None:
        """What is known before the first round."""
        for client, why in self.parts.left_out.items():
            self.record.emit("left_out", client=client, why=why)
            log.warning("client '%s' is left out: %s", client, why)
        for why in self._cautions():
            self.record.emit("caution", why=why)
            log.warning(why)
        for why in self.parts.world.model.said:  # it was logged when the model was loaded
            self.record.emit("caution", why=why)
        clients = [{"id": c.id, "n": c.n, "rank": c.profile.rank,
                    "info": dict(self.parts.world.federation.clients[c.id].info)} for c in self.course.clients]
        self._write(lambda: self.folder.write_json("clients.json", clients))
        self._write(lambda: write_began(self.folder, self.stands_on))
        for why in (self._privacy() or {}).get("void", ()):
            log.warning("this run can make no privacy claim: %s", why)
        self.progress.note("testing before the first round")
        if not self.judge.answering:
            self.before = self.judge.test(self.course.state, {}, 0)
            self.answers_before = self.judge.answers(self.course.state)
        self.record.emit("evaluation", round=0, **self.before)
        self.best = self.best.after(self.before, 0)
        self.progress.tested(0, self.before.get("global"))
        self._checkpoint(0)

    def _cautions(self) -> list[str]:
        """What may not be meant."""
        parts = self.parts
        said = list(parts.method.cautions(cohort_size(parts.recipe.clients.per_round, len(self.course.clients))))
        said += [*parts.world.federation.cautions, *look(parts), *cautions(parts.world.local)]
        for name, spec in parts.recipe.models.items():
            if spec.endpoint is not None:
                said.append(f"models.{name} is an endpoint at {spec.endpoint.get('base_url', 'its default address')}: "
                            "whatever text clients put to it leaves them")
        if parts.recipe.engine.kind in FAR and parts.method.by_arrival:
            said.append(f"method '{parts.recipe.method.name}' goes by who answers first, so that another run of this "
                        "recipe may end in another state")
        return said

    def _round(self, round: int, total: int) -> None:
        recipe = self.parts.recipe
        self.progress.round(round, *self._expected())
        if self.tape:
            self.tape.begin(round)
        facts = self.course.step(round)
        touched = facts.pop("touched")
        self.dirty.update(touched)
        if "skipped" in facts:
            self.skipped.append(round)
            self.why_skipped = str(facts["skipped"])
            log.warning("round %d is skipped: %s", round, facts["skipped"])
        if self.tape:
            self.tape.close()
            if self.tape.trouble:
                self.record.emit("replies_lost", round=round, why=self.tape.trouble)
        self.record.emit("round", **facts)
        done = round + 1
        if not (done < total and self._tested_between(done)) and (
                done % recipe.record.checkpoint_every == 0 or done == total):
            self._checkpoint(done)
        self.progress.round_done(facts)

    def _expected(self) -> tuple[int, float]:
        """How many clients a round asks, and about how many training steps they make together."""
        clients, local = self.course.clients, self.parts.world.local
        asked = cohort_size(self.parts.recipe.clients.per_round, len(clients))
        return asked, sum(local.count(c.n) for c in clients) * asked / max(1, len(clients))

    def _last_test(self, total: int) -> tuple[Mapping[str, Any], Sequence[str]]:
        """The figures and sample answers of the result; without a round in between they are those from before."""
        if total == 0 and self.before:
            return self.before, self.answers_before
        self.progress.note("testing the result")
        final = self._test(total)
        self.record.emit("evaluation", round=total, **final)
        self.progress.tested(total, final["global"])
        return final, self.judge.answers(self.course.state)

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

    def _test(self, round: int) -> dict[str, Any]:
        return self.judge.test(self.course.state, self.course.engine.memory, round)

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
            why = error.strerror or str(error)
            self.record.emit("checkpoint_failed", round=round, why=why)
            log.warning("the checkpoint before round %d could not be written (%s); the last one stands", round, why)
            return False

    def _write(self, write: Callable[[], Any]) -> Any:
        """Write what the run made; when the disk refuses, say how to finish it."""
        try:
            return write()
        except (OSError, SafetensorError) as error:
            at = self.folder.rounds()
            stand = f"its last checkpoint is before round {at[-1]}" if at else "it has no checkpoint yet"
            lost = isinstance(error, FileNotFoundError) and not (self.folder.path / "recipe.yaml").is_file()
            mend = "It was deleted or moved while the run worked; bring it back" if lost else "Make room"
            why = getattr(error, "strerror", None) or error
            raise RunError(f"{self.folder.path} cannot be written: {why}; {stand}. "
                           f"{mend}, then `fedllm resume {self.folder.path}`") from None

    def _finish(self, total: int, ended: str) -> Result:
        parts, course = self.parts, self.course
        course.engine.finish(total)
        final, said = self._last_test(total)
        if kept := self._back_to_best(total, final):
            final, said = kept, self.judge.answers(course.state)
        shown = judging.samples(parts, self.answers_before, said)
        spent: dict[str, Any] = {"seconds": self.meter.seconds(), "peak_memory_bytes": self.meter.peak(),
                                 "joules": self.meter.joules(), "joules_from": self.meter.joules_from()}
        evaluation: dict[str, Any] = {"before": self.before, **final}
        if found := views(parts, course.state, course.engine.memory, final["clients"], total):
            evaluation["views"] = found
        if parts.recipe.evaluate.baselines:
            evaluation["baselines"] = self._baselines()
        self._write(lambda: write_served(self.folder, parts.world.model, parts.method, course.state,
                                         parts.world.models))
        mine = {c: m for c, m in course.engine.memory.items() if c != SERVER}
        self._write(lambda: write_clients(self.folder, parts.world.model_of, mine))
        result = Result(
            folder=self.folder.path, method=parts.recipe.method.name, engine=parts.recipe.engine.kind, rounds=total,
            seed=parts.recipe.seed, evaluation=evaluation, bytes=self.record.totals(), privacy=self._privacy(),
            virtual=course.virtual(), reports=course.report(), metrics=dict(parts.method.metrics),
            state_digest=digest(course.state), skipped=self.skipped, ended=ended, failed=self._failed(total, final),
            best=self._best(kept is not None), **spent)
        self._write(lambda: self.folder.write_json("samples.json", shown))
        figures = figures_digest(result.as_json())
        if result.failed:
            self.record.emit("did_nothing", why=result.failed)
            log.error("the run did nothing: %s", result.failed)
        self.record.emit("finished", state_digest=result.state_digest, seconds=result.seconds, figures=figures,
                         sealed=sealed(self.folder.path))
        result = replace(result, audit={"events": self.events.count, "head": self.events.head})
        if not self.events.flush():
            raise RunError(f"{self.events.path} cannot be written: {self.events.trouble}. Make room, then "
                           f"`fedllm resume {self.folder.path}`")
        self._write(self._forget_secrets)
        self._write(lambda: self._publish(result))
        self._write(self.folder.close_to_others)
        return result

    def _best(self, kept: bool) -> dict[str, Any] | None:
        e = self.parts.recipe.evaluate
        return {**self.best.as_json(), "kept": kept} if e.keep_best or e.patience else None

    def _failed(self, total: int, final: Mapping[str, Any]) -> str:
        """Why this run has done nothing; empty when it has done something."""
        said = (final.get("global") or {}).get("answered")
        if self.judge.answering and said == 0:
            return f"none of the {final['global']['n']} questions of the test got an answer"
        if total and len(self.skipped) == total:
            why = self.why_skipped or next((e["skipped"] for e in reversed(self.folder.events()) if "skipped" in e), "")
            return f"all of its {total} rounds were skipped, the last because {why}"
        return ""

    def _forget_secrets(self) -> None:
        """What noise was drawn from is of no use any longer to anybody who may: it leaves the checkpoints."""
        layers = self.course.layers
        if not any(layer.secrets for layer in layers):
            return

        def forget(value: dict[str, Any]) -> None:
            for layer, state in zip(layers, value["layers"], strict=False):
                for key in layer.secrets:
                    state.pop(key, None)

        self.folder.rewrite(forget)

    def _privacy(self) -> dict[str, Any] | None:
        """What layers and method say of the privacy that the run has spent; None where none of them says anything."""
        pairs = zip(self.course.layers, self.course.states, strict=True)
        said = [said for layer, state in pairs if (said := layer.statement(state))]
        said += [own] if (own := self.parts.method.statement(self.course.state)) else []
        return join(said, unaccounted(said, self.parts.recipe.evaluate.clients))

    def _publish(self, result: Result) -> None:
        """What people see first: a folder with a `result.json` is complete."""
        self.publish(self.folder, result)
        self.folder.write_json("result.json", result.as_json())

    def _baselines(self) -> dict[str, Any]:
        """Each baseline's evaluation; those that no process beside this one has done are done here."""
        if self.beside:
            self.progress.note("waiting for the baselines that run beside this")
            self.beside.wait()
        return self._write(lambda: run_baselines(self.parts, self.folder, self.progress))
