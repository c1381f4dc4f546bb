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
    """Whether sending fp32 products through oneDNN keeps fp32 accuracy here.

    It may really compute in bf16, and where it may, size and form decide: with Intel's AMX every batched product does,
    and of plain ones only the large.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))  # read at the first product
    rng = torch.Generator().manual_seed(0)
    with _onednn():
        return all(_error(rng, *size) <= 1e-5 for size in ((192, 256, 160), (1024, 256, 256), (64, 32, 32)))


def _error(rng: torch.Generator, m: int, k: int, n: int) -> float:
    """The largest error of [m, k] by [k, n], plain, batched, and as a linear map, by the largest entry."""
    a, b = torch.randn(m, k, generator=rng), torch.randn(k, n, generator=rng)
    exact = a.double() @ b.double()
    got = torch.stack([a @ b, torch.bmm(a[None], b[None])[0], F.linear(a, b.T.contiguous())])
    return float((got.double() - exact).abs().max() / exact.abs().max())


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


@functools.cache
def repeatable() -> None:
    """Make a CUDA card give the same bits for the same work, in this process; a few kernels are slower for it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


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
