"""IA3: learned vectors that rescale keys, values and feed-forward activations (Liu et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import IA3Config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.params import saved_params
from fedllm.spaces.space import CAUSAL, PEFT, Space, Stack, find_linears, linear_size, patch, set_params
from fedllm.spaces.stacked import install_params

SCALED = ("k_proj", "v_proj", "key", "value", "down_proj", "output.dense", "c_attn", "c_proj")
FEEDFORWARD = ("down_proj", "output.dense", "c_proj")


@dataclass(frozen=True)
class IA3(Space):
    """Multiply the output of `targets` by a vector; for those in `feedforward` multiply the input instead."""

    stays = ""
    by_token = True
    peft = "IA3"

    targets: str | tuple[str, ...] = knob(SCALED, "linear modules that get a vector (those present)")
    feedforward: tuple[str, ...] = knob(FEEDFORWARD, "which of them are scaled at their input")
    modules_to_save: tuple[str, ...] = knob(("classifier",), "modules trained whole beside the vectors, where present")

    def _input_side(self, path: str) -> bool:
        return any(path.endswith("." + f) for f in self.feedforward) and "attention" not in path

    def _sites(self, net: nn.Module) -> dict[str, nn.Module]:
        found = find_linears(net, self.targets, "ia3", some=self.targets == SCALED)
        return {p: m for p, m in found.items() if not (p.endswith(".output.dense") and "attention" in p)}

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        tree: Tree = {}
        for path, module in self._sites(net).items():
            o, i = linear_size(module) or (0, 0)
            tree[f"{PEFT}{path}.ia3_l"] = torch.ones((1, i) if self._input_side(path) else (o, 1))
        return tree | {PEFT + n: p.detach().float().clone() for n, p in self._saved(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path, module in self._sites(net).items():
            patch(module, lambda f, path=path: _scaled(f, f"{PEFT}{path}.ia3_l", self._input_side(path), stack))
        return install_params(net, stack, {n: PEFT + n for n in self._saved(net)})

    def trains(self, name: str) -> bool:
        return any(name.startswith(m + ".") for m in self.modules_to_save)

    def _saved(self, net: nn.Module) -> dict[str, nn.Parameter]:
        return saved_params(net, self.modules_to_save, self.trains)

    def composes(self, net: nn.Module) -> list[str]:
        return list(self._sites(net))

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        weights = dict(net.named_parameters(remove_duplicate=False))
        return all(bool((t == 1).all()) if n.endswith(".ia3_l") else t.equal(weights[n.removeprefix(PEFT)].to(t))
                   for n, t in theta.items())

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        set_params(net, {n.removeprefix(PEFT): t for n, t in theta.items() if not n.endswith(".ia3_l")})
        with torch.no_grad():
            for name in [n for n in theta if n.endswith(".ia3_l")]:
                module, v = net.get_submodule(name.removeprefix(PEFT).removesuffix(".ia3_l")), theta[name]
                module.weight.mul_((v.T if isinstance(module, Conv1D) else v).to(module.weight))  # rows or columns
                if v.shape[1] == 1 and module.bias is not None:
                    module.bias.mul_(v[:, 0].to(module.bias))

    @classmethod
    def peft_knobs(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        targets = config["target_modules"]
        return {"targets": targets if isinstance(targets, str) else sorted(targets),
                "feedforward": sorted(config.get("feedforward_modules") or []),
                "modules_to_save": config.get("modules_to_save") or ["classifier"]}

    def peft_config(self, net: nn.Module, task: str) -> IA3Config:
        sites = list(self._sites(net))
        return IA3Config(target_modules=sites, feedforward_modules=[p for p in sites if self._input_side(p)],
                         task_type="CAUSAL_LM" if task in CAUSAL else "FEATURE_EXTRACTION")


def _scaled(frozen: Any, name: str, input_side: bool, stack: Stack) -> Any:
    def forward(x: Tensor) -> Tensor:
        v = stack.tensors.get(name)  # [K, o, 1] or [K, 1, i]
        if v is None:
            return frozen(x)
        gain = v.reshape(stack.k, 1, -1).to(x.dtype)
        if input_side:
            return frozen((stack.lanes(x) * gain).reshape(x.shape))
        y = frozen(x)
        return (stack.lanes(y) * gain).reshape(y.shape)

    return forward
