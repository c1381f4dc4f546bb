"""A small transformer of two modalities: a tower for pictures, one for words in the same shapes, and one over both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import DataError
from fedllm.models.series import Block, Held, start
from fedllm.spaces.space import Stack
from fedllm.tasks.pairs import PIXELS, VOCABULARY, WORDS

MODALITIES = ("image", "text")
GRID = 4
"""Patches of a picture's side."""
PLACES = 64
"""Words of a text that it has places for."""
PROMPT, OWN, SHARED = "prompt.", "prompt.own.weight", "prompt.shared.weight"


class Resized:
    """Pictures as the network takes them: [3, side, side] of numbers from -1 to 1."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, picture: Any) -> np.ndarray:
        x = np.asarray(picture.resize((self.side, self.side)), np.float32) / 127.5 - 1
        return x.transpose(2, 0, 1)


class Tower(nn.Module):
    """Tokens in, states out, with places of its own; prompts are keys and values beside the tokens."""

    def __init__(self, width: int, depth: int, heads: int, places: int) -> None:
        super().__init__()
        self.place = nn.Embedding(places, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor, prompt: Tensor | None = None) -> Tensor:
        """[N, T, d], [N, T] -> [N, T, d]."""
        h = x + self.place(torch.arange(x.shape[1], device=x.device).expand(len(x), -1))
        for block in self.blocks:
            h = block(h, mask[:, None, None], prompt)
        return self.norm(h)


class PairNet(nn.Module):
    """What a row has is what is read: its picture, its text, or both, each of the three with a head of its own."""

    def __init__(self, labels: int, width: int, depth: int, heads: int, side: int, prompts: int, rng: torch.Generator
                 ) -> None:
        super().__init__()
        self.side, self.width = side, width
        patch = 3 * (side // GRID) ** 2
        self.image, self.text = Tower(width, depth, heads, GRID**2), Tower(width, depth, heads, PLACES)
        self.joint = Tower(width, 1, heads, GRID**2 + PLACES)
        self.enter = nn.ModuleDict({"image": nn.Linear(patch, width), "text": nn.Embedding(VOCABULARY, width)})
        self.map = nn.ModuleDict({m: nn.Linear(width, width) for m in MODALITIES})
        self.head = nn.ModuleDict({m: nn.Linear(width, labels) for m in (*MODALITIES, "pair")})
        self.prompt = nn.ModuleDict({"own": Held(prompts, width), "shared": Held(prompts, width)})
        start(self, rng)
        with torch.no_grad():
            self.enter["text"].weight.normal_(0.0, 1.0, generator=rng)
            self.prompt["own"].weight.normal_(0.0, 1.0, generator=rng)

    @property
    def dtype(self) -> torch.dtype:
        return self.head["pair"].weight.dtype

    def states(self, batch: Any, prompt: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality that rows have: states [N, T, d], and which count [N, T]."""
        out = {}
        if PIXELS in batch.parts:
            x = batch.parts[PIXELS].to(self.dtype)
            if x.shape[1:] != (3, self.side, self.side):
                raise DataError(f"a picture has the shape {list(x.shape[1:])}; this network takes [3, {self.side}, "
                                f"{self.side}] (model.picture)")
            p = self.side // GRID
            cut = x.unflatten(3, (GRID, p)).unflatten(2, (GRID, p)).permute(0, 2, 4, 1, 3, 5)
            patches = cut.flatten(3).flatten(1, 2)  # [N, 16, 3 p^2]
            ones = torch.ones(patches.shape[:2], dtype=torch.bool, device=x.device)
            out["image"] = self.image(self.enter["image"](patches), ones, prompt), ones
        if WORDS in batch.parts:
            words = batch.parts[WORDS][:, :PLACES]
            mask = words >= 0
            mask = mask | ~mask.any(1, keepdim=True)  # rows that fill a lane have no word, and attention needs one
            out["text"] = self.text(self.enter["text"](words.clamp(min=0)), mask, prompt), mask
        return out

    def features(self, batch: Any) -> dict[str, Tensor]:
        """Unit features [N, d] by modality that rows have."""
        return {m: F.normalize(self.map[m](mean(*x)), dim=-1) for m, x in self.states(batch).items()}

    def logits(self, stack: Stack, batch: Any) -> Tensor:
        """[N, C]."""
        x = self.states(batch, self.prompts(stack, batch))
        if len(x) == 1:
            [(m, one)] = x.items()
            return self.head[m](mean(*one))
        h, mask = (torch.cat([x[m][i] for m in MODALITIES], 1) for i in (0, 1))
        prompt = self.prompts(stack, batch)
        return self.head["pair"](mean(self.joint(h, mask, prompt), mask))

    def prompts(self, stack: Stack, batch: Any) -> Tensor | None:
        """[N, m, d] where prompts are among the trainables: one's own, and those that were told behind them."""
        named = [n for n in ("own", "shared") if f"{PROMPT}{n}.weight" in stack.tensors]
        like = next(iter(batch.parts.values()))
        return torch.cat([self.prompt[n](like).to(self.dtype) for n in named], 1) if named else None


def mean(h: Tensor, mask: Tensor) -> Tensor:
    """Over what counts [N, d]."""
    m = mask.to(h.dtype)[..., None]
    return (h * m).sum(1) / m.sum(1)
