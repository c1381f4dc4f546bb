"""A small transformer over the steps of a series: it fills in what is masked, and prompts make it forecast."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER, PROMPT = "encoder.", "prompt."
"""Where the names of its weights begin: what fills in, and what asks it for a forecast."""
PARTS = (0.2, 0.6, 1.0)
"""Shares of the horizon at which the stages of a forecast end: 3, 9 and 15 of 15 steps."""


class Block(nn.Module):
    """Attention and a feed-forward of four times the width, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """[N, T, d]; `mask` [N or 1, 1, T or 1, T] is True where a place may be looked at. What attention over `prompt`
        [N, m, d] gives is added to what attention gives."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if prompt is not None:
            k, v = (f(prompt).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.k, self.v))
            a = a + F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Held(nn.Module):
    """A table that every row is given: trainable as any module's weight is, lane by lane."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, like: Tensor) -> Tensor:
        """The table for each row of `like` [N, ...]."""
        return self.weight.to(like.dtype).expand(len(like), *self.weight.shape)


class Filler(nn.Module):
    """Variables of all steps in, the same out: learned by filling in what was masked."""

    def __init__(self, variables: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(variables, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, variables)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, V] -> [N, T, V]."""
        at = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        h = self.enter(x) + self.place(at)
        for block in self.blocks:
            h = block(h)
        return self.leave(self.norm(h))


class SeriesNet(nn.Module):
    """The filler, and what is trained of a forecast: a prompt over time [H, V], one across variables [H, 2], a head."""

    def __init__(self, variables: int, past: int, horizon: int, target: int, width: int, depth: int, heads: int,
                 rng: torch.Generator) -> None:
        super().__init__()
        self.variables, self.past, self.horizon, self.target = variables, past, horizon, target
        self.encoder = Filler(variables, past + horizon, width, depth, heads)
        self.prompt = nn.ModuleDict({"time": Held(horizon, variables), "across": Held(horizon, 2),
                                     "head": Held(horizon, 2)})
        start(self, rng)
        with torch.no_grad():
            self.prompt["time"].weight.normal_(0.0, 0.02, generator=rng)
            self.prompt["head"].weight[:, 0] = 0.5  # half of what is said, half of what was seen last

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.enter.weight.dtype

    def fill(self, x: Tensor) -> Tensor:
        """[N, L + H, V] with zeros where it is masked -> all of it."""
        return self.encoder(x.to(self.dtype))

    def forecast(self, past: Tensor) -> Tensor:
        """[N, L, V] -> the target's next steps [N, H].

        Over time: the prompt's first steps stand after the past, and what is said there takes their place before the
        next ones follow. Across variables: the others as they were said, and the second prompt where the target is.
        """
        x = past.to(self.dtype)
        ends = sorted({max(1, round(p * self.horizon)) for p in PARTS})
        ask = self.prompt["time"](x)  # [N, H, V]
        for a, b in itertools.pairwise((0, *ends)):
            said = self.encoder(torch.cat([x, ask[:, a:b]], 1))[:, x.shape[1] :]
            x = torch.cat([x, said], 1)
        across = self.prompt["across"](x)
        here = torch.arange(self.variables, device=x.device) == self.target
        later = torch.where(here, across[..., :1], x[:, self.past :])
        told = self.encoder(torch.cat([x[:, : self.past], later], 1))[:, self.past :, self.target]
        both = 0.5 * (x[:, self.past :, self.target] + told * (1 + across[..., 1]))
        share, shift = self.prompt["head"](x).unbind(-1)
        last = x[:, self.past - 1, self.target, None]
        return last + share * (both - last) + shift


def start(net: nn.Module, rng: torch.Generator) -> None:
    """Linear maps N(0, 1/in), tables of places N(0, 0.02^2), norms as they are; drawn from `rng` in their order."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=rng)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02, generator=rng)

