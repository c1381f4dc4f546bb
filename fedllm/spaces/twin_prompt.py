"""A prompt in each tower of an image-text model (TPFL): context before names, tokens or a frame about pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.class_prompt import CONTEXT, ClassPrompt, each_class
from fedllm.spaces.space import Stack
from fedllm.spaces.visual_prompt import FRAME, TOKENS, edge, prompted, visual_tokens


@dataclass(frozen=True)
class TwinPrompt(ClassPrompt):
    """As `class_prompt`, and `visual` tokens behind the one in front of a picture's patches, or a frame `visual` pixels
    wide that is added to it; both towers stay frozen. 0: `class_prompt` itself."""

    visual: int = knob(8, "number of visual tokens, or width of the frame in pixels; 0: none", ge=0)
    kind: Literal["tokens", "pixel_frame"] = knob("tokens", "what is learned about the picture",
                                                  options=("tokens", "pixel_frame"))

    visual_from: Literal["random", "front"] = knob(
        "random", "where visual tokens start: at random, or near the one in front", options=("random", "front"))

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree, clip = super().start(net, rng), net
        if not self.visual:
            return tree
        if self.kind == "tokens":
            return {**tree, TOKENS: visual_tokens(clip, self.visual, rng, self.visual_from)}
        return {**tree, FRAME: torch.zeros(3, int(edge(clip, self.visual).sum()))}

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        return self.both(net, stack, batch)[1] if CONTEXT in stack.tensors else None

    def both(self, net: Any, stack: Stack, batch: Any) -> tuple[Tensor, Tensor]:
        """Features [N, d] of the prompted pictures, and class logits [N, C]."""
        i = prompted(net, stack, batch, self.visual) if self.visual else net.seen(batch)
        texts = net.spoken(each_class(stack.tensors[CONTEXT], len(net.names.names)), self.name_at)
        return i, net.matched(stack, i, texts, batch)

    @property
    def beside_patches(self) -> int:
        return self.visual * (self.kind == "tokens")
