"""Prompt tuning: learned embeddings in front of the text (Lester et al., EMNLP 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import PromptTuningConfig
from torch import nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import CAUSAL, Prompt, Space, Stack

NAME = "prompt_embeddings"


@dataclass(frozen=True)
class SoftPrompt(Space):
    """`length` virtual tokens, started from the embeddings of random real tokens or at random."""

    multiplies: ClassVar[bool] = False
    over_packed: ClassVar[bool] = True
    stays: ClassVar[str] = "it puts virtual tokens before the text"
    peft: ClassVar[str] = "PROMPT_TUNING"
    length: int = knob(16, "number of virtual tokens", ge=1)
    start_from: Literal["vocabulary", "random"] = knob("vocabulary", "where the virtual tokens start",
                                                       options=("vocabulary", "random"))

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        table = net.get_input_embeddings().weight.detach().float()
        if self.start_from == "vocabulary":
            ids = torch.randint(table.shape[0], (self.length,), generator=rng)
            return {NAME: table[ids.to(table.device)].clone()}
        return {NAME: torch.randn(self.length, table.shape[1], generator=rng) * float(table.std())}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        return True

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        p = stack.tensors.get(NAME)  # [K, P, d]
        if p is None:
            return None
        rows_each = rows // stack.k
        return Prompt(p.shape[1], embeds=p.repeat_interleave(rows_each, 0))  # [N, P, d]

    @property
    def virtual(self) -> int:
        return self.length

    @classmethod
    def peft_knobs(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"length": config["num_virtual_tokens"]}

    def peft_config(self, net: nn.Module, task: str) -> PromptTuningConfig:
        table = net.get_input_embeddings().weight  # narrower than the hidden states in some encoders
        return PromptTuningConfig(num_virtual_tokens=self.length, token_dim=table.shape[1],
                                  num_transformer_submodules=1, num_layers=getattr(net.config, "num_hidden_layers", 1),
                                  num_attention_heads=getattr(net.config, "num_attention_heads", 1),
                                  task_type="CAUSAL_LM" if task in CAUSAL else "FEATURE_EXTRACTION")
