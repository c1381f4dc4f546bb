"""One prompt that the key of a picture's domain changes (FedAPT): which domain it is, a learned map says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.class_prompt import CONTEXT, ClassPrompt, each_class
from fedllm.spaces.space import Stack

QUERY, KEYS = "domain.query", "issued/keys"
GRAIN = 1e4
"""Without a gradient, weights of domains are told apart to four decimals: pictures of one domain then share a pass of
the text tower."""


@dataclass(frozen=True)
class DomainPrompt(ClassPrompt):
    """v = A + A * sum_i a_i K_i: A the context as in `class_prompt`, K_i a fixed key of each domain from U[0, 1),
    a = softmax(u / temperature) of the standardized u = W f(x), by the picture. With the key of one domain alone in the
    tree the context is that domain's."""

    frozen: ClassVar[tuple[str, ...]] = ("issued",)
    domains: int = knob(3, "how many domains there are", ge=2)
    temperature: float = knob(0.01, "of the softmax over domains; towards 0: the likeliest alone", gt=0)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree, clip = super().start(net, rng), net
        m, w = tree[CONTEXT].shape[-2:]
        width: int = clip.width  # type: ignore[assignment]
        return {**tree, QUERY: 0.02 * torch.randn(self.domains, width, generator=rng),
                KEYS: torch.rand(self.domains, m, w, generator=rng)}

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        if CONTEXT not in stack.tensors:
            return None
        clip: Any = net
        i, keys, context = clip.seen(batch), stack.tensors[KEYS], each_class(
            stack.tensors[CONTEXT], len(clip.names.names))  # [N, d], [K, D, m, w], [K, C, m, w]
        if keys.shape[1] == 1:  # its own domain's
            return clip.matched(stack, i, clip.spoken(context + context * keys, self.name_at), batch)
        a = self.weights(stack.lanes(i), stack.tensors[QUERY]).flatten(0, 1)  # [N, D]
        lane = torch.arange(stack.k, device=a.device).repeat_interleave(len(a) // stack.k)
        of, which = lane, torch.arange(len(a), device=a.device)
        if not a.requires_grad:
            kinds, which = torch.unique(torch.cat([lane[:, None].to(a), (a * GRAIN).round() / GRAIN], 1), dim=0,
                                        return_inverse=True)
            of, a = kinds[:, 0].long(), kinds[:, 1:].to(keys)
        gain = torch.einsum("sd,sdmw->smw", a, keys[of])[:, None]
        return clip.matched(stack, i, clip.spoken(context[of] * (1 + gain), self.name_at)[which], batch)

    def weights(self, f: Tensor, query: Tensor) -> Tensor:
        """a [K, B, D] of image features [K, B, d] by maps [K, D, d]."""
        u = torch.bmm(f.to(query.dtype), query.mT)
        u = (u - u.mean(-1, keepdim=True)) / u.std(-1, keepdim=True).clamp(min=1e-12)
        return (u / self.temperature).softmax(-1)


def likeliest(model: Any, batch: Any) -> Tensor:
    """W f(x) [N, D] of a batch, by the tree in use."""
    query = model.stack.tensors[QUERY]
    f = model.stack.lanes(model.net.seen(batch)).to(query.dtype)
    return torch.bmm(f, query.mT).flatten(0, 1)
