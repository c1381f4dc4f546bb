"""Centered clipping: no bucket of updates moves the last aggregate by more than a radius (Karimireddy et al. 2021)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.defenses._robust import Robust, Rows, Verdict
from fedllm.defenses.median import median


@dataclass(frozen=True)
class CenteredClip(Robust):
    """Karimireddy, He, Jaggi, Learning from History, ICML 2021, and Byzantine-Robust Learning on Heterogeneous
    Datasets via Bucketing, ICLR 2022, arXiv 2006.09365.

    The center is the last round's result (zero at first). Clients send what they send: the papers' client momentum is
    the method's affair, not this layer's.
    """

    tau: float | None = knob(None, "radius; None: the median length of this round's updates, seen from the center",
                             gt=0)
    iterations: int = knob(1, "times that the center moves in a round", ge=1)
    bucket: int = knob(2, "updates that are averaged before they are clipped; 1: none", ge=1)
    seed: int = knob(0, "seed of who shares a bucket with whom", ge=0)

    def short(self, n: int) -> tuple[str, str] | None:
        """By itself, the middle one of three buckets is the first that one client cannot move as it likes."""
        knob = f"bucket = {self.bucket}"
        return self.below(n, 2 * self.bucket + 1, knob, "a smaller bucket, or tau") if self.tau is None else None

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        state["round"] = state.get("round", 0) + 1
        y = buckets(rows.x, self.bucket, numpy_stream(self.seed, "buckets", state["round"]))
        v = state.get("center")
        v = torch.zeros_like(rows.x[0]) if v is None or v.shape != rows.x[0].shape else v
        for _ in range(self.iterations):
            v = clipped_step(y, v, self.tau or float(median((y - v).norm(dim=1).double())))
        state["center"] = v
        return Verdict(v)


def buckets(x: Tensor, size: int, rng: Any) -> Tensor:
    """[K, d] -> [ceil(K / size), d]: means over shuffled rows."""
    order = rng.permutation(len(x))
    return torch.stack([x[order[i : i + size]].mean(0) for i in range(0, len(x), size)])


def clipped_step(y: Tensor, v: Tensor, tau: float) -> Tensor:
    """v + mean_i (y_i - v) min(1, tau / ||y_i - v||)."""
    away = y - v
    shrink = (tau / away.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)
    return v + (away * shrink[:, None]).mean(0)
