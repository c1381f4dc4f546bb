"""Norm clipping, and with a little noise weak DP: no client's update is longer than a bound (Sun et al. 2019)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.rng import torch_stream
from fedllm.defenses._robust import Robust, Rows, Verdict
from fedllm.defenses.median import median


@dataclass(frozen=True)
class NormClip(Robust):
    """Sun, Kairouz, Suresh, McMahan, Can You Really Backdoor Federated Learning?, arXiv 1911.07963.

    With `noise` 0.025 it is the paper's "weak DP", which is no privacy: nothing is accounted and no epsilon follows.
    """

    bound: float | str = knob("median", "largest L2 norm of an update, or `median`: the round's median norm")
    noise: float = knob(0.0, "standard deviation of the noise on the mean, in units of the bound", ge=0)
    seed: int = knob(0, "seed of the noise", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.bound, int | float) and not isinstance(self.bound, bool)
        if self.bound != "median" and not (number and self.bound > 0):  # type: ignore[operator]
            raise RecipeError(f"NormClip.bound = {self.bound!r} is not allowed; it must be > 0, or 'median'")

    def short(self, n: int) -> tuple[str, str] | None:
        return self.below(n, self.fewest, "bound = 'median'", "a bound > 0") if self.bound == "median" else None

    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        state["round"] = state.get("round", 0) + 1
        norms = rows.x.norm(dim=1)
        bound = float(median(norms.double())) if isinstance(self.bound, str) else self.bound
        # u_k <- u_k min(1, M / ||u_k||)
        g = (rows.x * (bound / norms.clamp(min=1e-12)).clamp(max=1.0)[:, None]).mean(0)
        if self.noise:
            rng = torch_stream(self.seed, "weak dp", state["round"])
            g = g + self.noise * bound * torch.randn(g.shape, generator=rng, dtype=g.dtype)
        return Verdict(g)
