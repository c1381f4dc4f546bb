"""P-tuning: virtual tokens in front of the text that a small network makes (Liu et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.soft_prompt import NAME, SoftPrompt
from fedllm.spaces.space import Prompt, Space, Stack

CODES, LAYERS = "prompt_encoder.embedding.weight", (0, 2, 4)


@dataclass(frozen=True)
class PTuning(Space):
    """`length` codes of the words' width pass through three linear maps with ReLU between them; all of it is trained.

    PEFT's P_TUNING trains the same network (its MLP kind) and keeps what comes out of it: so does a saved adapter here.
    """

    multiplies: ClassVar[bool] = False
    over_packed: ClassVar[bool] = True
    stays: ClassVar[str] = "it puts virtual tokens before the text"
    length: int = knob(16, "number of virtual tokens", ge=1)
    hidden: int = knob(64, "width of the network between codes and tokens", ge=1)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        d, h = net.get_input_embeddings().weight.shape[1], self.hidden
        tree = {CODES: torch.randn(self.length, d, generator=rng)}
        for i, (out, into) in zip(LAYERS, ((h, d), (h, h), (d, h)), strict=True):
            bound = 1 / math.sqrt(into)  # as torch starts a linear map
            tree[f"prompt_encoder.mlp_head.{i}.weight"] = (torch.rand(out, into, generator=rng) * 2 - 1) * bound
            tree[f"prompt_encoder.mlp_head.{i}.bias"] = (torch.rand(out, generator=rng) * 2 - 1) * bound
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        return True

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        if CODES not in stack.tensors:
            return None
        p = made(stack.tensors)  # [K, P, d]
        return Prompt(p.shape[1], embeds=p.repeat_interleave(rows // stack.k, 0))  # [N, P, d]

    @property
    def virtual(self) -> int:
        return self.length

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[PromptTuningConfig, Tree]:
        tokens = made({n: t[None] for n, t in theta.items()})[0].contiguous()
        config: Any = SoftPrompt(length=self.length).peft_config(net, task)
        return config, {NAME: tokens}


def made(stacked: Mapping[str, Tensor]) -> Tensor:
    """The virtual tokens [K, P, d] of stacked trainables."""
    x = stacked[CODES]
    for i in LAYERS:
        weight, bias = (stacked[f"prompt_encoder.mlp_head.{i}.{part}"] for part in ("weight", "bias"))
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))  # [K, P, out]
        x = x.relu() if i != LAYERS[-1] else x
    return x
