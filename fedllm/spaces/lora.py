"""LoRA: low-rank updates of linear maps (Hu et al., ICLR 2022), any rank for each client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.method import knob
from fedllm.core.payload import Tree
from fedllm.spaces.params import saved_params, with_ties
from fedllm.spaces.space import CAUSAL, PEFT, Space, Stack, find_linears, linear_size, patch, set_params
from fedllm.spaces.stacked import install_params


@dataclass(frozen=True)
class LoRA(Space):
    """y = W x + s B A x with A: [r, in], B: [out, r]; A starts random (Kaiming), B at zero.

    s is `alpha` / r ("classic"), alpha / sqrt(r) ("rslora"), or alpha / `rank` whatever the client's own rank is
    ("shared", so that truncating a client's rank does not change the function).
    """

    ragged = True
    takes_base = True
    over_packed = True
    stays = ""
    peft = "LORA"

    rank: int = knob(8, "rank r, where a client's profile does not say another", ge=1)
    alpha: float = knob(16.0, "scale of the update", gt=0)
    scaling: Literal["classic", "rslora", "shared"] = knob("classic", "how alpha and the rank make s",
                                                          options=("classic", "rslora", "shared"))
    targets: str | tuple[str, ...] = knob("all-linear", "names of the linear modules, or all-linear: every one but "
                                          "the output head and those narrower than the rank")
    modules_to_save: tuple[str, ...] = knob(("classifier",), "modules trained whole beside the adapters, where present")

    def scale(self, rank: int) -> float:
        """s for a client of this rank."""
        by = {"classic": rank, "rslora": math.sqrt(rank), "shared": self.rank}
        return self.alpha / by[self.scaling]

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        r = rank or self.rank
        tree: Tree = {}
        for path, module in self._sites(net).items():
            o, i = linear_size(module) or (0, 0)
            if r > min(o, i):
                raise RecipeError(f"space.rank = {r} is not allowed; '{path}' is {o} x {i}, so it must be "
                                  f"<= {min(o, i)}")
            bound = 1 / math.sqrt(i)  # Kaiming uniform with a = sqrt(5), as PEFT does
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            tree[f"{PEFT}{path}.lora_A.weight"] = ((torch.rand(r, i, generator=rng) * 2 - 1) * bound).to(dtype)
            tree[f"{PEFT}{path}.lora_B.weight"] = torch.zeros(o, r, dtype=dtype)
        for name, p in self._saved(net).items():
            tree[PEFT + name] = p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path, module in self._sites(net).items():
            patch(module, lambda frozen, path=path, module=module: _adapted(frozen, path, module, stack))
        names = with_ties(net, self._saved(net))
        return install_params(net, stack, {path: PEFT + name for path, name in names.items()})

    def prepare(self, stack: Stack, trees: Sequence[Mapping[str, Tensor]]) -> None:
        first = next((n for n in trees[0] if n.endswith(".lora_A.weight")), None)
        scales = [self.scale(tree[first].shape[0]) for tree in trees] if first else [1.0]
        stack.extra["lora_scale"] = scales

    def trains(self, name: str) -> bool:
        return any(name.startswith(m + ".") or f".{m}." in name for m in self.modules_to_save)

    def composes(self, net: nn.Module) -> list[str]:
        return list(self._sites(net))

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        weights = dict(net.named_parameters(remove_duplicate=False))
        rest = {n: t for n, t in theta.items() if ".lora_A." not in n and ".lora_B." not in n}
        return not any(b.any() for b, _ in factors(theta).values()) and all(
            t.equal(weights[n.removeprefix(PEFT)].to(t)) for n, t in rest.items())

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        set_params(net, {n.removeprefix(PEFT): t for n, t in theta.items()
                         if ".lora_A." not in n and ".lora_B." not in n})
        with torch.no_grad():
            for path, (b, a) in factors(theta).items():
                module = net.get_submodule(path)
                change = self.scale(a.shape[0]) * (b @ a)  # [o, i]
                module.weight.add_((change.T if isinstance(module, Conv1D) else change).to(module.weight))

    def peft_config(self, net: nn.Module, task: str) -> LoraConfig:
        paths = list(self._sites(net))
        saved = sorted({n.rpartition(".")[0] for n in self._saved(net)})
        alpha = self.alpha if self.scaling != "shared" else self.scale(self.rank) * self.rank
        return LoraConfig(
            r=self.rank, lora_alpha=alpha, use_rslora=self.scaling == "rslora", target_modules=paths, lora_dropout=0.0,
            modules_to_save=saved or None, task_type="CAUSAL_LM" if task in CAUSAL else "FEATURE_EXTRACTION",
            fan_in_fan_out=isinstance(net.get_submodule(paths[0]), Conv1D))

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[LoraConfig, Tree]:
        """Rank and alpha as the tensors have them: a server may grow ranks, and clients' ranks may differ."""
        config = self.peft_config(net, task)
        ranks = {path: a.shape[0] for path, (_, a) in factors(theta).items()}
        if ranks:
            config.r = next(iter(ranks.values()))
            config.lora_alpha = self._alpha(config.r)  # type: ignore[assignment]
            odd = {p: r for p, r in ranks.items() if r != config.r}
            config.rank_pattern = {p: r for p, r in odd.items()}
            config.alpha_pattern = {p: self._alpha(r) for p, r in odd.items()}
        return config, dict(theta)

    def _alpha(self, rank: int) -> float:
        """PEFT's alpha for the scale of this rank."""
        return self.scale(rank) * (math.sqrt(rank) if self.scaling == "rslora" else rank)

    @classmethod
    def peft_knobs(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        targets = config["target_modules"]
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        return {"rank": max(ranks), "alpha": float(config["lora_alpha"]),
                "targets": targets if isinstance(targets, str) else sorted(targets),
                "modules_to_save": config.get("modules_to_save") or ["classifier"],
                "scaling": "rslora" if config.get("use_rslora") else "classic"}

    def from_peft(self, config: Mapping[str, Any], tree: Tree, fresh: Mapping[str, Tensor]) -> Tree:
        """Where the adapter's scale differs from this space's, the ratio is multiplied into B."""
        out, ranks = dict(tree), {path: a.shape[0] for path, (_, a) in factors(fresh).items()}
        for path, (b, a) in factors(tree).items():
            pattern, rank = config.get("alpha_pattern") or {}, a.shape[0]
            alpha = pattern.get(get_pattern_key(list(pattern), path.removeprefix("body.")), config["lora_alpha"])
            theirs = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            out[names_of(path)[0]] = b * (theirs / self.scale(ranks.get(path, rank)))
        return out

    def _sites(self, net: nn.Module) -> dict[str, nn.Module]:
        """The linear maps that get factors; none of them may be trained whole too."""
        found = find_linears(net, self.targets, "lora")
        if both := [p for p in found if self.trains(f"{p}.weight")]:
            raise ModelError(f"lora: '{both[0]}' is among space.targets = {self.targets!r} and in "
                             f"space.modules_to_save = {list(self.modules_to_save)}; a module has factors or is "
                             "trained whole, so name it in one of the two")
        wide = {p: m for p, m in found.items() if min(linear_size(m) or (0, 0)) >= self.rank}
        return wide if wide and self.targets == "all-linear" else found  # narrow gates have no place for factors

    def _saved(self, net: nn.Module) -> dict[str, nn.Parameter]:
        return saved_params(net, self.modules_to_save, self.trains)


def _adapted(frozen: Any, path: str, module: nn.Module, stack: Stack) -> Any:
    a_name, b_name, w_name = f"{PEFT}{path}.lora_A.weight", f"{PEFT}{path}.lora_B.weight", f"{path}.weight"

    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in module.__dict__  # no other stream beneath

    def forward(x: Tensor) -> Tensor:
        a = stack.tensors.get(a_name)  # [K, r, i]
        drift = stack.base.get(w_name) if stack.base else None
        if a is not None:
            a, b = a.to(x.dtype), stack.tensors[b_name].to(x.dtype)
            scale: Any = stack.extra["lora_scale"]
            one = len(set(scale)) == 1
            scale = scale[0] if one else torch.tensor(scale, dtype=x.dtype, device=x.device)[:, None, None]
            if plain and drift is None and stack.quick:
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                return Adapted.apply(x, weight, module.bias, a, b, scale)
        y = frozen(x) if drift is None else frozen(x) + F.linear(x, drift.to(x.dtype))
        if a is None:
            return y
        h = torch.bmm(stack.lanes(x), a.mT) * scale  # [K, N, r]
        return torch.baddbmm(stack.lanes(y), h, b.mT).view(y.shape)

    return forward


class Adapted(torch.autograd.Function):
    """x W^T + bias + s x A_k^T B_k^T for K lanes, W frozen: x [K*n, ..., i], W [o, i], A [K, r, i], B [K, o, r].

    Thin products are written with the rank as the number of rows, which runs up to three times as fast, and wide
    results are added to in place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any) -> Tensor:
        y = F.linear(x, weight, bias)
        lanes = x.reshape(len(a), -1, x.shape[-1])  # [K, N, i]
        ht = torch.bmm(a, lanes.mT).mul_(scale)  # [K, r, N]
        y.view(len(a), -1, y.shape[-1]).baddbmm_(ht.mT, b.mT)
        ctx.save_for_backward(lanes, weight, a, b, ht)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        lanes, weight, a, b, ht = ctx.saved_tensors
        wide = d.reshape(len(a), -1, d.shape[-1])  # [K, N, o]
        dh = torch.bmm(b.mT, wide.mT).mul_(ctx.scale)  # [K, r, N]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d @ weight  # [K*n, ..., i]
            dx.view(lanes.shape).baddbmm_(dh.mT, a)
        da = torch.bmm(dh, lanes) if ctx.needs_input_grad[3] else None
        db = torch.bmm(ht, wide).mT if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


def factors(tree: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The (B, A) pairs of a tree, by module path."""
    ends = ".lora_A.weight"
    paths = [n[: -len(ends)] for n in tree if n.endswith(ends)]
    return {p.removeprefix(PEFT): (tree[f"{p}.lora_B.weight"], tree[f"{p}{ends}"]) for p in paths}


def names_of(path: str) -> tuple[str, str]:
    """The tree's names of B and A for a module path."""
    return f"{PEFT}{path}.lora_B.weight", f"{PEFT}{path}.lora_A.weight"
