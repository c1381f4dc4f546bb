"""Block-wise quantized updates: 8, 4 or 2 bits a value and one bfloat16 scale a block."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload
from fedllm.wire.codec import DTYPES, NAMES

log = logging.getLogger(__name__)
OWN = "codec_quant/"


@dataclass(frozen=True)
class CodecQuant(Knobs, Layer):
    """Quantizes what clients send up (QSGD's stochastic rounding, Alistarh et al. 2017; blocks as in Dettmers et al.).

    Each block of `block` values of a tensor has one scale s = max|x| / (2^(bits-1) - 1). Error per value: at most s/2
    (nearest), below s and zero on average (stochastic), below s and never longer (toward_zero: a clip that was applied
    above still holds, so `dp_fedavg` may stand above it). Small tensors go as they are.
    """

    bits: int = knob(8, "bits a value", options=(2, 4, 8))
    block: int = knob(128, "values that share a scale; a multiple of 8", ge=8)
    mode: Literal["nearest", "stochastic", "toward_zero"] = knob("nearest", "how values are rounded",
                                                                options=("nearest", "stochastic", "toward_zero"))
    skip_below: int = knob(1024, "tensors with fewer values are sent as they are", ge=0)

    @property
    def algebra(self) -> Algebra:  # type: ignore[override]
        return Algebra("codec", additive=False, contracts=self.mode == "toward_zero",
                       instead="secagg's own quantum, or codec_powersgd, whose messages add up")

    def server(self, ask: Any, state: Any) -> Any:
        if isinstance(ask.owner, Layer):
            return (yield ask)
        return (yield ask.coded(dequantized))

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        reply = call(msg)
        return reply if isinstance(fn.__self__, Layer) else self.quantized(reply, client)

    def quantized(self, reply: Payload, client: Any) -> dict[str, Any]:
        """The reply with its large float tensors packed into one vector of bytes and one of scales."""
        big = {k: v for k, v in reply.items()
               if isinstance(v, Tensor) and v.is_floating_point() and v.numel() >= max(1, self.skip_below)}
        if not big:
            log.warning("codec_quant found nothing to quantize: every tensor has fewer than %d values", self.skip_below)
            return dict(reply)
        rng = client.rng("codec_quant") if self.mode == "stochastic" else None
        parts = [self._pack(key, v, rng) for key, v in big.items()]
        rest = {k: v for k, v in reply.items() if k not in big}
        return rest | {OWN + "q": torch.cat([q for q, _ in parts]), OWN + "s": torch.cat([s for _, s in parts]),
                       OWN + "form": [self.bits, self.block],
                       OWN + "names": [[k, NAMES[v.dtype], *v.shape] for k, v in big.items()]}

    def _pack(self, key: str, v: Tensor, rng: Any) -> tuple[Tensor, Tensor]:
        top = 2 ** (self.bits - 1) - 1
        x = v.detach().float().reshape(-1)
        n = len(x)
        blocks = torch.nn.functional.pad(x, (0, -n % self.block)).view(-1, self.block)
        largest = blocks.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            raise PayloadError(f"codec_quant: '{key}' holds NaN or infinity")
        # bfloat16 keeps the range of tiny updates; rounded up, so that no value falls outside of the levels
        s = (largest / top * (1 + 2**-7)).to(torch.bfloat16)
        y = blocks / s.float().clamp(min=1e-38)[:, None]
        if rng is not None:  # floor(y + U[0, 1)): E[q] = y
            y = (y + torch.from_numpy(rng.random(y.shape, dtype="float32"))).floor_()
        else:
            y = y.trunc() if self.mode == "toward_zero" else y.round()
        return packed((y.clamp_(-top, top) + top).to(torch.uint8).view(-1), self.bits), s


def packed(q: Tensor, bits: int) -> Tensor:
    """Levels (uint8) of `bits` each -> bytes; their number is a multiple of 8."""
    per = 8 // bits
    if per == 1:
        return q
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    return (q.view(-1, per) << shifts).sum(1, dtype=torch.uint8)


def unpacked(b: Tensor, bits: int) -> Tensor:
    """Bytes -> levels."""
    per = 8 // bits
    if per == 1:
        return b
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    return ((b[:, None] >> shifts) & (2**bits - 1)).view(-1)


def dequantized(reply: Payload) -> dict[str, Any]:
    """The reply as it was, up to rounding; raises PayloadError for anything malformed."""
    if OWN + "q" not in reply:
        return dict(reply)
    out = {k: v for k, v in reply.items() if not k.startswith(OWN)}
    try:
        bits, block = (int(x) for x in reply[OWN + "form"])
        if bits not in (2, 4, 8) or block < 8 or block % 8:
            raise ValueError(f"bits {bits}, block {block}")
        top, at, at_s = 2 ** (bits - 1) - 1, 0, 0
        for name, dtype, *shape in reply[OWN + "names"]:
            n = math.prod(shape)
            count = -(-n // block)
            levels = unpacked(reply[OWN + "q"][at : at + count * block * bits // 8], bits)
            s = reply[OWN + "s"][at_s : at_s + count].float()
            x = (levels.view(count, block).float() - top) * s[:, None]  # x = q s
            out[name] = x.view(-1)[:n].view(tuple(shape)).to(DTYPES[dtype])
            at, at_s = at + count * block * bits // 8, at_s + count
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PayloadError(f"a quantized reply is malformed: {error}") from None
    return out
