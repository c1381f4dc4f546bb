"""A client larger than one process: a fit is done by several, each with its shard of the model and its share of rows.

The client's own process starts them, hands them the work and waits; it takes no part in their collectives, which nobody
could interrupt, and so can always stop waiting. They load the model themselves. What they are told and say goes
through pipes and shared memory of this machine.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import CompositionError, RunError
from fedllm.core.payload import Kept, Tree
from fedllm.local.blob import Blob
from fedllm.local.fit import fitted, freezes
from fedllm.local.groupable import check_group
from fedllm.local.objectives.task import Task
from fedllm.local.requests import Fit, Fitted, Limits
from fedllm.local.shards import Place, Work, attend
from fedllm.local.terms import Linear, Proximal
from fedllm.models.model import Model
from fedllm.spaces.full import Full

log = logging.getLogger(__name__)
LOOK = 0.2
"""Seconds between two looks at whether the work is still wanted."""
PATIENCE = 600.0
"""Seconds without a step, or without a start, after which the processes are ended."""
HALT = 60.0
"""Seconds without a step after which a fit that is of no use any longer is ended with its processes."""
GONE = 5.0
"""Seconds in which a process whose line has ended must be gone itself."""
SCRIPT = "a script that begins a run with several processes does so under `if __name__ == \"__main__\":`"


@dataclass
class Staff:
    """The processes, as long as they live."""

    processes: list[Any]
    lines: list[Any]
    halted: Any
    folder: str
    ready: set[int] = field(default_factory=set)

    def end(self) -> None:
        """Nobody works on."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for line in self.lines:
            line.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Group:
    """So many processes that train `model` together. They are started at the first fit, and end with this object."""

    def __init__(self, make: Callable[[int], Model], model: Model, size: int, threads: int = 1,
                 patience: float = PATIENCE) -> None:
        """`make` loads the same model once more, for the process of a number; it goes to the processes, so it is a
        function of a module (or a `functools.partial` of one)."""
        check_group(model, size)
        self.make, self.model, self.size, self.threads, self.patience = make, model, size, threads, patience
        self._staff: Staff | None = None
        self._end: Any = None

    @property
    def pids(self) -> list[int]:
        """The processes that are at work."""
        return [p.pid for p in self._staff.processes] if self._staff else []

    def run(self, requests: Sequence[Fit], limits: Limits) -> list[Fitted]:
        """Each fit, one after another. CompositionError for one that cannot be spread, RunError where a process dies
        or falls silent; the next fit then begins with new ones."""
        for request in requests:
            if why := self.refuses(request):
                raise CompositionError(f"engine.processes = {self.size}: {why}")
        return [self._fit(request, limits) for request in requests]

    def refuses(self, r: Fit) -> str:
        """Why this fit cannot be spread over processes, or nothing."""
        if r.model is not self.model:
            return "a method trains another model than the run's main one, and the processes hold that one alone; " \
                   "leave it out"
        if r.private is not None:
            return "single examples' gradients are clipped (dp_sgd), and the processes see sums alone; leave one out"
        if r.noise is not None:
            return "space.dropout and local.neftune are drawn for a whole batch, and each process sees its own rows " \
                   "of it; leave them out"
        if not isinstance(self.model.space, Full):
            return ""
        if r.base:
            return "space 'full' has no base that a drift is added to"
        if not isinstance(r.objective, Task):
            return f"in space 'full' the processes train the task's own loss, and this method gives objective " \
                   f"'{r.objective.name}', which may ask for more than one forward; use space 'lora'"
        if odd := [t for t in r.terms if type(t) not in (Proximal, Linear)]:
            return f"in space 'full' a penalty must be a sum over single weights, as Proximal and Linear are, and " \
                   f"{type(odd[0]).__name__} is not known to be; use space 'lora'"
        return ""

    def close(self) -> None:
        """End the processes."""
        if self._end is not None:
            self._end()
        self._staff = self._end = None

    def _fit(self, r: Fit, limits: Limits) -> Fitted:
        if not r.plan:
            return fitted(r, dict(r.theta), torch.zeros(()), 0.0, Kept(r.moments or {}))
        staff, work = self._staffed(limits), told(r)
        said = dict[int, Any]()
        try:
            staff.halted.clear()
            for line in staff.lines:
                line.send(work)
            tokens = [int(r.lengths[at].sum()) for at in r.plan]
            losses, lr_sum = self._watch(staff, "done", limits, said, self.patience, tokens)
        except BaseException as error:
            lost = self._lost(staff) if isinstance(error, ConnectionError) else ""  # asked before they are ended
            self._halt(staff, isinstance(error, RunError | ConnectionError), said)
            if lost:
                raise RunError(lost) from None
            raise
        theta = {n: t.clone() for n, t in work.blob.under("theta").items()}
        own = Kept()
        if r.moments is not False:
            steps = len(r.plan) + (int(r.moments["step"]) if r.moments else 0)
            own = Kept({n: t.clone() for n, t in work.blob.under("moments").items() if n != "step"},
                       step=torch.tensor(steps))
        return fitted(r, theta, torch.tensor(losses, dtype=torch.float64), lr_sum, own)

    def _staffed(self, limits: Limits) -> Staff:
        """The processes, ready; started where there are none."""
        if self._staff is not None:
            return self._staff
        context, folder = multiprocessing.get_context("spawn"), tempfile.mkdtemp(prefix="fedllm-")
        staff = Staff([], [], context.Event(), folder)
        self._staff, self._end = staff, weakref.finalize(self, staff.end)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            place = Place(rank, self.size, folder, self.threads, self.patience)
            process = context.Process(target=attend, args=(place, self.make, theirs, staff.halted), daemon=True,
                                      name=f"fedllm-{rank}")
            process.start()
            theirs.close()
            staff.processes.append(process)
            staff.lines.append(ours)
        try:
            self._watch(staff, "ready", limits, {}, self.patience)
        except BaseException:
            self.close()
            raise
        log.info("%d processes train together: %s", self.size, self.pids)
        return staff

    def _watch(self, staff: Staff, wanted: str, limits: Limits, said: dict[int, Any], patience: float,
               tokens: Iterable[int] = ()) -> Any:
        """Until every process has `said` what is wanted (some may have, before); what the first of them said."""
        steps, heard = iter(tokens), time.monotonic()
        while len(said) < self.size:
            limits.go_on()
            for line in wait(staff.lines, LOOK):
                rank, heard = staff.lines.index(line), time.monotonic()
                try:
                    kind, value = line.recv()
                except (EOFError, OSError):
                    raise RunError(self._lost(staff)) from None
                if kind == "failed":
                    raise RunError(self._lost(staff) if self._killed(staff) else
                                   f"process {rank + 1} of {self.size} of this client failed: {value}")
                if kind == "step" and rank == 0:
                    limits.did(1, next(steps, 0))
                if kind == "ready":
                    staff.ready.add(rank)
                if kind == wanted:
                    said[rank] = value
            if time.monotonic() - heard > patience:
                raise RunError(f"the {self.size} processes of this client have said nothing for {patience:g} s "
                               "and are ended; the fit is lost")
        return said[0]

    @staticmethod
    def _killed(staff: Staff) -> bool:
        """Whether one of them was killed: what the others say then is that it does not answer."""
        for process in staff.processes:
            process.join(LOOK)
        return any((p.exitcode or 0) < 0 for p in staff.processes)

    def _lost(self, staff: Staff) -> str:
        """Who has died."""
        wait([p.sentinel for p in staff.processes], GONE)  # a pipe ends a moment before its process does
        for process in staff.processes:
            process.join(LOOK)
        gone = [(i, p.exitcode) for i, p in enumerate(staff.processes) if p.exitcode is not None]
        rank, code = min(gone, key=lambda one: (one[1] >= 0, not one[1]), default=(0, None))  # a kill first
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with {code}"
        hint = f" ({SCRIPT})" if code and code > 0 and rank not in staff.ready else ""
        return f"process {rank + 1} of {self.size} of this client {how} while it was needed; the fit is lost, and " \
               f"the next one begins with new processes{hint}"

    def _halt(self, staff: Staff, broken: bool, said: dict[int, Any]) -> None:
        """The fit is of no use any longer: it ends after the present step, or its processes do."""
        if not broken:
            staff.halted.set()
            try:
                return self._watch(staff, "done", Limits(), said, HALT)
            except RunError:
                pass
        self._lost(staff)
        self.close()


def told(r: Fit) -> Work:
    """A fit as the processes are told it."""
    trees: dict[str, Mapping[str, Tensor]] = {"theta": r.theta, "base": r.base or {}}
    if r.moments is not False:
        trees["moments"] = r.moments or _empty(r)
    trees |= {f"term{i}": t.tensors for i, t in enumerate(r.terms)}
    used = np.unique(np.concatenate(list(r.plan)))  # rows that no step reads stay here
    new = np.zeros(len(r.rows), int)
    new[used] = np.arange(len(used))
    return Work(Blob.of(trees), [r.rows[i] for i in used], [new[at] for at in r.plan], r.spec, r.freeze,
                [replace(t, tensors={}) for t in r.terms],  # type: ignore[type-var]
                r.objective, {n: [v[i] for i in used] for n, v in r.side.items()}, bool(r.moments),
                r.moments is not False)


def _empty(r: Fit) -> Tree:
    """Room for the optimizer's state at the end."""
    adam, still = r.spec.optimizer != "sgd", set(freezes(r.theta, r.freeze))
    kinds = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",) if r.spec.momentum else ()
    return {f"{kind}/{n}": torch.zeros_like(t) for kind in kinds for n, t in r.theta.items() if n not in still}
