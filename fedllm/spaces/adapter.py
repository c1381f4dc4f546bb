"""Bottleneck adapters after each block's feed-forward part (Houlsby et al., ICML 2019; Pfeiffer et al., 2021)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedllm.core.errors import ModelError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree
from fedllm.spaces.params import saved_params
from fedllm.spaces.space import Space, Stack, patch
from fedllm.spaces.stacked import install_params

SITES = r"\.(?:layers|layer|h|blocks)\.\d+\.(?:mlp|output|feed_forward)$"


@dataclass(frozen=True)
class Adapter(Space):
    """h + up(relu(down(h))) with a bottleneck of `size`; `up` starts at zero, so the model starts unchanged."""

    stays = "its bottlenecks are modules of their own"
    over_packed = True
    by_token = True

    size: int = knob(16, "width of the bottleneck", ge=1)
    modules_to_save: tuple[str, ...] = knob(("classifier",), "modules trained whole beside the adapters, where present")

    def _sites(self, net: nn.Module) -> list[str]:
        found = [p for p, _ in net.named_modules() if re.search(SITES, "." + p)]
        if not found:
            raise ModelError("adapter: the model has no blocks with a part named mlp, output or feed_forward")
        return found

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        m, tree = self.size, {}
        for path in self._sites(net):
            d = _width(net, path)
            tree[f"{path}.adapter_down.weight"] = (torch.rand(m, d, generator=rng) * 2 - 1) / math.sqrt(d)
            tree[f"{path}.adapter_down.bias"] = torch.zeros(m)
            tree[f"{path}.adapter_up.weight"] = torch.zeros(d, m)
            tree[f"{path}.adapter_up.bias"] = torch.zeros(d)
        return tree | {n: p.detach().float().clone() for n, p in self._saved(net).items()}

    def install(self, net: nn.Module, stack: Stack) -> bool:
        for path in self._sites(net):
            patch(net.get_submodule(path), lambda frozen, path=path: self._adapted(frozen, path, stack))
        return install_params(net, stack, {n: n for n in self._saved(net)})

    def _saved(self, net: nn.Module) -> dict[str, nn.Parameter]:
        return saved_params(net, self.modules_to_save, self.trains)

    def composes(self, net: nn.Module) -> list[str]:
        return self._sites(net)

    def trains(self, name: str) -> bool:
        return any(name.startswith(m + ".") for m in self.modules_to_save)

    def inner(self, z: Tensor, path: str, stack: Stack, rows: int) -> Tensor:
        """What happens in the bottleneck: z [K, N, m] -> [K, N, m], N the tokens of a lane's `rows` rows."""
        return F.relu(z)

    def alone(self, h: Tensor, path: str, stack: Stack) -> Tensor:
        """h + up(relu(down(h))) of the adapter at `path` [K*B, ..., d], without the block that it follows."""
        keys = [f"{path}.adapter_{p}" for p in ("down.weight", "down.bias", "up.weight", "up.bias")]
        down, down_b, up, up_b = (stack.tensors[k].to(h.dtype) for k in keys)
        x = stack.lanes(h)  # [K, N, d]
        z = self.inner(torch.baddbmm(down_b[:, None], x, down.mT), path, stack, h.shape[0] // stack.k)
        return (x + torch.baddbmm(up_b[:, None], z, up.mT)).reshape(h.shape)

    def _adapted(self, frozen: Any, path: str, stack: Stack) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            whole = frozen(*args, **kwargs)
            if f"{path}.adapter_down.weight" not in stack.tensors:
                return whole
            h = whole[0] if isinstance(whole, tuple) else whole  # experts give their router's scores beside
            y = self.alone(h, path, stack)
            return (y, *whole[1:]) if isinstance(whole, tuple) else y

        return forward


def _width(net: nn.Module, path: str) -> int:
    """What the part at `path` gives: the width of the hidden states, where the config says it."""
    config = net.config.get_text_config() if isinstance(net.config, PretrainedConfig) else net.config
    outs = [m.out_features for m in net.get_submodule(path).modules() if isinstance(m, nn.Linear)]
    return getattr(config, "hidden_size", None) or outs[-1]
