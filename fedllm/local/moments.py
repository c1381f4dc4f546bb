"""An optimizer's state from one round to the next: given to the stacked lanes, and taken from them again.

A tree of moments holds `<what>/<trainable>` (Adam: `exp_avg`, `exp_avg_sq`; SGD: `momentum_buffer`) in the lane's own
shapes, and `step`, how many steps were taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import CompositionError
from fedllm.core.payload import Kept, Tree
from fedllm.local.spec import LocalSpec
from fedllm.spaces.space import stack_lanes, take_lane

ADAM = ("exp_avg", "exp_avg_sq")


def check_moments(moments: Mapping[str, Tensor], theta: Tree, spec: LocalSpec) -> None:
    """CompositionError for the state of another optimizer, or of other trainables than `theta` (what is not frozen)."""
    kinds = ADAM if spec.optimizer != "sgd" else ("momentum_buffer",) if spec.momentum else ()
    wanted = {f"{kind}/{n}": t.shape for kind in kinds for n, t in theta.items()}
    given = {n: t.shape for n, t in moments.items() if n != "step"}
    if "step" not in moments:
        raise CompositionError("moments have no 'step': give the `moments` that an earlier fit told")
    if {n.partition("/")[0] for n in given} != set(kinds):
        raise CompositionError(f"moments hold {_kinds(given)} and local.optimizer = {spec.optimizer!r} keeps "
                               f"{', '.join(kinds) or 'nothing'}: a run's optimizer cannot change midway")
    if odd := sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n)):
        had, needs = (x.get(odd[0]) for x in (given, wanted))
        raise CompositionError(f"moments are of other trainables than theta: '{odd[0]}' has "
                               f"{'no entry' if had is None else f'shape {tuple(had)}'} and the space trains "
                               f"{'nothing of that name' if needs is None else f'shape {tuple(needs)}'}; "
                               "moments=None begins afresh")


def _kinds(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted({n.partition("/")[0] for n in given})) or "nothing"


def go_on(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], lanes: Sequence[Tree]) -> None:
    """Give the optimizer of stacked lanes the state that each lane had; all of them have taken as many steps."""
    step = lanes[0]["step"]
    stacked = stack_lanes([{n: t for n, t in lane.items() if n != "step"} for lane in lanes])
    for name, p in params.items():
        state = {n.partition("/")[0]: t.to(p.device) for n, t in stacked.items() if n.partition("/")[2] == name}
        if "exp_avg" in state:
            state["step"] = step.to(p.device, torch.float32)  # as torch counts: on the device, in fp32
        optimizer.state[p] = state


def moments_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], k: int, like: Tree, steps: int) -> Kept:
    """Lane `k` of the optimizer's state in host memory, padding cut off; empty where no step was ever taken."""
    out = Kept()
    for name, p in params.items() if steps else ():
        for kind, t in optimizer.state.get(p, {}).items():
            if kind != "step" and isinstance(t, Tensor):
                out[f"{kind}/{name}"] = take_lane({name: t}, k, {name: like[name]})[name].cpu()
    if steps:
        out["step"] = torch.tensor(steps)
    return out
