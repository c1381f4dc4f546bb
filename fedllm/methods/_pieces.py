"""A model as a graph of operations that machines hold piece by piece: which machine holds which.

Costs and the exact search after FusionAI (Tang et al., 2023, arXiv 2309.01172); `_schedule.py` has DT-FM's, of machines
that hold the same piece. All that crosses goes through the broker, over each machine's own line.
"""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import RecipeError
from fedllm.core.payload import tensor_bytes
from fedllm.models.emulator import blocks_of
from fedllm.models.segments import segments

EXACT = 8
"""Of so many machines at most every assignment is looked at; of more the quickest take part."""


@dataclass(frozen=True)
class Op:
    """A node of the model's graph."""

    name: str
    inputs: tuple[str, ...]
    steps: float
    """Its share of the forward and backward of a micro-batch, of which the whole model takes one step."""
    held: float
    """Bytes of its weights, their gradients and two moments."""
    sends: float
    """Bytes of what it gives for a micro-batch; as many come back as its gradient."""
    keeps: float = 0.0
    """Bytes that the broker is told after a step: its new weights, and the optimizer's state of them."""


@dataclass(frozen=True)
class Machine:
    """What one machine declares; no memory and no bandwidth mean that they set no bound."""

    id: str
    speed: float = 1.0
    """Steps of the whole model a second."""
    memory: float | None = None
    delay: float = 0.0
    bandwidth: float | None = None

    def seconds(self, size: float) -> float:
        """Of so many bytes on its line."""
        return self.delay + (size / self.bandwidth if self.bandwidth else 0.0)


@dataclass(frozen=True)
class Plan:
    """Machine p holds the operations from cuts[p - 1] to before cuts[p]; `seconds` are each one's a micro-batch."""

    machines: tuple[str, ...]
    cuts: tuple[int, ...]
    seconds: tuple[float, ...]

    def total(self, micro: int) -> float:
        """Seconds of a step of so many micro-batches: all pass once, and the slowest machine sets the pace."""
        return sum(self.seconds) + (micro - 1) * max(self.seconds)


def ordered(ops: Sequence[Op]) -> list[Op]:
    """Each operation after those whose outputs it reads; RecipeError for a circle, or an input that nobody gives."""
    by = {op.name: op for op in ops}
    if odd := [(op.name, i) for op in ops for i in op.inputs if i not in by]:
        raise RecipeError(f"operation '{odd[0][0]}' reads '{odd[0][1]}', which no operation gives")
    try:
        return [by[n] for n in graphlib.TopologicalSorter({op.name: op.inputs for op in ops}).static_order()]
    except graphlib.CycleError as error:
        raise RecipeError(f"operations wait for one another in a circle: {' -> '.join(error.args[1])}") from None


def crossing(ops: Sequence[Op], at: int) -> float:
    """Bytes that cross a cut before operation `at` forward: outputs from before it that are read after it."""
    read = {i for op in ops[at:] for i in op.inputs}
    return sum(op.sends for op in ops[:at] if op.name in read)


def cost(ops: Sequence[Op], machine: Machine, start: int, stop: int, micro: int) -> float:
    """C_p + R_p: its work on a micro-batch, what crosses its ends, forward and as a gradient back, and of a step's
    handing in the micro-batch's share."""
    ends, mine = [crossing(ops, b) for b in (start, stop) if 0 < b < len(ops)], ops[start:stop]
    return (sum(op.steps for op in mine) / machine.speed + sum(2 * machine.seconds(size) for size in ends)
            + machine.seconds(sum(op.keeps for op in mine)) / micro)


def room(ops: Sequence[Op], start: int, stop: int, micro: int) -> float:
    """Bytes that a piece takes: what is held of its weights, and the inputs of all micro-batches."""
    return sum(op.held for op in ops[start:stop]) + micro * (crossing(ops, start) if start else 0.0)


