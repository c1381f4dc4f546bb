"""Context tokens about the names of classes, learned in the text tower of an image-text model (CoOp, PromptFL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack

CONTEXT = "clip.text_model.embeddings.context"
STD = 0.02
"""Of tokens that start at random."""


@dataclass(frozen=True)
class ClassPrompt(Space):
    """`length` learned tokens stand with each class's name in one sentence, `[start] v_1 ... v_m name . [end]`; both
    towers stay frozen. One context for all classes, or one for each."""

    multiplies: ClassVar[bool] = False
    stays: ClassVar[str] = "it puts learned tokens before the names of classes"
    length: int | None = knob(None, "number of context tokens; None: 16, or those of the template", ge=1)
    per_class: bool = knob(False, "a context of its own for each class, in place of one for all")
    name_at: Literal["end", "middle", "front"] = knob("end", "where among the context the class's name stands",
                                                      options=("end", "middle", "front"))
    start_from: Literal["random", "template"] = knob(
        "random", "where the context starts: at random, or as the words `a photo of a`", options=("random", "template"))

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        net = seeing(net, self.stem)
        size, classes = self.tokens(net), len(net.names.names)
        width = net.get_input_embeddings().weight.shape[1]
        net.names.sentences(size, self.name_at, net.text_room, net.labels)  # there is room for them
        shape = (classes, size, width) if self.per_class else (size, width)
        if self.start_from == "random":
            return {CONTEXT: STD * torch.randn(shape, generator=rng)}
        words = net.get_input_embeddings()(torch.tensor(net.names.before, device=net.prompts.device))
        return {CONTEXT: words.detach().float().cpu().expand(shape).clone()}

    def tokens(self, net: Any) -> int:
        """How many; ModelError where the template has another number of tokens."""
        if self.start_from == "random":
            return self.length or 16
        has = len(net.names.before)
        if not has or (self.length or has) != has:
            raise ModelError(f"space.length = {self.length}: the template 'a photo of a' has {has} tokens here; "
                             + ("allowed is that, or start_from = 'random'" if has else "use start_from = 'random'"))
        return has

    def install(self, net: nn.Module, stack: Stack) -> bool:
        seeing(net, self.stem)
        return True

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        if CONTEXT not in stack.tensors:
            return None
        clip: Any = net
        texts = clip.spoken(each_class(stack.tensors[CONTEXT], len(clip.names.names)), self.name_at)  # [K, C, d]
        return clip.matched(stack, clip.seen(batch), texts, batch)


def each_class(context: Tensor, classes: int) -> Tensor:
    """[K, C, m, w] of contexts [K, m, w] that all classes share, or of those themselves."""
    return context if context.dim() == 4 else context[:, None].expand(-1, classes, -1, -1)


def seeing(net: Any, space: str) -> Any:
    """The network, if it is an image-text model; ModelError otherwise."""
    if getattr(net, "spoken", None) is None:
        raise ModelError(f"space '{space}' learns prompts of an image-text model (data.task = 'image_text'); with this "
                         "one 'soft_prompt' or 'lora' works")
    return net
