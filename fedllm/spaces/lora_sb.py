"""LoRA-SB: between two fixed factors of a LoRA a small square matrix is trained (Ponkshe et al., arXiv 2411.19557)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.lora import LoRA, factors, names_of
from fedllm.spaces.params import saved_params, with_ties
from fedllm.spaces.space import PEFT, Space, Stack, linear_size, patch
from fedllm.spaces.stacked import install_params


@dataclass(frozen=True)
class LoRASB(Space):
    """y = W x + s B R A x with orthonormal columns in B [out, r] and rows in A [r, in]; R [r, r] is zero at the start.

    The tree holds all three. The map is linear in R alone: who averages R and leaves B and A averages exactly.
    """

    stays = ""
    by_token = True

    rank: int = knob(8, "rank r, the side of R", ge=1)
    alpha: float = knob(8.0, "s = alpha / r", gt=0)
    targets: str | tuple[str, ...] = knob("all-linear", "names of the linear modules, or all-linear")
    modules_to_save: tuple[str, ...] = knob(("classifier",), "modules trained whole beside the matrices, where present")

    @property
    def s(self) -> float:
        """The scale of the update."""
        return self.alpha / self.rank

    @property
    def whole(self) -> LoRA:
        """The LoRA that computes the same, with B R in the place of B."""
        return LoRA(rank=self.rank, alpha=self.alpha, targets=self.targets, modules_to_save=self.modules_to_save)

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        r, tree = self.rank, Tree()
        for path, module in self.whole.sites(net).items():
            o, i = linear_size(module) or (0, 0)
            if r > min(o, i):
                raise RecipeError(f"space.rank = {r} is not allowed; '{path}' is {o} x {i}, so it must be "
                                  f"<= {min(o, i)}")
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            b, a = (torch.linalg.qr(torch.randn(n, r, generator=rng, dtype=torch.float64)).Q for n in (o, i))
            for name, x in zip((*names_of(path), core(path)), (b, a.mT, torch.zeros(r, r)), strict=True):
                tree[name] = x.to(dtype).contiguous()
        return tree | {PEFT + n: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
                       for n, p in self._saved(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path in self.whole.sites(net):
            patch(net.get_submodule(path), lambda frozen, path=path: self._between(frozen, path, stack))
        names = with_ties(net, self._saved(net))
        return install_params(net, stack, {path: PEFT + name for path, name in names.items()})

    def _between(self, frozen: Any, path: str, stack: Stack) -> Any:
        (b_name, a_name), r_name = names_of(path), core(path)

        def forward(x: Tensor) -> Tensor:
            y, r = frozen(x), stack.tensors.get(r_name)
            if r is None:
                return y
            a, b, r = (t.to(x.dtype) for t in (stack.tensors[a_name], stack.tensors[b_name], r))
            h = torch.bmm(torch.bmm(stack.lanes(x), a.mT), r.mT) * self.s  # [K, N, r]
            return torch.baddbmm(stack.lanes(y), h, b.mT).view(y.shape)

        return forward

    def trains(self, name: str) -> bool:
        return any(name.startswith(m + ".") or f".{m}." in name for m in self.modules_to_save)

    def composes(self, net: nn.Module) -> list[str]:
        return list(self.whole.sites(net))

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return self.whole.idle(net, as_lora(theta))

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        self.whole.merge(net, as_lora(theta))

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[Any, Tree]:
        return self.whole.to_peft(net, task, as_lora(theta))

    def _saved(self, net: nn.Module) -> dict[str, nn.Parameter]:
        return saved_params(net, self.modules_to_save, self.trains)


def core(path: str) -> str:
    """The tree's name of R for a module path."""
    return f"{PEFT}{path}.lora_R.weight"


def as_lora(theta: Mapping[str, Tensor]) -> Tree:
    """The same as a LoRA's tree: B R, and A."""
    out = {n: x for n, x in theta.items() if not n.endswith(".lora_R.weight")}
    for path, (b, _) in factors(theta).items():
        out[names_of(path)[0]] = b @ theta[core(path)]
    return out
