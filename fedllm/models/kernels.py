"""Kernel switches that make fp32 work on a CPU faster, each behind a check that the answer stays fp32."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.core.switches import ONEDNN, PLAIN_ATTENTION, on
from fedllm.models.attention import SHORT
from fedllm.tasks.task import wide

PRIMITIVES = 64
"""Compiled products that oneDNN keeps, one for each shape: with its own 1024 each new length of a batch adds 0.3 MB."""

MANY, BLOCK = 8192, 1024
"""A vocabulary of more words than the first goes through the loss in blocks of the second."""


@functools.cache
def onednn_is_fp32() -> bool:
    """Whether sending fp32 products through oneDNN keeps fp32 accuracy here.

    It may really compute in bf16, and where it may, size and form decide: with Intel's AMX every batched product does,
    and of plain ones only the large.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))  # read at the first product
    rng = torch.Generator().manual_seed(0)
    with on(ONEDNN):
        return all(_error(rng, *size) <= 1e-5 for size in ((192, 256, 160), (1024, 256, 256), (64, 32, 32)))


def _error(rng: torch.Generator, m: int, k: int, n: int) -> float:
    """The largest error of [m, k] by [k, n], plain, batched, and as a linear map, by the largest entry."""
    a, b = torch.randn(m, k, generator=rng), torch.randn(k, n, generator=rng)
    exact = a.double() @ b.double()
    got = torch.stack([a @ b, torch.bmm(a[None], b[None])[0], F.linear(a, b.T.contiguous())])
    return float((got.double() - exact).abs().max() / exact.abs().max())


def fast(device: torch.device, length: int, switch: bool = True) -> AbstractContextManager[None]:
    """Run a forward over sequences of `length` with the quickest kernels that pass their check."""
    short = switch and device.type == "cpu" and length <= SHORT
    return on(*_products(device, switch), *([PLAIN_ATTENTION] if short else []))


def products(device: torch.device, switch: bool = True) -> AbstractContextManager[None]:
    """The part of `fast` that a backward pass needs around it as well: which kernels multiply matrices."""
    return on(*_products(device, switch))


def _products(device: torch.device, switch: bool) -> list[str]:
    return [ONEDNN] if switch and device.type == "cpu" and onednn_helps() else []


def onednn_helps() -> bool:
    """Whether fp32 products go through oneDNN: it keeps their accuracy, and the processor is not one of Intel's, where
    MKL is as quick, quicker for few rows, and holds no compiled product for each shape."""
    return not _intel() and onednn_is_fp32()


@functools.cache
def _intel() -> bool:
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "GenuineIntel" in facts.read_text()


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep up to half a GB of what it frees, where the C library is glibc.

    Activations of a step are a few megabytes each. Handed back to the system after every step, they return as fresh
    pages, and faulting those in was 6 to 17 % of the CPU time of training. Where the environment sets a threshold of
    glibc's own (as a federation's coordinator does, whose memory must not grow), it stays as set.
    """
    set_already = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if platform.libc_ver()[0] == "glibc" and not set_already:
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 512 << 20)
        libc.mallopt(mmap_threshold, 64 << 20)


def keep_no_freed_memory() -> None:
    """Let this process hand back whatever it frees of a megabyte and more at once, where the C library is glibc: for
    those that are several so that each is small."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 20)
        libc.mallopt(mmap_threshold, 1 << 20)
    give_back_freed_memory()


@contextlib.contextmanager
def freeing() -> Iterator[None]:
    """Hand back what is freed at once, and afterwards keep what `keep_freed_memory` keeps: for work that comes once and
    takes and frees large pieces of many sizes, between which the heap would grow by as much again."""
    keep_freed_memory()  # it is asked once, and would be while this lasts
    keep_no_freed_memory()
    try:
        yield
    finally:
        give_back_freed_memory()
        keep_freed_memory.__wrapped__()


def give_back_freed_memory() -> None:
    """Free what only refers to itself, and hand freed pages back to the system where the C library is glibc.

    Many threads that pass messages leave both behind: Python looks at old objects again when a quarter as many are new,
    and freed pages between what is kept are never used again. It takes some milliseconds after `gc.freeze`.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def repeatable() -> None:
    """Make a CUDA card give the same bits for the same work, in this process; a few kernels are slower for it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen output head: one chunked pass gives the losses and dL/dh, and keeps no logits.

    Words come block by block with a running maximum, so that no more than `chunk` x `words` logits ever exist.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chunk: int, words: int) -> Tensor:
        """h [M, d], weight [V, d], y [M] -> losses [M]."""
        losses = torch.empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        grad = torch.empty_like(h) if h.requires_grad else None
        for at in range(0, h.shape[0], chunk):
            part, target = h[at : at + chunk].detach(), y[at : at + chunk]
            top, total, hit, pull = _swept(part, weight, bias, target, words, grad is not None)
            losses[at : at + chunk] = total.log() + top - hit
            if grad is not None:  # dL/dh = (softmax(z) - onehot(y)) W, divided by the total where it is narrow
                grad[at : at + chunk] = pull.div_(total[:, None]).sub_(weight[target])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * d[:, None].to(grad.dtype), None, None, None, None, None


def _swept(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, words: int,
           pulls: bool) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Of rows h [m, d]: the largest logit, the sum of exp(z - largest), the target's logit, and with `pulls`
    exp(z - largest) W [m, d]."""
    top: Any = None
    total: Any = None
    hit: Any = None
    pull: Any = None
    for at in range(0, len(weight), words):
        w, b = weight[at : at + words], None if bias is None else bias[at : at + words]
        z = wide(F.linear(h, w, b))  # [m, words]
        inside = (y - at).clamp(0, len(w) - 1)[:, None]
        here, most = z.gather(1, inside)[:, 0], z.amax(-1)
        hit = here if hit is None else torch.where((y >= at) & (y < at + len(w)), here, hit)
        fade = None if top is None else (top - torch.maximum(top, most)).exp()
        top = most if top is None else torch.maximum(top, most)
        summed = z.sub_(top[:, None]).exp_().sum(-1)
        total = summed if fade is None else total.mul_(fade).add_(summed)
        if pulls:
            more = z.to(h.dtype)
            if pull is None:
                pull = more @ w if words >= len(weight) else wide(more @ w)
            elif pull.dtype == h.dtype:
                pull.mul_(fade[:, None]).addmm_(more, w)
            else:
                pull.mul_(fade[:, None]).add_(more @ w)
    return top, total, hit, pull


def frozen_head_loss(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, chunk: int | None = None,
                     words: int | None = None) -> Tensor:
    """Per-position cross-entropy [M] of hidden states [M, d] under a frozen head."""
    v = weight.shape[0]
    if words is None:  # a block's logits stay in the cache: 4 MB of them at most
        words = v if h.device.type != "cpu" or v <= MANY else BLOCK
    if chunk is None:
        chunk = max(128, (1 << 20) // words) if h.device.type == "cpu" else max(128, min(2048, (1 << 26) // v))
    return FrozenHeadLoss.apply(h, weight, bias, y, chunk, words)
