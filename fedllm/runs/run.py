"""A run, from wherever it stands to its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedllm.core.client import SERVER
from fedllm.core.errors import FedLLMError, RunError
from fedllm.core.payload import digest
from fedllm.privacy.accountant import BudgetSpent
from fedllm.runs import judge as judging
from fedllm.runs.began import write_began
from fedllm.runs.beside import beside, run_baselines
from fedllm.runs.build import FAR
from fedllm.runs.fits import cohort_size
from fedllm.runs.products import write_clients, write_served
from fedllm.runs.result import Result, finished
from fedllm.runs.rows import look
from fedllm.runs.seal import figures_digest, sealed
from fedllm.runs.standing import Standing
from fedllm.runs.training import cautions, unmoved
from fedllm.runs.views import views

log = logging.getLogger(__name__)


class Run(Standing):
    """One run and its folder."""

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
        asked, there = parts.recipe.clients.per_round, len(self.course.clients)
        if isinstance(asked, int) and asked > there:
            said.append(f"clients.per_round = {asked}, and there are {there} clients: all of them are asked")
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
        if total > len(self.skipped) and (why := unmoved(parts.method, course.state, parts.world.model)):
            self.record.emit("caution", why=why)
            log.warning(why)
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
