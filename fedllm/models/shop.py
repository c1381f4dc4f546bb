"""A sequential recommender over items that are codes of their names: codes have a table, items have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import RecipeError
from fedllm.models.series import Block, Held, start
from fedllm.spaces.space import Stack

TABLE, ENCODER, PROMPT = "table.", "encoder.", "prompt."
"""Where the names of its weights begin: the codes' table, what reads a history, and the prompts of one's own shop."""
TEMPERATURE = 0.07
PLACES = 128
"""Items of a history that it has places for."""


def codes_of(names: Sequence[str], groups: int, size: int) -> np.ndarray:
    """Product quantization of names [items, groups]: TF-IDF of their words, reduced, each part of it clustered.

    The shop before the slash and numbers are no words of it. Equal names everywhere give equal codes.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [name.rpartition("/")[2] for name in names]
    try:
        x = TfidfVectorizer(token_pattern=r"(?u)\b[^\W\d_]+\b").fit_transform(texts)
    except ValueError as error:
        raise RecipeError(f"model.name = 'shop': the items' names hold no words to make codes of ({error})") from None
    width = min(groups * 4, min(x.shape) - 1)
    dense = TruncatedSVD(width, random_state=0).fit_transform(x) if width >= groups else x.toarray()
    parts = np.array_split(np.arange(dense.shape[1]), groups)
    out = np.zeros((len(names), groups), np.int64)
    for g, part in enumerate(parts):
        if len(part) and (many := min(size, len(np.unique(dense[:, part].round(9), axis=0)))) > 1:
            out[:, g] = KMeans(many, n_init=2, random_state=0).fit_predict(dense[:, part])
    return out


class ShopNet(nn.Module):
    """v_i = mean of its codes' rows; s = last state of a causal transformer over a history; logits s . v / 0.07.

    Where prompts are among the trainables, s + gate * (what they add): a look-up of prompts by s, and with `full` the
    last state of a second reader over items of its own.
    """

    def __init__(self, codes: np.ndarray, size: int, width: int, depth: int, heads: int, prompts: int, full: bool,
                 rng: torch.Generator) -> None:
        super().__init__()
        groups = codes.shape[1]
        self.width, self.full = width, full
        self.register_buffer("codes", torch.from_numpy(codes + size * np.arange(groups)), persistent=False)
        self.table = nn.Embedding(groups * size, width)
        self.encoder = Reader(width, depth, heads)
        own = {"item": nn.Embedding(len(codes), width), "reader": Reader(width, 1, heads),
               "merge": nn.Linear(3 * width, width)} if full else {}
        self.prompt = nn.ModuleDict({"bank": Held(prompts, width), "gate": Held(1), **own})
        start(self, rng)
        with torch.no_grad():
            self.table.weight.normal_(0.0, 1.0, generator=rng)
            self.prompt["bank"].weight.normal_(0.0, 1.0, generator=rng)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    def items(self, stack: Stack) -> Tensor:
        """Unit vectors of all items [K, C, d] (of lanes without a table of their own alike)."""
        rows, stack.rows = stack.rows, stack.k * len(self.codes)
        try:
            v = self.table(self.codes.repeat(stack.k, 1)).mean(1)  # [K*C, d]
        finally:
            stack.rows = rows
        return v.view(stack.k, len(self.codes), -1)

    def logits(self, stack: Stack, batch: Any) -> Tensor:
        """[N, C]."""
        v = self.items(stack)
        lane = torch.arange(stack.k, device=v.device).repeat_interleave(len(batch.ids) // stack.k)
        s = self.encoder(v[lane[:, None], batch.ids], batch.mask)  # [N, d]
        if any(n.startswith(PROMPT) for n in stack.tensors):
            s = s + self.prompt["gate"](s) * self.added(s, batch)
        s, v = F.normalize(s, dim=-1), F.normalize(v, dim=-1)
        return torch.bmm(stack.lanes(s), v.mT).flatten(0, 1) / TEMPERATURE

    def added(self, s: Tensor, batch: Any) -> Tensor:
        """What the prompts add to states s [N, d]."""
        bank = self.prompt["bank"](s)  # [N, P, d]
        near = ((bank @ s[..., None])[..., 0] / self.width**0.5).softmax(-1)
        found = (near[:, None] @ bank)[:, 0]
        if not self.full:
            return found
        own = self.prompt["reader"](self.prompt["item"](batch.ids), batch.mask)
        return self.prompt["merge"](torch.cat([found, own, s], -1))


class Reader(nn.Module):
    """Blocks over a history's vectors, each item seeing those before it; the last one's state."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.place = nn.Embedding(PLACES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[N, T, d], [N, T] -> [N, d]; padding stands on the right, where no item looks."""
        t = x.shape[1]
        h = x + self.place(torch.arange(t, device=x.device).expand(len(x), -1))
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            h = block(h, causal)
        last = (mask.long().sum(1) - 1).clamp(min=0)
        return self.norm(h[torch.arange(len(h), device=h.device), last])
