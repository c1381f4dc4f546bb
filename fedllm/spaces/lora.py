"""LoRA: low-rank updates of linear maps (Hu et al., ICLR 2022), any rank for each client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.adaptable import adaptable
from fedllm.spaces.adapted import adapted
from fedllm.spaces.factors import factors as factors
from fedllm.spaces.factors import is_adapter as is_adapter
from fedllm.spaces.factors import names_of as names_of
from fedllm.spaces.magnitude import MAGNITUDE, weight_of
from fedllm.spaces.params import saved_params, with_ties
from fedllm.spaces.principal import principal, with_start, without_start
from fedllm.spaces.space import CAUSAL, PEFT, Space, Stack, find_linears, linear_size, patch, set_params
from fedllm.spaces.stacked import install_params


@dataclass(frozen=True)
class LoRA(Space):
    """y = W x + s B A x with A: [r, in], B: [out, r]; A starts random (Kaiming), B at zero.

    s is `alpha` / r ("classic"), alpha / sqrt(r) ("rslora"), or alpha / `rank` whatever the client's own rank is
    ("shared", so that truncating a client's rank does not change the function). With `dora` the rows of W + s B A are
    given learned lengths (`spaces/magnitude.py`); `init: pissa` begins at W's principal part (`spaces/principal.py`).
    """

    ragged = True
    over_packed = True
    by_token = True
    stays = ""
    peft = "LORA"

    rank: int = knob(8, "rank r, where a client's profile does not say another", ge=1)
    alpha: float = knob(16.0, "scale of the update", ge=1e-6, le=1e6)
    scaling: Literal["classic", "rslora", "shared"] = knob("classic", "how alpha and the rank make s",
                                                          options=("classic", "rslora", "shared"))
    targets: str | tuple[str, ...] = knob("all-linear", "names of the linear modules, or all-linear: every one but "
                                          "the output head, those narrower than the rank, and those that PEFT or the "
                                          "network passes over")
    modules_to_save: tuple[str, ...] = knob(("classifier",), "modules trained whole beside the adapters, where present")
    dropout: float = knob(0.0, "share of the adapters' input that is dropped while a client trains", ge=0, lt=1)
    dora: bool = knob(False, "DoRA: learn the length of each weight's rows beside their direction")
    init: Literal["kaiming", "pissa"] = knob("kaiming", "kaiming: A random and B zero; pissa: at the principal part of "
                                            "each weight, which is taken out of what stays frozen",
                                            options=("kaiming", "pissa"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora and self.init != "kaiming":
            raise RecipeError(f"LoRA.init = {self.init!r} is not allowed with dora; it must be 'kaiming'")

    @property
    def takes_base(self) -> bool:  # type: ignore[override]
        return not self.dora

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    @property
    def plain(self) -> bool:
        """Whether its change of a weight is s B A and no more, which methods on the factors count on."""
        return not self.dora and self.init == "kaiming"

    def scale(self, rank: int) -> float:
        """s for a client of this rank."""
        by = {"classic": rank, "rslora": math.sqrt(rank), "shared": self.rank}
        return self.alpha / by[self.scaling]

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        r = rank or self.rank
        tree: Tree = {}
        for path, module in self.sites(net).items():
            o, i = linear_size(module) or (0, 0)
            if r > min(o, i):
                raise RecipeError(f"space.rank = {r} is not allowed; '{path}' is {o} x {i}, so it must be "
                                  f"<= {min(o, i)}")
            bound = 1 / math.sqrt(i)  # Kaiming uniform with a = sqrt(5), as PEFT does
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            b_name, a_name = names_of(path)
            tree[a_name] = ((torch.rand(r, i, generator=rng) * 2 - 1) * bound).to(dtype)
            tree[b_name] = torch.zeros(o, r, dtype=dtype)
            if self.init == "pissa":
                tree[b_name], tree[a_name] = (x.to(dtype) / math.sqrt(self.scale(r)) for x in principal(module, r))
            if self.dora:
                tree[f"{PEFT}{path}{MAGNITUDE}"] = weight_of(module).detach().to(dtype).norm(dim=1)
        for name, p in self._saved(net).items():
            tree[PEFT + name] = p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
        return tree

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path, module in self.sites(net).items():
            patch(module, lambda frozen, path=path, module=module: adapted(frozen, path, module, stack, self))
        names = with_ties(net, self._saved(net))
        return install_params(net, stack, {path: PEFT + name for path, name in names.items()})

    def prepare(self, stack: Stack, trees: Sequence[Mapping[str, Tensor]]) -> None:
        first = next((n for n in trees[0] if n.endswith(".lora_A.weight")), None)
        scales = [self.scale(tree[first].shape[0]) for tree in trees] if first else [1.0]
        stack.extra["lora_scale"] = scales

    def trains(self, name: str) -> bool:
        return any(name.startswith(m + ".") or f".{m}." in name for m in self.modules_to_save)

    def composes(self, net: nn.Module) -> list[str]:
        return [] if self.dora else list(self.sites(net))  # it looks at the weight itself

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        weights = dict(net.named_parameters(remove_duplicate=False))
        rest = {n: t for n, t in theta.items() if not is_adapter(n)}
        return all(self._same(net, path, theta) for path in factors(theta)) and all(
            t.equal(weights[n.removeprefix(PEFT)].to(t)) for n, t in rest.items())

    def _same(self, net: nn.Module, path: str, theta: Mapping[str, Tensor]) -> bool:
        (b, a), module = factors(theta)[path], net.get_submodule(path)
        if self.init == "pissa":
            return all((x.to(t) / math.sqrt(self.scale(len(a)))).equal(t) for x, t in zip(
                principal(module, len(a)), (b, a), strict=True))
        if self.dora and not theta[f"{PEFT}{path}{MAGNITUDE}"].equal(weight_of(module).to(b).norm(dim=1)):
            return False
        return not b.any()

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        set_params(net, {n.removeprefix(PEFT): t for n, t in theta.items() if not is_adapter(n)})
        with torch.no_grad():
            for path in factors(theta):
                module = net.get_submodule(path)
                module.weight.copy_(self.weight(module, path, theta).to(module.weight))

    def weight(self, module: nn.Module, path: str, theta: Mapping[str, Tensor]) -> Tensor:
        """The module's weight as these trainables make it, lying as its own does; differentiable in them."""
        b, a = factors(theta)[path]
        own, scale = weight_of(module).to(b.dtype), self.scale(a.shape[0])
        change = scale * (b @ a)  # [o, i]
        if self.init == "pissa":
            a, b = with_start(a, b, module, scale)
            change = scale * (b @ a)
        out = own + change
        if self.dora:
            out = out * (theta[f"{PEFT}{path}{MAGNITUDE}"] / out.detach().norm(dim=1))[:, None]
        return out.T if isinstance(module, Conv1D) else out

    def peft_config(self, net: nn.Module, task: str) -> LoraConfig:
        paths = list(self.sites(net))
        saved = sorted({n.rpartition(".")[0] for n in self._saved(net)})
        alpha = self.alpha if self.scaling != "shared" else self.scale(self.rank) * self.rank
        return LoraConfig(
            r=self.rank, lora_alpha=alpha, use_rslora=self.scaling == "rslora", target_modules=paths,
            lora_dropout=self.dropout, use_dora=self.dora,
            modules_to_save=saved or None, task_type="CAUSAL_LM" if task in CAUSAL else "FEATURE_EXTRACTION",
            fan_in_fan_out=isinstance(net.get_submodule(paths[0]), Conv1D))

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[LoraConfig, Tree]:
        """Rank and alpha as the tensors have them: a server may grow ranks, and clients' ranks may differ.

        PEFT's PiSSA changes the base's weights; ours becomes an ordinary adapter of twice the rank, as its conversion.
        """
        config = self.peft_config(net, task)
        ranks = {path: a.shape[0] for path, (_, a) in factors(theta).items()}
        if self.init == "pissa" and ranks:
            out, r = dict(theta), next(iter(ranks.values()))
            for path, (b, a) in factors(theta).items():
                b_name, a_name = names_of(path)
                out[a_name], out[b_name] = with_start(a, b, net.get_submodule(path), self.scale(r))
            config.r, config.lora_alpha = 2 * r, self.scale(r) * (  # type: ignore[assignment]
                math.sqrt(2 * r) if self.scaling == "rslora" else 2 * r)
            return config, out
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
                "scaling": "rslora" if config.get("use_rslora") else "classic",
                **({"dora": True} if config.get("use_dora") else {}),
                **({"dropout": float(config["lora_dropout"])} if config.get("lora_dropout") else {})}

    def from_peft(self, config: Mapping[str, Any], tree: Tree, fresh: Mapping[str, Tensor]) -> Tree:
        """Where the adapter's scale differs from this space's, the ratio is multiplied into B."""
        out, ranks = dict(tree), {path: a.shape[0] for path, (_, a) in factors(fresh).items()}
        for path, (b, a) in factors(tree).items():
            pattern, rank = config.get("alpha_pattern") or {}, a.shape[0]
            alpha = pattern.get(get_pattern_key(list(pattern), path.removeprefix("body.")), config["lora_alpha"])
            theirs = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            r = ranks.get(path, rank)
            if self.init == "pissa":
                b0, a0 = factors(fresh)[path]
                out[names_of(path)[1]], b = without_start(a, b, a0, b0, path)
            out[names_of(path)[0]] = b * (theirs / self.scale(r))
        return out

    def sites(self, net: nn.Module) -> dict[str, nn.Module]:
        """The linear maps that get factors; none of them may be trained whole too."""
        found = find_linears(net, self.targets, "lora")
        if self.targets == "all-linear" and not (found := adaptable(net, found)):
            raise ModelError(f"lora: the model {type(net).__name__} has no linear map that PEFT takes and the "
                             "network calls; name some in space.targets, or use another space")
        if both := [p for p in found if self.trains(f"{p}.weight")]:
            raise ModelError(f"lora: '{both[0]}' is among space.targets = {self.targets!r} and in "
                             f"space.modules_to_save = {list(self.modules_to_save)}; a module has factors or is "
                             "trained whole, so name it in one of the two")
        if not self.plain and (odd := [p for p, m in found.items() if type(m) not in (nn.Linear, Conv1D)]):
            raise ModelError(f"lora: '{odd[0]}' is a {type(found[odd[0]]).__name__}, whose weight space.dora and "
                             "space.init = 'pissa' cannot look at; leave both out")
        wide = {p: m for p, m in found.items() if min(linear_size(m) or (0, 0)) >= self.rank}
        return wide if wide and self.targets == "all-linear" else found  # narrow gates have no place for factors

    def _saved(self, net: nn.Module) -> dict[str, nn.Parameter]:
        return saved_params(net, self.modules_to_save, self.trains)
