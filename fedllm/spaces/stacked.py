"""Stacked forms of a network's own parameters: one forward in which every lane has its own weights.

Linear, Conv1D, Embedding, LayerNorm and the RMS norms have a stacked form; any other module that holds a trainable
parameter (their subclasses too, which may do more) is called once for each lane, with the lane's rows; one that is made
of modules runs one lane at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.core.errors import ModelError
from fedllm.spaces.space import Stack, linear_size, patch

Own = Callable[[str], Tensor | None]
"""Parameter of the patched module ("weight", "bias") -> its stacked value [K, ...], or None where it is frozen."""


def install_params(net: nn.Module, stack: Stack, names: Mapping[str, str],
                   value: Callable[[str], Tensor | None] | None = None) -> bool:
    """Patch every module that owns one of the parameters; returns whether K > 1 lanes can run in one forward.

    `names` maps a parameter's path in the network to its name in the tree; tied parameters map to one name.
    `value` computes the stacked tensor from the tree's name (default: the tensor itself).
    """
    value = value or (lambda name: stack.tensors.get(name))
    stackable = True
    owned: dict[str, dict[str, str]] = {}
    for path, name in names.items():
        owner, _, leaf = path.rpartition(".")
        owned.setdefault(owner, {})[leaf] = name
    for owner, leaves in owned.items():
        module = net.get_submodule(owner)
        form = next((f for test, f in FORMS if test(module)), None)
        stackable &= form is not None or not list(module.children())  # what lies inside may be stacked itself
        patch(module, _site(module, leaves, stack, value, form or lane_by_lane(module)))
    return stackable


def _site(module: nn.Module, leaves: Mapping[str, str], stack: Stack, value: Callable[[str], Tensor | None],
          form: Callable[..., Tensor]) -> Callable[[Callable], Callable]:
    def make(frozen: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            own = {leaf: v for leaf, name in leaves.items() if (v := value(name)) is not None}
            return form(module, own, stack, *args, **kwargs) if own else frozen(*args, **kwargs)

        return forward

    return make


def linear(m: nn.Module, own: Mapping[str, Tensor], stack: Stack, x: Tensor) -> Tensor:
    """y_k = x_k W_k^T + b_k."""
    w, b = own.get("weight"), own.get("bias")
    flip = isinstance(m, Conv1D)  # its weight lies (in, out)
    shared_b = None if b is not None else m.bias
    size = linear_size(m)
    assert size is not None
    if w is None:
        y = F.linear(x, m.weight.T if flip else m.weight)
    else:
        w = w.to(x.dtype)
        y = torch.bmm(stack.lanes(x), w if flip else w.mT).reshape(*x.shape[:-1], size[0])  # [K, N, o]
    if b is not None:
        return (stack.lanes(y) + b.to(y.dtype)[:, None]).reshape(y.shape)
    return y if shared_b is None else y + shared_b


def embedding(m: nn.Embedding, own: Mapping[str, Tensor], stack: Stack, ids: Tensor) -> Tensor:
    """One lookup in the K tables laid end to end."""
    w = own["weight"]  # [K, V, d]
    if stack.k == 1:
        return F.embedding(ids, w[0], m.padding_idx).to(m.weight.dtype)
    if ids.shape[0] != stack.rows:  # position and type ids come as one row for all
        ids = ids.expand(stack.rows, *ids.shape[1:])
    shift = torch.arange(stack.k, device=ids.device).repeat_interleave(ids.shape[0] // stack.k) * w.shape[1]
    y = F.embedding(ids + shift.view(-1, *[1] * (ids.dim() - 1)), w.flatten(0, 1)).to(m.weight.dtype)
    return y if m.padding_idx is None else torch.where((ids == m.padding_idx)[..., None], y.detach(), y)


def layer_norm(m: nn.LayerNorm, own: Mapping[str, Tensor], stack: Stack, x: Tensor) -> Tensor:
    """Normalize once, then each lane's own gain and shift."""
    y = stack.lanes(F.layer_norm(x, m.normalized_shape, None, None, m.eps))
    return _affine(y, own.get("weight"), m.weight, own.get("bias"), m.bias).reshape(x.shape)


def rms_norm(m: nn.Module, own: Mapping[str, Tensor], stack: Stack, x: Tensor) -> Tensor:
    """x / rms(x), computed in fp32 whatever the type, as the Llama family does, then each lane's own gain."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _eps(m))
    return _affine(stack.lanes(y.to(x.dtype)), own.get("weight"), None, None, None).reshape(x.shape)


def _affine(y: Tensor, w: Tensor | None, shared_w: Tensor | None, b: Tensor | None, shared_b: Tensor | None) -> Tensor:
    gain = w.to(y.dtype)[:, None] if w is not None else shared_w
    shift = b.to(y.dtype)[:, None] if b is not None else shared_b
    y = y if gain is None else y * gain
    return y if shift is None else y + shift


def lane_by_lane(module: nn.Module) -> Callable[..., Any]:
    """Any other module: called with each lane's parameters in it on that lane's rows."""
    bare = copy.copy(module)  # shares everything but the forward, which is the module's own
    bare.__dict__.pop("forward", None)

    def form(_: nn.Module, own: Mapping[str, Tensor], stack: Stack, *args: Any, **kwargs: Any) -> Any:
        def call(k: int, *part: Any, **named: Any) -> Any:
            weights = {leaf: v[k].to(bare._parameters[leaf].dtype) for leaf, v in own.items()}
            return torch.func.functional_call(bare, weights, part, named)

        if stack.k == 1:
            return call(0, *args, **kwargs)
        each = [call(k, *(_lane(x, k, stack) for x in args), **{n: _lane(x, k, stack) for n, x in kwargs.items()})
                for k in range(stack.k)]
        if not all(isinstance(y, Tensor) for y in each):
            raise ModelError(f"{type(module).__name__} gives more than one tensor")
        return torch.cat(each)

    return form


def _lane(x: Any, k: int, stack: Stack) -> Any:
    """Lane `k`'s rows of an argument; position ids come as one row for all."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    x = x.expand(stack.rows, *x.shape[1:]) if len(x) == 1 else x
    return x.unflatten(0, (stack.k, -1))[k]


def _eps(m: nn.Module) -> float:
    return float(m.__dict__.get("variance_epsilon") or m.__dict__.get("eps") or 1e-6)


def _is_rms_norm(m: nn.Module) -> bool:
    """True when the module computes just what `rms_norm` does (Gemma's 1 + w, for example, does not)."""
    if "RMSNorm" not in type(m).__name__ or [n for n, _ in m.named_parameters()] != ["weight"]:
        return False
    w = next(m.parameters())
    x = torch.linspace(-1, 2, w.numel(), device=w.device, dtype=w.dtype)[None]
    bare = copy.copy(m)
    bare.__dict__.pop("forward", None)
    with torch.no_grad():
        try:
            return all(torch.allclose(rms_norm(m, {"weight": w[None]}, Stack(k=1), x * size), bare(x * size), atol=1e-5)
                       for size in (1e-3, 1.0, 1e3))
        except TypeError:  # it wants more than one tensor
            return False


FORMS: list[tuple[Callable[[nn.Module], bool], Callable[..., Tensor]]] = [
    (lambda m: type(m) in (nn.Linear, Conv1D), linear),
    (lambda m: type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq, embedding),
    (lambda m: type(m) is nn.LayerNorm, layer_norm),
    (_is_rms_norm, rms_norm),
]
