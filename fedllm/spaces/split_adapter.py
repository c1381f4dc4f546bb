"""Adapters of three layers on both sides of a cut through two towers (M2FedSA): a modality's, and a task's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.adapter import Adapter
from fedllm.spaces.space import Stack

BLOCK = re.compile(r"^(clip\.(?:vision|text)_model)\.encoder\.layers\.(\d+)\.mlp$")


@dataclass(frozen=True)
class SplitAdapter(Adapter):
    """h + up(gelu(mid(gelu(down(h))))) behind the last block before the cut and behind the last of all, in each tower;
    `up` starts at zero, so the model starts unchanged."""

    size: int = knob(64, "width of the bottleneck, and of the square layer in it", ge=1)
    cut: int = knob(1, "blocks of each tower before the cut", ge=1)
    modules_to_save: tuple[str, ...] = knob((), "modules trained whole beside the adapters, where present")

    def _sites(self, net: nn.Module) -> list[str]:
        blocks: dict[str, dict[int, str]] = {}
        for path, _ in net.named_modules():
            if found := BLOCK.match(path):
                blocks.setdefault(found[1], {})[int(found[2])] = path
        if len(blocks) != 2:
            raise ModelError("split_adapter: it lies in both towers of an image-text model of the family CLIP "
                             "(data.task = 'image_text'), and this model has none; with this model 'lora' works")
        if short := [n for n in blocks.values() if len(n) <= self.cut]:
            raise ModelError(f"space.cut = {self.cut}: allowed are 1 to {min(map(len, short)) - 1}, so that a block is "
                             "left behind the cut in each tower")
        return [n[i] for n in blocks.values() for i in (self.cut - 1, len(n) - 1)]

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        m, tree = self.size, {}
        for path in self._sites(net):
            mlp: Any = net.get_submodule(path)
            d = mlp.fc2.out_features
            for part, (rows, cols) in {"down": (m, d), "mid": (m, m), "up": (d, m)}.items():
                drawn = (torch.rand(rows, cols, generator=rng) * 2 - 1) / math.sqrt(cols)
                tree[f"{path}.adapter_{part}.weight"] = drawn if part != "up" else torch.zeros(rows, cols)
                tree[f"{path}.adapter_{part}.bias"] = torch.zeros(rows)
        return tree | {n: p.detach().float().clone() for n, p in self._saved(net).items()}

    def inner(self, z: Tensor, path: str, stack: Stack, rows: int) -> Tensor:
        mid, bias = (stack.tensors[f"{path}.adapter_mid.{p}"].to(z.dtype) for p in ("weight", "bias"))
        return F.gelu(torch.baddbmm(bias[:, None], F.gelu(z), mid.mT))
