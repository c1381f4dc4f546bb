"""What privacy costs: masks, secure sums, encryption, per-example clipping and coded replies, each in a row."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from evidence.bench.rows import Row, row
from evidence.bench.server import ratio, turns
from evidence.bench.simulation import Size, net_of
from evidence.rigs.privacy import inversion, sums
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.local.fit import run_fits
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.privacy._ring import decode, encode, mask_
from fedllm.spaces import make_space
from fedllm.wire import codec
from fedllm.wire.codec_quant import CodecQuant

VALUES = 1_000_000


def privacy() -> list[Row]:
    """All rows; encryption only where TenSEAL is installed."""
    return [*masks(), *secure_sums(), *private_step(), *coded(), *encryption()]


def masks(repeats: int = 7) -> list[Row]:
    """Fixed point, one AES mask and back, per byte of an fp32 update of 4 MB; the mask alone; numpy's Philox."""
    x = {"x": torch.randn(VALUES, generator=torch.Generator().manual_seed(0))}
    key, ring = secrets.token_bytes(16), torch.zeros(VALUES, dtype=torch.int32)
    philox = np.random.Generator(np.random.Philox(0))

    def whole() -> None:
        coded, layout = encode(x, 20, 64.0, "bench")
        decode(mask_(coded, [(key, 1)]), layout, 20, 1)

    times = turns({"codec and mask": whole, "mask": lambda: mask_(ring, [(key, 1)]),
                   "philox": lambda: philox.integers(0, 2**32, VALUES, dtype=np.uint32)}, repeats)
    speed = {n: round(4 * VALUES / median(t) / 1e9, 2) for n, t in times.items()}
    return [row("privacy/masks with fixed point and back", speed["codec and mask"], "GB/s", "a gate of 2 GB/s", 2,
                gb_per_cpu_s=speed)]


def secure_sums(size: int = 100_000) -> list[Row]:
    """A round of ten clients with an update of 100,000 values: a client's CPU-seconds and bytes a value."""
    rows = []
    for layer in ("secagg", "secagg_plus"):
        for dropped in (0.0, 0.3):
            got = sums(layer, 0, size=size, dropped=dropped)
            rows.append(row(f"privacy/{layer} round, {dropped:.0%} dropped", got["quanta"], "of the declared error",
                            "plain mean", 1.0, least=True, ms_a_client=round(1e3 * got["seconds"], 2),
                            bytes_per_value=round(got["bytes_per_value"], 3), answered=int(got["answered"])))
    return rows


def private_step(batch: int = 16, repeats: int = 5) -> list[Row]:
    """One step of LoRA on 16 rows of 64 tokens: per-example clipping and noise over the plain step."""
    size = Size("S B16 T64", 128, 2, ("q_proj", "v_proj"), clients=1, steps=3, batch=batch)
    model = Model(net_of(size), None, "generation", make_space("lora", rank=8, targets=size.targets), seed=0)
    rng, rows = numpy_stream(0, "bench dp"), []
    for _ in range(batch):
        ids = rng.integers(0, size.vocabulary, size.length).astype(np.int32)
        labels = ids.astype(np.int64)
        labels[0] = -100
        rows.append(Encoded(ids, labels, size.length - 1))
    spec, plan = LocalSpec(optimizer="sgd", lr=0.1, steps=3, batch_size=batch), [np.arange(batch)] * 3
    theta = model.initial()

    def step(private: bool) -> Callable[[], Any]:
        def do() -> Any:
            noise = Private(1.0, 1.0, batch, torch.Generator().manual_seed(0)) if private else None
            return run_fits([Fit("c", model, theta, None, rows, plan, spec, private=noise)], Limits())

        return do

    times = turns({"private": step(True), "plain": step(False)}, repeats, floor=0.3)
    return [row("privacy/dp_sgd step, B16 T64", ratio(times, "private", "plain"), "times", "the same step without", 1.1,
                1.0, least=True, ms={n: round(1e3 * median(t) / 3, 2) for n, t in times.items()})]


def coded(size: int = 896) -> list[Row]:
    """Bytes on the wire of a LoRA update of 896 tensors in int8 and int4, over bf16's."""
    rng, rows = torch.Generator().manual_seed(0), []
    update = {f"delta/layers.{i}.lora.weight": 0.01 * torch.randn(8, 512, generator=rng) for i in range(size)}
    half = codec.size({k: v.bfloat16() for k, v in update.items()})
    for bits, gate in ((8, 0.52), (4, 0.28)):
        layer, client = CodecQuant(bits=bits), _Client()
        sent = layer.quantized(update, client)
        rows.append(row(f"privacy/codec_quant int{bits} bytes", codec.size(sent) / half, "times", "bf16", gate,
                        least=True, bytes={"bf16": half, f"int{bits}": codec.size(sent)}))
    return rows


def encryption() -> list[Row]:
    """FedML-HE at p = 0.1, 0.5, 1: bytes and seconds of a round, and what an inversion finds of a row of 8 tokens."""
    open_to_all, rows = inversion("fedavg", 0), []
    for p in (0.0, 0.1, 0.5, 1.0):
        got = open_to_all if p == 0 else inversion("fedml_he", 0, knobs={"encrypt_ratio": p})
        extra = {k: round(got[k], 3) for k in ("random_recall", "rows_recall", "random_rows_recall") if k in got}
        rows.append(row(f"privacy/fedml_he p={p:g}", got["bytes"] / got["values"], "bytes a value", "4 plain",
                        bytes_up=int(got["bytes"]), round_s=round(got["round_seconds"], 3),
                        inversion_recall=round(got["recall"], 3), **extra))
    return rows


class _Client:
    """What a codec touches of a client."""

    id, n, memory = "bench", 1, {}

    def rng(self, owner: str) -> np.random.Generator:
        return numpy_stream(0, owner)
