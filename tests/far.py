"""A device that is not the CPU, for machines without a card: tensors there refuse to meet tensors that lie here.

`far()` makes torch believe in one ("hpu"). A tensor there is a wrapper around one that is computed on the CPU, so that
results can be compared; an operation on tensors of both sides is an error, as it is on a card.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("hpu", 0)


class There(Tensor):
    """A tensor on the far device; `held` is its value."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        new = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device="cpu",
                                            storage_offset=held.storage_offset(), requires_grad=held.requires_grad)
        new.held = held
        return new

    def __init__(self, held: Tensor) -> None:
        pass

    def __repr__(self) -> str:
        return f"There({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args[1:], *kwargs.values()]
        if func == Tensor.device.__get__:
            return THERE
        if func is Tensor.tolist:
            return args[0].detach().held.tolist()
        if func is Tensor.to and given and isinstance(given[0], There):  # x.to(y): where y lies, and of its type
            return args[0].to(given[0].dtype) if isinstance(args[0], There) else args[0].to(THERE, given[0].dtype)
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("a tensor of another device is no array")
        if func is Tensor.cpu or (func is Tensor.to and any(_is_here(x) for x in given)):
            kind = [x if isinstance(x, torch.dtype) else x.dtype for x in given if isinstance(x, torch.dtype | Tensor)]
            back = Back.apply(args[0])
            return back.to(kind[0]) if kind else back
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _is_here(x: Any) -> bool:
    if isinstance(x, Tensor):
        return not isinstance(x, There)
    return isinstance(x, torch.device | str) and torch.device(x).type == "cpu"


class Back(torch.autograd.Function):
    """From there to here, and its gradient the other way."""

    @staticmethod
    def forward(ctx: Any, x: There) -> Tensor:
        return x.detach().held.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return There(d)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, where its tensors lie."""
    name, device = func._schema.name, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    here = [x for x in tensors if not isinstance(x, There) and x.dim()]
    indices = all(x.dtype in (torch.int64, torch.bool) for x in here)  # a card takes those from here, and copies
    if there and here and name != "aten::copy_" and not (name.startswith("aten::index") and indices):
        raise RuntimeError(f"{name}: tensors {[tuple(x.shape) for x in here]} lie here and others there")
    if device is not None:
        there = there or torch.device(device).type == THERE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) and there else x, out)


class Operations(TorchDispatchMode):
    """Makes tensors there where an operation asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """`torch.tensor(..., device=there)`, which asks no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == THERE.type:
            made = torch.tensor(*args, **{k: v for k, v in kwargs.items() if k != "device"})
            return made if isinstance(made, There) else There(made)
        return func(*args, **kwargs)


def moved(net: nn.Module) -> nn.Module:
    """The network there: its parameters and buffers, tied ones still tied."""
    done: dict[int, Tensor] = {}
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, There):
                module._parameters[name] = done.setdefault(id(p), nn.Parameter(There(p.detach()), requires_grad=False))
        for name, b in module._buffers.items():
            if b is not None and not isinstance(b, There):
                module._buffers[name] = There(b)
    return net


@contextlib.contextmanager
def far() -> Iterator[None]:
    """Inside, models that are made lie there."""
    from fedllm.models.model import Model

    stub = types.ModuleType("torch.hpu")
    stub._lazy_init = lambda: None
    stub.is_available = lambda: False
    before, begin, inference = sys.modules.get("torch.hpu"), Model.__init__, torch.inference_mode
    sys.modules["torch.hpu"] = torch.hpu = stub
    Model.__init__ = lambda self, net, *args, **kwargs: begin(self, moved(net), *args, **kwargs)
    torch.inference_mode = torch.no_grad  # wrappers are not seen in inference mode
    try:
        with Operations(), Literals():
            yield
    finally:
        Model.__init__, torch.inference_mode = begin, inference
        del torch.hpu
        if before is None:
            del sys.modules["torch.hpu"]
