"""Small networks that are built and not loaded: by name, with the sizes that a recipe and its rows ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedllm.core.errors import RecipeError
from fedllm.core.rng import torch_stream
from fedllm.models.decider import DECIDER
from fedllm.models.load import DTYPES, place_of
from fedllm.models.model import Model
from fedllm.models.pairs import GRID, PairNet, Resized
from fedllm.models.policy import POLICY
from fedllm.models.series import SeriesNet
from fedllm.models.shop import ShopNet, codes_of
from fedllm.spaces.space import Space
from fedllm.tasks.registry import task_of


@dataclass(frozen=True)
class Made:
    """What such a network is built by."""

    width: int = 32
    depth: int = 2
    labels: tuple[str, ...] = ()
    sizes: Mapping[str, int] | None = None
    """Of its rows: past, horizon, variables and target of a series."""

    codes: tuple[int, int] = (8, 32)
    prompts: int = 32
    branch: bool = True
    picture: int = 16

    @property
    def heads(self) -> int:
        return max(1, self.width // 8)


def series(by: Made, rng: torch.Generator) -> nn.Module:
    """Forecasts of windows (`data.windows`)."""
    if by.sizes is None:
        raise RecipeError("model.name = 'series' needs data.windows, which says how long windows are and of what")
    return SeriesNet(by.sizes["variables"], by.sizes["past"], by.sizes["horizon"], by.sizes["target"], by.width,
                     by.depth, by.heads, rng)


def shop(by: Made, rng: torch.Generator) -> nn.Module:
    """Rankings of a catalog, whose items' names are the labels."""
    if len(by.labels) < 2:
        raise RecipeError(f"model.name = 'shop' ranks the items of a catalog, and data.labels holds {len(by.labels)}; "
                          "allowed is two or more")
    return ShopNet(codes_of(by.labels, *by.codes), by.codes[1], by.width, by.depth, by.heads, by.prompts, by.branch,
                   rng)


def pairs(by: Made, rng: torch.Generator) -> nn.Module:
    """Labels of pictures, of texts, and of both."""
    if by.picture % GRID:
        raise RecipeError(f"model.picture = {by.picture} is not allowed; it must be a multiple of {GRID}")
    return PairNet(len(by.labels), by.width, by.depth, by.heads, by.picture, by.prompts, rng)


NETS: Mapping[str, tuple[str, Callable[[Made, torch.Generator], nn.Module]]] = {
    "series": ("forecast", series), "shop": ("next_item", shop), "pairs": ("pairs", pairs)}
"""Name -> the task that it is for, and how it is built."""
BUILT = ("series", "pairs")
"""Networks of tasks that no model of a folder is for."""
NAMES = (POLICY, DECIDER, *NETS)
"""Of all models that are built and not loaded."""


def check_made(name: str, task: str) -> None:
    """RecipeError for a network that is built for another task, and for a task that needs one."""
    if name in NETS and NETS[name][0] != task:
        raise RecipeError(f"model.name = {name!r} and data.task = {task!r} do not fit together: it is built for "
                          f"data.task = {NETS[name][0]!r}")
    own = [n for n, (t, _) in NETS.items() if t == task]
    if own and name not in own and task_of(task).net in BUILT:
        raise RecipeError(f"data.task = {task!r} and model.name = {name!r} do not fit together: the task's rows are "
                          f"read by model.name = {own[0]!r}, and by nothing that is loaded")


def make_net(name: str, by: Made, space: Space, *, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Model:
    """The network with `space` installed, its weights drawn by the seed."""
    if by.width % 8:
        raise RecipeError(f"model.width = {by.width} is not allowed; it must be a multiple of 8")
    task, build = NETS[name]
    net = build(by, torch_stream(seed, name))
    return Model(net.to(DTYPES[dtype]).to(place_of(device)), None, task, space, labels=by.labels, seed=seed,
                 fast_kernels=False, name=name, images=Resized(by.picture))

