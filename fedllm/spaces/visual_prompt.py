"""Tokens among a picture's patches, or a frame of pixels about it, and a head on its features (VPT, pFedPG)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import DataError, ModelError, RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.class_prompt import STD, seeing
from fedllm.spaces.space import Space, Stack

TOKENS, FRAME = "clip.vision_model.embeddings.tokens", "clip.vision_model.embeddings.frame"
HEAD = "head.weight"


@dataclass(frozen=True)
class VisualPrompt(Space):
    """`length` learned tokens behind the one in front of a picture's patches, and with `head` a linear map from
    features to classes, which starts as the text features of the classes; both towers stay frozen."""

    multiplies: ClassVar[bool] = False
    stays: ClassVar[str] = "it puts learned tokens among the patches of a picture"
    length: int = knob(10, "number of visual tokens", ge=1)
    visual_from: Literal["random", "front"] = knob(
        "random", "where the tokens start: at random, or near the one in front", options=("random", "front"))
    head: bool = knob(False, "learn what features are compared with, too")

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        clip = seeing(net, self.stem)
        tree = {TOKENS: visual_tokens(clip, self.length, rng, self.visual_from)}
        if self.head:
            with torch.no_grad():
                tree[HEAD] = clip.texts(Stack())[0].float().cpu().clone()  # [C, d]
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        seeing(net, self.stem)
        return True

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        if TOKENS not in stack.tensors:
            return None
        clip: Any = net
        texts = F.normalize(stack.tensors[HEAD], dim=-1).to(clip.dtype) if self.head else clip.texts(stack)
        return clip.matched(stack, prompted(clip, stack, batch), texts, batch)

    @property
    def beside_patches(self) -> int:
        return self.length


def width_of(clip: Any) -> int:
    """Of a patch."""
    return int(clip.config.vision_config.hidden_size)


def visual_tokens(clip: Any, count: int, rng: torch.Generator, start: str) -> Tensor:
    """[count, w], N(0, 0.02^2) about 0, or about the token in front as it stands in its place.

    Whatever is put among few patches takes attention from them; what looks like the token in front takes the least.
    """
    noise = STD * torch.randn(count, width_of(clip), generator=rng)
    if start == "random":
        return noise
    own = dict(clip.clip.vision_model.embeddings.named_parameters())
    if "class_embedding" not in own:
        raise ModelError("space.visual_from = 'front': this model's picture tower has no token in front of the "
                         "patches; 'random' works")
    return noise + (own["class_embedding"] + own["position_embedding.weight"][0]).detach().float().cpu()


def edge(clip: Any, wide: int) -> Tensor:
    """Which pixels [H, W] lie in a frame of this width; RecipeError where it leaves nothing inside."""
    side = clip.config.vision_config.image_size
    if 2 * wide >= side:
        raise RecipeError(f"space.visual = {wide}: a frame of that width covers the whole picture of {side} pixels; "
                          f"allowed are 1 to {(side - 1) // 2}")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[wide : side - wide, wide : side - wide] = True
    return ~inside


def pixels_of(batch: Any) -> Tensor:
    """The batch's pictures; DataError where its rows hold features in their place."""
    if "pixels" not in batch.parts:
        raise DataError("the rows hold image features, and a visual prompt lies in the tower that makes them; give the "
                        "pictures themselves (the column 'image')")
    return batch.parts["pixels"]


def prompted(clip: Any, stack: Stack, batch: Any, wide: int = 0) -> Tensor:
    """Features [N, d] of a batch's pictures with the stack's tokens, or its frame of this width, put in."""
    x = pixels_of(batch)
    each = len(x) // stack.k
    if FRAME in stack.tensors:  # [K, 3, pixels of the frame]
        frame = stack.tensors[FRAME].to(x.dtype)
        full = x.new_zeros(stack.k, *x.shape[1:])
        full[:, :, edge(clip, wide).to(x.device)] = frame
        x = x + full.repeat_interleave(each, 0)
    tokens = stack.tensors.get(TOKENS)
    return clip.images(x, None if tokens is None else tokens.repeat_interleave(each, 0))
