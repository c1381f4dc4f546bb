"""The span test: a layer's gradient is G^T X, so that every input of the layer lies in the span of its rows.

An input is told from others exactly while fewer inputs than the layer is wide (for LoRA: than its rank) were summed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.models.batch import collate
from fedllm.models.model import Model

PEFT = "base_model.model."
BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
ATTENTION = re.compile(r"(?:q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value|query|key|value)$")
"""Modules that read a block's normed input itself: what comes later in a block mixes it with other places."""
CHUNK = 2048
EPS = 2.0**-23
STEP, CHANCE = 20.0, 1e-3
"""From one singular value to the next: what stands out of noise (or of the rounding of a secure sum), and how often
noise alone may make such a step."""


@dataclass(frozen=True)
class Span:
    """What of one block was seen: of some of its modules a basis of the rows' span, seen through `view` or as it is."""

    path: str
    """A module whose input is tested."""
    basis: Tensor
    """Columns [d, rank]."""
    view: Tensor | None
    """[r, d]: of a LoRA's B not the inputs x were seen but A x; None: the inputs themselves."""
    slack: float = 0.0
    """How far what is not in the gradient (rounding, small noise) tilts the span: the first singular value that was cut
    over the last that was kept."""

    @property
    def rank(self) -> int:
        return int(self.basis.shape[1])

    @property
    def width(self) -> int:
        """How many directions there are: from so many inputs on, everything passes."""
        return int(self.basis.shape[0])

    @property
    def full(self) -> bool:
        """Whether nothing can be told: every vector lies in the span."""
        return self.rank >= self.width

    def allows(self, tau: float, words: int) -> float:
        """The distance below which an input counts as there: `tau`, more where the span is tilted, and never so much
        that of so many words that were not there one in a hundred tests would pass by chance."""
        chance = (0.01 / max(1, words)) ** (1 / max(1, self.width - self.rank))
        return min(max(tau, 3 * self.slack), chance, 0.5)

    def distance(self, inputs: Tensor) -> Tensor:
        """Inputs [n, d] -> how far each lies from the span [n], of its length: 0 in it, 1 across."""
        u = inputs.double() @ (self.view.T if self.view is not None else torch.eye(self.width, dtype=torch.float64))
        u = u / u.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return (u - (u @ self.basis) @ self.basis.T).norm(dim=1)


def spans(model: Model, moved: Mapping[str, Tensor], told: Mapping[str, Tensor], block: int) -> list[Span]:
    """The spans of this block: one of all weights and A factors (which see the inputs), and one of each B factor."""
    modules = dict(model.net.named_modules())
    rows: list[Tensor] = []
    noise, at, out = 0.0, "", []
    for name, change in sorted(moved.items()):
        path, _, factor = name.removeprefix(PEFT).removesuffix(".weight").partition(".lora_")
        found = BLOCK.search(path)
        if found is None or int(found[1]) != block or not ATTENTION.search(path) or change.dim() != 2 or (
                path not in modules or not bool(change.any())):
            continue
        g, start = change.detach().cpu().double(), told.get(name)
        rounding = EPS * float(start.double().pow(2).mean().sqrt()) if start is not None else 0.0
        if factor == "B":
            a = told.get(name.replace(".lora_B", ".lora_A"))
            if a is not None:
                columns, slack = basis(g, rounding)
                out.append(Span(path, columns, a.detach().cpu().double(), slack))
            continue
        wide = g.T if not factor and not isinstance(modules[path], nn.Linear) else g  # GPT-2's are transposed
        rows.append(wide)
        noise, at = max(noise, rounding), path
    if not rows:
        return out
    columns, slack = basis(torch.cat(rows), noise)
    return [Span(at, columns, None, slack), *out]


def basis(rows: Tensor, rounding: float = 0.0) -> tuple[Tensor, float]:
    """Columns that span these rows [n, d] as far as they stand out of what rounding does to n x d numbers, or, where
    something else is on all of them, out of that by a clear step; and the slack."""
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    floor = max(float(s.max()) * 2e-6, 2 * rounding * (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5))
    rank = int((s > floor).sum())
    if rank == rows.shape[1] > 1:
        beyond = s[:-1] / s[1:].clamp(min=1e-300) / steps_of_noise(*rows.shape)
        rank = int(beyond.argmax()) + 1 if float(beyond.max()) >= 1 else rank
    return v[:rank].T, float(s[rank] / s[rank - 1]) if 0 < rank < len(s) else 0.0


def steps_of_noise(n: int, d: int) -> Tensor:
    """What a step after 1, 2, ... directions of n >= d rows must come to, so that noise alone makes it once in 1,000.

    To have rank k to within t, a Gaussian matrix must lie near the matrices of rank k, which are (n - k)(d - k)
    dimensions fewer: a chance of about t^((n - k)(d - k)). The last direction of a square one goes with t itself.
    """
    k = torch.arange(1, d, dtype=torch.float64)
    return ((2 / CHANCE) ** (1 / ((n - k) * (d - k)))).clamp(min=STEP)


class _Enough(Exception):
    """The forward pass has come to the module that was looked for."""


def inputs_at(model: Model, theta: Tree, base: Tree | None, path: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """What the module gets at the last place of each row (all of one length): [n, d]."""
    module, out = dict(model.net.named_modules())[path], []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        out.append(args[0].detach().reshape(-1, length, args[0].shape[-1])[:, -1].float().cpu())
        raise _Enough

    hook = module.register_forward_pre_hook(keep)
    length = len(rows[0])
    try:
        for i in range(0, len(rows), max(1, CHUNK // length)):
            part = torch.tensor(rows[i : i + max(1, CHUNK // length)])
            batch = collate([[Encoded(r.int().numpy(), r.numpy(), length) for r in part]], model.pad, model.device)
            with torch.no_grad(), model.using([theta], base):
                model.stack.rows = len(part)
                try:
                    model.hidden(batch)
                except _Enough:
                    continue
    finally:
        hook.remove()
    return torch.cat(out)


def clearest(found: Sequence[Span]) -> list[Span]:
    """Those spans that tell something, of the ones that saw the most: a query at the first place looks at itself
    alone, so that its weights see one input less."""
    useful = [span for span in found if not span.full and span.rank]
    return [span for span in useful if span.view is None][:1] or [
        span for span in useful if span.rank == max(s.rank for s in useful)]


def passing(found: Sequence[Span], model: Model, theta: Tree, base: Tree | None, rows: Sequence[Sequence[int]],
            tau: float, words: int) -> Tensor:
    """How far what the rows' last places give the block is outside of the spans, over what is allowed [n]: those below
    1 were there. `words`: how many could have been."""
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    inputs = inputs_at(model, theta, base, found[0].path, rows)
    return torch.stack([span.distance(inputs) / span.allows(tau, words) for span in found]).max(0).values
