"""Random directions beside a `torch.randn` per seed, and a zeroth-order step beside a backpropagation step."""

from __future__ import annotations

from statistics import median

import torch

from evidence.bench.rows import Row, row
from evidence.bench.server import ratio, turns
from evidence.bench.simulation import Ours, Size
from evidence.rigs.trials import Trial
from fedllm.local.perturb import LAWS, Directions, flat
from fedllm.spaces import make_space

STEP = Size("M B8 T64", 256, 4, clients=1, steps=2, batch=8)
GATES = {"gaussian": 2.0, "rademacher": 15.0}


def zeroth_order() -> list[Row]:
    """Rebuilding a vector of 2^20 entries from seeds; a client's step on a Llama of 256 x 4, full space and LoRA."""
    return [*(rebuild(law) for law in LAWS), *(step(space) for space in ("full", "lora"))]


def rebuild(law: str, size: int = 1 << 20, k: int = 64, repeats: int = 5) -> Row:
    """w - sum_j a_j z_j for K directions."""
    w, weights, source = torch.zeros(size), {j: 1e-3 * (j + 1) for j in range(k)}, torch.Generator()
    z = Directions(0, size, law)  # type: ignore[arg-type]

    def randn() -> None:
        for j, a in weights.items():
            w.sub_(torch.randn(size, generator=source.manual_seed(j)), alpha=a)

    times = turns({"ours": lambda: z.add(w, weights), "randn": randn}, repeats)
    ns = {n: round(1e9 * median(t) / size / k, 3) for n, t in times.items()}
    return row(f"zeroth_order/rebuild from {k} seeds, {law}", ratio(times, "randn", "ours"), "times",
               "torch.randn per seed", GATES[law], ns_per_entry_and_seed=ns)


def step(space: str, repeats: int = 5) -> Row:
    """A round of `steps` steps of FedMeZO beside one of FedAvg with SGD, on the same rows and batches."""
    ours = Ours(STEP, optimizer="sgd")
    if space == "full":
        ours.model.space = make_space("full")
        ours.model.stackable = ours.model.space.install(ours.model.net, ours.model.stack)
    trials = {name: Trial(name, ours.world, knobs) for name, knobs in (
        ("fedavg", {}), ("fedmezo", {"steps": STEP.steps, "lr": 1e-6, "delta": 0.0}))}
    times = turns({name: lambda t=t: t.rounds(1) for name, t in trials.items()}, repeats, floor=0.5)
    share = median(a / b for a, b in zip(times["fedmezo"], times["fedavg"], strict=True))
    return row(f"zeroth_order/step {STEP.label} {space}", share, "of the time", "a backpropagation step with SGD", 0.85,
               least=True, ms_per_step={n: round(1e3 * median(t) / STEP.steps, 1) for n, t in times.items()},
               trained=len(flat(ours.model.initial())))
