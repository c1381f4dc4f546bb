"""Top-k updates with error feedback: the largest entries go now, the rest waits at the client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload, alike
from fedllm.wire.codec import DTYPES, NAMES

OWN = "codec_topk_ef/"
MORE, LEAST = 16, 1 << 22
"""A whole reply has at most so many entries, and so many times those of the message that it answers."""


@dataclass(frozen=True)
class CodecTopKEF(Knobs, Layer):
    """Top-k with memory (Stich et al. 2018; Karimireddy et al. 2019): u = D + beta e, send top-k(u), e <- u - sent.

    D is what the method sends, or its change where clients answer with what they were told (weights). Indices go as
    gaps, bitmap or raw numbers, whichever is shortest. The residue lives in the client's memory; what was sent is
    kept until the server says, in its next message, that it arrived, and comes back into the residue if it did not.
    """

    density: float = knob(0.01, "share of entries that is sent", gt=0, le=1)
    scope: Literal["global", "per_tensor"] = knob("global", "where the largest are sought",
                                                  options=("global", "per_tensor"))
    values: Literal["float32", "bfloat16"] = knob("float32", "type of sent values; the residue takes the rounding",
                                                  options=("float32", "bfloat16"))
    decay: float = knob(1.0, "beta, how much of the residue is kept from round to round", ge=0, le=1)
    error_feedback: bool = knob(True, "False: what is not sent is lost, and a clip that was applied above still holds")

    @property
    def algebra(self) -> Algebra:  # type: ignore[override]
        return Algebra("codec", additive=False, contracts=not self.error_feedback and self.values == "float32",
                       instead="codec_powersgd, whose messages add up, or error_feedback: false under dp_fedavg")

    def init(self) -> dict[str, Any]:
        return {"taken": {}}

    def server(self, ask: Any, state: Any) -> Any:
        if isinstance(ask.owner, Layer):
            return (yield ask)
        common, phase = alike(ask.msgs), ask.phase
        taken = state["taken"].setdefault(phase, [])
        told = {c: {OWN + "change": sorted(common), OWN + "taken": c in taken} for c in ask.msgs}
        msgs = {c: {**m, **told[c]} for c, m in ask.msgs.items()}
        most = room_for(ask.msgs)
        out = yield ask.coded(lambda reply: dense(reply, common, most), msgs=msgs)
        lost = {c for c in ask.msgs if c not in out.answered}
        state["taken"][phase] = sorted({*state["taken"][phase], *out.answered} - lost)  # asks may run side by side
        return out

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "change" not in msg:
            return call(msg)
        plain = {k: v for k, v in msg.items() if not k.startswith(OWN)}
        reply = call(plain)
        shift = {k: plain[k] for k in msg[OWN + "change"] if k in reply}
        d = {k: v.detach().float() - shift[k].float() if k in shift else v.detach().float()
             for k, v in reply.items() if isinstance(v, Tensor) and v.is_floating_point()}
        phase = f"{type(fn.__self__).__name__}.{fn.__name__}"
        u = torch.cat([x.reshape(-1) for x in d.values()]) if d else torch.zeros(0)
        if self.error_feedback and (kept := client.memory.get(OWN + phase)) and len(kept["rest"]) == len(u):
            # e is what stayed behind, and also what was sent and got lost
            e = kept["rest"] if msg[OWN + "taken"] else kept["rest"].index_add(0, kept["at"].long(), kept["sent"])
            u = u + self.decay * e
        at = self._largest(u, [x.numel() for x in d.values()])
        sent = u[at].to(DTYPES[self.values])
        if self.error_feedback:
            rest = u.clone()
            rest[at] -= sent.float()
            client.memory[OWN + phase] = {"rest": rest, "at": at.int(), "sent": sent.float()}
        names = [[k, NAMES[reply[k].dtype], *v.shape] for k, v in d.items()]
        return {k: v for k, v in reply.items() if k not in d} | {
            OWN + "names": names, OWN + "shifted": sorted(shift), OWN + "values": sent, **index_code(at, len(u))}

    def _largest(self, u: Tensor, sizes: list[int]) -> Tensor:
        """Sorted positions of the largest entries."""
        if self.scope == "global":
            k = math.ceil(self.density * len(u))
            return u.abs().topk(k, sorted=False).indices.sort().values
        parts, start = [], 0
        for n in sizes:
            k = math.ceil(self.density * n)
            parts.append(start + u[start : start + n].abs().topk(k, sorted=False).indices.sort().values)
            start += n
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def index_code(at: Tensor, size: int) -> dict[str, Tensor]:
    """Sorted positions in their shortest form: gaps (255: go on by 255), bitmap, or int32."""
    gaps = np.diff(at.numpy(), prepend=-1) - 1
    jumps = gaps // 255
    length = len(gaps) + int(jumps.sum())
    if length <= min(4 * len(gaps), -(-size // 8)):
        code = np.full(length, 255, np.uint8)
        code[np.cumsum(jumps + 1) - 1] = gaps % 255
        return {OWN + "gaps": torch.from_numpy(code)}
    if -(-size // 8) <= 4 * len(gaps):
        bits = np.zeros(size, bool)
        bits[at.numpy()] = True
        return {OWN + "bitmap": torch.from_numpy(np.packbits(bits))}
    return {OWN + "at": at.int()}


def index_decode(reply: Payload, size: int) -> Tensor:
    """The positions of `index_code`."""
    if OWN + "gaps" in reply:
        code = reply[OWN + "gaps"].numpy().astype(np.int64)
        ends = code < 255
        return torch.from_numpy((np.cumsum(code) + np.cumsum(ends) - 1)[ends])
    if OWN + "bitmap" in reply:
        return torch.from_numpy(np.flatnonzero(np.unpackbits(reply[OWN + "bitmap"].numpy(), count=size)))
    return reply[OWN + "at"].long()


def room_for(msgs: Mapping[str, Payload]) -> int:
    """Entries that a reply may have when it is whole: some bytes can tell of more than any memory holds."""
    told = max((sum(v.numel() for v in m.values() if isinstance(v, Tensor)) for m in msgs.values()), default=0)
    return LEAST + MORE * told


def dense(reply: Payload, common: Mapping[str, Tensor], most: int) -> dict[str, Any]:
    """The reply with its tensors whole again; raises PayloadError for anything malformed, or of more than `most`."""
    if OWN + "names" not in reply:
        return dict(reply)
    try:
        names = [(k, d, tuple(shape)) for k, d, *shape in reply[OWN + "names"]]
        size = sum(math.prod(s) for _, _, s in names)
        if size > most or any(n < 0 for _, _, s in names for n in s):
            raise ValueError(f"{size} entries, allowed are {most}")
        at, values = index_decode(reply, size), reply[OWN + "values"].float()
        if at.shape != values.shape or (len(at) and not 0 <= int(at.min()) <= int(at.max()) < size):
            raise ValueError(f"{len(at)} positions, {len(values)} values, {size} entries")
        shifted = set(reply[OWN + "shifted"])
        flat, start = torch.zeros(size).scatter_(0, at, values), 0
        out = {k: v for k, v in reply.items() if not k.startswith(OWN)}
        for k, dtype, shape in names:
            x = flat[start : start + math.prod(shape)].view(shape)
            out[k] = (x + common[k].float() if k in shifted else x).to(DTYPES[dtype])
            start += math.prod(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PayloadError(f"a sparse reply is malformed: {error}") from None
    return out
