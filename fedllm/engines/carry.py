"""Which function carries out which request, for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedllm.core.errors import RunError
from fedllm.local.decide import Decide, run_decisions
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_embeds, run_logits, run_losses, run_measures, run_outputs, run_probes
from fedllm.local.generate import run_generates
from fedllm.local.policy import Improve, Rollout, run_improves, run_rollouts
from fedllm.local.requests import (
    Booked,
    Complete,
    Embed,
    Fit,
    Generate,
    Limits,
    Logits,
    Losses,
    Measure,
    Outputs,
    Probe,
    Request,
    Sensitivity,
)
from fedllm.local.segments import Backward, Forward, run_backwards, run_forwards
from fedllm.local.sensitivity import run_sensitivities
from fedllm.local.summed import Summed, run_sums
from fedllm.local.text import run_completes

RUNNERS: dict[type[Request], Callable[..., list[Any]]] = {
    Fit: run_fits, Summed: run_sums, Losses: run_losses, Probe: run_probes, Generate: run_generates, Embed: run_embeds,
    Sensitivity: run_sensitivities, Outputs: run_outputs, Logits: run_logits, Measure: run_measures,
    Rollout: run_rollouts, Decide: run_decisions, Improve: run_improves, Complete: run_completes, Forward: run_forwards,
    Backward: run_backwards,
    Booked: lambda requests, limits: [None] * len(requests)}


def carry_out(lot: Sequence[Request], limits: Limits) -> list[Any]:
    """The answers of requests that can share steps; RunError when their work does not fit into the device's memory."""
    try:
        return RUNNERS[type(lot[0])](lot, limits)
    except torch.OutOfMemoryError as error:
        most = limits.learned(lot[0].model)
        raise RunError(
            f"a {type(lot[0]).__name__} of {len(lot)} client{'s' * (len(lot) > 1)} does not fit into the memory of "
            f"{lot[0].model.device}: lower engine.batch_tokens = {most} (fewer clients share a step), "
            f"local.batch_size or local.max_length ({str(error).splitlines()[0][:200]})") from None
