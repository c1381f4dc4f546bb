"""What is drawn while a client trains (dropout, NEFTune): its own stream, whoever shares the step with it.

A draw depends on the client's seed, the step, the module and the sizes of the client's own rows, so that neither the
engine nor other clients' padding changes it. Tests and generation draw nothing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.rng import seed_of
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces.space import Stack, patch


@dataclass
class Noise:
    """The draws of one forward and backward of K lanes."""

    stack: Stack
    seeds: Sequence[int]
    """Each lane's own, of its step and part."""
    rows: Sequence[int]
    """How many rows each lane has; those that fill it up draw nothing."""
    visits: Counter[str] = field(default_factory=Counter)
    """How often each place has drawn: a module may run more than once in a forward."""

    def uniform(self, place: str, x: Tensor) -> Tensor:
        """Numbers in [0, 1) for every entry of x [K*B, T, d]; zeros on padding. ModelError for any other shape."""
        mask = self.stack.mask
        if mask is None or x.dim() != 3 or x.shape[:2] != mask.shape or len(x) != self.stack.k * max(self.rows):
            seen = "no mask" if mask is None else f"{list(mask.shape)} tokens"
            raise ModelError(f"'{place}' is given {list(x.shape)} for {seen}, so that nothing can be drawn for each "
                             "token there; leave space.dropout and local.neftune out, or the module out of "
                             "space.targets")
        self.visits[place] += 1
        out = torch.zeros_like(x, dtype=torch.float32)
        lanes, widest = out.view(self.stack.k, -1, *x.shape[1:]), mask.view(self.stack.k, -1, mask.shape[1]).any(1)
        on = x.device if x.device.type == "cuda" else torch.device("cpu")
        for k, (seed, b) in enumerate(zip(self.seeds, self.rows, strict=True)):
            rng = torch.Generator(on).manual_seed(seed_of(seed, place, self.visits[place]))
            t = int(widest[k].nonzero()[-1]) + 1
            lanes[k, :b, :t] = torch.rand(b, t, x.shape[-1], generator=rng, device=on).to(x.device)
        return out


@contextlib.contextmanager
def noisy(model: Model, seeds: Sequence[int | None], step: tuple[int, int], rows: Sequence[int],
          alpha: float | None) -> Iterator[None]:
    """Train with what these clients draw in this step and part; `alpha` is NEFTune's. None as seeds: nothing."""
    if seeds[0] is None:
        yield
        return
    stack = model.stack
    stack.noise = Noise(stack, [seed_of(seed, *step) for seed in seeds], rows)
    words = words_of(model) if alpha is not None else None
    before = words.__dict__.get("forward") if words is not None else None
    if words is not None:
        patch(words, lambda plain: _with_noise(plain, alpha or 0.0, stack))
    try:
        yield
    finally:
        stack.noise = None
        if words is not None:
            del words.__dict__["forward"]
            words.__dict__.update({"forward": before} if before is not None else {})


def words_of(model: Model) -> nn.Module:
    """The network's word embeddings."""
    net: Any = model.net.body if isinstance(model.net, HeadedEncoder) else model.net
    return net.get_input_embeddings()


def _with_noise(plain: Any, alpha: float, stack: Stack) -> Any:
    """Embeddings + U(-1, 1) alpha / sqrt(L d), with L the row's own tokens (Jain et al., ICLR 2024)."""

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = plain(ids, *args, **kwargs)
        noise: Any = stack.noise
        if noise is None or not torch.is_grad_enabled():
            return x
        u = 2 * noise.uniform("neftune", x) - 1
        lengths = noise.stack.mask.sum(1).clamp(min=1).view(-1, 1, 1)
        size = alpha / (lengths * x.shape[-1]).to(torch.float32).sqrt()
        return x + (u * size * noise.stack.mask[..., None]).to(x.dtype)

    return forward
