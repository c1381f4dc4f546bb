"""Sparse mask: a fixed small share of the entries of the linear weights (as in SLoRA's first stage and FISH)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.space import Space, Stack, find_linears
from fedllm.spaces.stacked import install_params


@dataclass(frozen=True)
class Mask(Space):
    """Train the deltas of `density` of each linear weight's entries; every client holds the same mask.

    The tree holds one vector of deltas per weight; the positions follow from the knobs and the base, so that
    nothing but values travels.
    """

    stays = ""

    density: float = knob(0.01, "share of each weight's entries that is trained", gt=0, le=1)
    choose: Literal["random", "magnitude"] = knob("magnitude", "which entries", options=("random", "magnitude"))
    seed: int = knob(0, "seed of the random mask", ge=0)
    targets: str | tuple[str, ...] = knob("all-linear", "names of the linear modules")

    def positions(self, net: nn.Module) -> dict[str, Tensor]:
        """Flat indices of the trained entries, by weight name, ascending."""
        out = {}
        rng = torch.Generator().manual_seed(self.seed)
        for path, module in find_linears(net, self.targets, "mask").items():
            w = module.weight.detach()
            count = max(1, round(self.density * w.numel()))
            large = self.choose == "magnitude"
            score = w.abs().flatten().float().cpu() if large else torch.rand(w.numel(), generator=rng)
            out[f"{path}.weight"] = score.topk(count).indices.sort().values.to(w.device)
        return out

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        weights = dict(net.named_parameters())
        return {f"{n}.sparse_delta": torch.zeros(len(at), dtype=torch.promote_types(weights[n].dtype, torch.float32))
                for n, at in self.positions(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        places = self.positions(net)
        weights = dict(net.named_parameters())

        def value(name: str) -> Tensor | None:
            delta = stack.tensors.get(f"{name}.sparse_delta")  # [K, m]
            if delta is None:
                return None
            w = weights[name].to(delta.dtype)
            flat = w.reshape(1, -1).expand(stack.k, -1).index_add(1, places[name], delta)
            return flat.reshape(stack.k, *w.shape)

        return install_params(net, stack, {n: n for n in places}, value)

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return not any(t.any() for t in theta.values())

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        weights = dict(net.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, places in self.positions(net).items():
                flat = weights[name].view(-1)
                flat.index_add_(0, places, theta[f"{name}.sparse_delta"].to(flat))
