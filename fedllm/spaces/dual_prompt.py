"""A text prompt and a visual token of each domain (Fed-DPT): how a picture looks at the tokens weighs the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.class_prompt import CONTEXT, STD, ClassPrompt
from fedllm.spaces.space import Stack
from fedllm.spaces.visual_prompt import TOKENS, pixels_of, visual_tokens

OWN, SLOT = "clip.text_model.embeddings.own", "issued/slot"


@dataclass(frozen=True)
class DualPrompt(ClassPrompt):
    """g_c = sum_i omega_i E_txt([t_i, name_c]) over the domains, with omega_i how much the token in front of the
    picture's patches looks at v_i, one of `domains` tokens behind them, in the last block. Both towers stay frozen.

    In a client's tree `OWN` is the prompt in place `SLOT`, and trained; of `CONTEXT` the others are.
    """

    frozen: ClassVar[tuple[str, ...]] = ("issued",)
    domains: int = knob(3, "how many domains there are", ge=1)
    per_class: bool = knob(False, "has no use here", options=(False,))
    visual_from: Literal["random", "front"] = knob(
        "random", "where the visual tokens start: at random, or near the one in front", options=("random", "front"))

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        one = super().start(net, rng)[CONTEXT]
        clip: Any = net
        if "class_embedding" not in dict(clip.clip.vision_model.embeddings.named_parameters(recurse=False)):
            raise ModelError("space 'dual_prompt' reads how the token in front of a picture's patches looks at its "
                             "own, and this model's picture tower has none in front; a CLIP works")
        other = STD * torch.randn(self.domains, *one.shape, generator=rng)
        each = other if self.start_from == "random" else one.expand(self.domains, -1, -1).clone()
        return {CONTEXT: each, TOKENS: visual_tokens(net, self.domains, rng, self.visual_from)}

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        if CONTEXT not in stack.tensors:
            return None
        clip: Any = net
        x = pixels_of(batch)
        k, d, c = stack.k, self.domains, len(clip.names.names)
        i, omega = clip.weighed(x, stack.tensors[TOKENS].repeat_interleave(len(x) // k, 0))  # [N, d], [N, D]
        t = self.contexts(stack)[:, :, None].expand(-1, -1, c, -1, -1)  # [K, D, C, m, w]
        g = clip.spoken(t.flatten(0, 1), self.name_at).view(k, d, c, -1)
        mixed = torch.einsum("kbd,kdcf->kbcf", omega.view(k, -1, d).to(g), g).flatten(0, 1)
        return clip.matched(stack, i, torch.nn.functional.normalize(mixed, dim=-1), batch)  # [N, C, f]

    def contexts(self, stack: Stack) -> Tensor:
        """The prompts of all domains [K, D, m, w]."""
        t = stack.tensors[CONTEXT]
        if OWN not in stack.tensors:
            return t
        own = stack.tensors[SLOT][..., None, None] > 0.5  # [K, D, 1, 1]
        return torch.where(own, stack.tensors[OWN][:, None].to(t.dtype), t)

    @property
    def beside_patches(self) -> int:
        return self.domains


def looked_at(model: Any, batch: Any) -> Tensor:
    """omega [N, D] of a batch, by the tree in use."""
    x, tokens = pixels_of(batch), model.stack.tensors[TOKENS]
    return model.net.weighed(x, tokens.repeat_interleave(len(x) // model.stack.k, 0))[1]