def partition(ops: Sequence[Op], machines: Sequence[Machine], micro: int, most: int | None = None) -> Plan:
    """Two pieces or more, of which the slowest is as quick as can be; over every order of machines and every cut.

    `most` pieces at the most. RecipeError with what is short where no machines have memory for the pieces.
    """
    some = sorted(machines, key=lambda m: -m.speed)[:EXACT]
    most = min(most or len(some), len(some), len(ops))
    costs = {(k, a, b): cost(ops, m, a, b, micro) for k, m in enumerate(some) for a in range(len(ops))
             for b in range(a + 1, len(ops) + 1)
             if b - a < len(ops) and (m.memory is None or room(ops, a, b, micro) <= m.memory)}
    best: dict[tuple[int, int], tuple[float, float, tuple[tuple[int, int], ...]]] = {(0, 0): (0.0, 0.0, ())}
    for start in range(len(ops)):
        for mask in [m for i, m in best if i == start]:
            worst, total, held = best[start, mask]
            if len(held) == most:
                continue
            for k in (k for k in range(len(some)) if not mask >> k & 1):
                for stop in range(start + 1, len(ops) + 1):
                    if (c := costs.get((k, start, stop))) is None:
                        continue
                    found = max(worst, c), total + c, (*held, (k, start))
                    known = best.get((stop, mask | 1 << k))
                    if known is None or found[:2] < known[:2]:
                        best[stop, mask | 1 << k] = found
    whole = [v for (i, _), v in best.items() if i == len(ops)]
    if not whole:
        declared = sum(m.memory or 0.0 for m in some)
        raise RecipeError(f"{len(some)} machines with {declared:.0f} bytes of memory in all cannot hold the model in "
                          f"{most} pieces: it takes {room(ops, 0, len(ops), micro):.0f} bytes, its largest operation "
                          f"{max(op.held for op in ops):.0f}; let clients declare more memory_bytes, or let more come")
    held = min(whole)[2]
    ends = [*(start for _, start in held[1:]), len(ops)]
    return Plan(tuple(some[k].id for k, _ in held), tuple(ends[:-1]),
                tuple(costs[k, start, stop] for (k, start), stop in zip(held, ends, strict=True)))


def even(ops: Sequence[Op], machines: Sequence[Machine], micro: int, pieces: int) -> Plan:
    """As many operations for each of the first machines: what a schedule is held against."""
    some = {m.id: m for m in machines[:pieces]}
    return costed(ops, some, micro, list(some), [round(i * len(ops) / pieces) for i in range(1, pieces)])


def costed(ops: Sequence[Op], machines: Mapping[str, Machine], micro: int, ids: Sequence[str], cuts: Sequence[int]
           ) -> Plan:
    """A plan of these cuts, at what it costs these machines now."""
    ends = zip(ids, (0, *cuts), (*cuts, len(ops)), strict=True)
    return Plan(tuple(ids), tuple(cuts), tuple(cost(ops, machines[c], a, b, micro) for c, a, b in ends))


def operations(model: Any) -> list[dict[str, Any]]:
    """The embeddings, each block, and the norm with the head, as a state holds them: their trainables' names, what they
    read, their share of a step, bytes held and, of each token, given."""
    theta, depth = model.initial(), len(blocks_of(model.net))
    found = segments(model, list(range(depth + 1)))
    labels = ["embeddings", *(f"block {i}" for i in range(depth)), "head"]
    wide = model.net.get_input_embeddings().weight.shape[1] * next(model.net.parameters()).element_size()
    parts = [s.part(model, theta) for s in found]
    return [{"name": label, "inputs": labels[i - 1 : i] if i else [], "share": s.share, "held": 4 * tensor_bytes(mine),
             "out": wide, "names": sorted(mine)}
            for i, (label, s, mine) in enumerate(zip(labels, found, parts, strict=True))]


def ops_of(known: Sequence[Mapping[str, Any]], tokens: int, kinds: int) -> list[Op]:
    """The graph, for micro-batches of so many tokens and an optimizer that keeps so many numbers a weight."""
    return ordered([Op(o["name"], tuple(o["inputs"]), o["share"], o["held"], o["out"] * tokens,
                       o["held"] / 4 * (1 + kinds)) for o in known])
