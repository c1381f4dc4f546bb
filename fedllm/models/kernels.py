"""Kernel switches that make fp32 work on a CPU faster, each behind a check that the answer stays fp32."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.models.blocks import SHORT

PRIMITIVES = 64
"""Compiled products that oneDNN keeps, one for each shape: with its own 1024 each new length of a batch adds 0.3 MB."""


@functools.cache
def onednn_is_fp32() -> bool:
    """Whether sending fp32 products through oneDNN keeps fp32 accuracy here (it may really compute in bf16)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))  # read at the first product
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(192, 256, generator=rng), torch.randn(256, 160, generator=rng)
    exact = a.double() @ b.double()
    with _onednn():
        error = float(((a @ b).double() - exact).abs().max() / exact.abs().max())
    return error <= 1e-5


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def fast(device: torch.device, length: int, switch: bool = True) -> Iterator[None]:
    """Run a forward over sequences of `length` with the quickest kernels that pass their check."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(products(device, switch))
        if switch and device.type == "cpu" and length <= SHORT:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextlib.contextmanager
def products(device: torch.device, switch: bool = True) -> Iterator[None]:
    """The part of `fast` that a backward pass needs around it as well: which kernels multiply matrices."""
    with _onednn() if switch and device.type == "cpu" and onednn_is_fp32() else contextlib.nullcontext():
        yield


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep up to half a GB of what it frees, where the C library is glibc.

    Activations of a step are a few megabytes each. Handed back to the system after every step, they return as fresh
    pages, and faulting those in was 6 to 17 % of the CPU time of training.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 512 << 20)
        libc.mallopt(mmap_threshold, 64 << 20)


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen output head: one chunked pass gives the losses and dL/dh, and keeps no logits."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chunk: int) -> Tensor:
        """h [M, d], weight [V, d], y [M] -> losses [M]."""
        losses = torch.empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad = torch.empty_like(h) if h.requires_grad else None
        for at in range(0, h.shape[0], chunk):
            part, target = h[at : at + chunk].detach(), y[at : at + chunk]
            z = F.linear(part, weight, bias).to(losses.dtype)  # [m, V]
            hit, top = z.gather(1, target[:, None])[:, 0], z.amax(-1, keepdim=True)
            total = z.sub_(top).exp_().sum(-1)
            losses[at : at + chunk] = total.log() + top[:, 0] - hit
            if grad is not None:  # dL/dh = (softmax(z) - onehot(y)) W, divided by the total where it is narrow
                grad[at : at + chunk] = (z.to(h.dtype) @ weight).div_(total[:, None]).sub_(weight[target])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * d[:, None].to(grad.dtype), None, None, None, None


def frozen_head_loss(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chunk: int | None = None) -> Tensor:
    """Per-position cross-entropy [M] of hidden states [M, d] under a frozen head."""
    if chunk is None:  # on a CPU a chunk's logits stay in the cache: 4 MB of them
        chunk = max(128, (1 << 20) // weight.shape[0]) if h.device.type == "cpu" else 2048
    return FrozenHeadLoss.apply(h, weight, bias, y, chunk)
