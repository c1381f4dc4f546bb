"""Payloads as bytes: a manifest and one flat buffer. Nothing is ever unpickled.

Layout: 4 bytes magic, 4 bytes manifest length (little endian), the manifest (JSON), zero padding up to a multiple
of 64, then all tensors one after the other in name order of the payload, each at a multiple of 16.
Decoding is zero-copy: tensors are views of the received buffer.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload

MAGIC = b"FLM1"
HEAD = 8
KEPT = 1 << 20
"""Bytes of the longest manifest that is kept for the next message of the same form."""
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool)}
NAMES = {d: n for n, d in DTYPES.items()}
_NUMPY = frozenset(DTYPES.values()) - {torch.bfloat16}
Shape = tuple[str, torch.dtype, torch.Size]


@functools.lru_cache(maxsize=256)
def _tensor_part(shapes: tuple[Shape, ...]) -> tuple[str, tuple[int, ...], int]:
    """Manifest text of these tensors, their offsets, and the buffer's length: the same every round, so kept."""
    at, offsets, rows = 0, [], []
    for name, dtype, shape in shapes:
        offsets.append(at)
        rows.append([name, NAMES[dtype], list(shape), at])
        at += -(-math.prod(shape) * dtype.itemsize // 16) * 16
    return json.dumps(rows, separators=(",", ":")), tuple(offsets), at


def _layout(payload: Payload) -> tuple[bytes, list[Tensor], tuple[int, ...], int]:
    """Manifest bytes, tensors, offsets, length of the buffer."""
    tensors = {k: v for k, v in payload.items() if isinstance(v, Tensor)}
    try:
        shapes = tuple((k, t.dtype, t.shape) for k, t in tensors.items())
        text, offsets, length = _tensor_part(shapes)
        rest = json.dumps([[k, _plain(v)] for k, v in payload.items() if not isinstance(v, Tensor)],
                          separators=(",", ":"))
    except (KeyError, TypeError) as error:
        raise PayloadError(f"payload cannot cross the wire: {error} is not allowed; use tensors of {sorted(DTYPES)}, "
                           "int, float, str, bool, bytes, or lists of these") from None
    return f'{{"t":{text},"v":{rest}}}'.encode(), list(tensors.values()), offsets, length


def _plain(v: Any) -> Any:
    if isinstance(v, bytes):
        return {"b64": base64.b64encode(v).decode()}
    if isinstance(v, list | tuple):
        return [_plain(x) for x in v]
    if v is None or isinstance(v, str | int | float | bool):
        return v
    raise TypeError(type(v).__name__)


def _start(manifest: bytes) -> int:
    return -(-(HEAD + len(manifest)) // 64) * 64


def size(payload: Payload) -> int:
    """Bytes that `encode` would give, without encoding."""
    manifest, _, _, length = _layout(payload)
    return _start(manifest) + length


def encode(payload: Payload) -> bytearray:
    """One buffer that `decode` turns back; tensors are moved to the CPU."""
    manifest, tensors, offsets, length = _layout(payload)
    start = _start(manifest)
    parts = [MAGIC + len(manifest).to_bytes(4, "little"), manifest, bytes(start - HEAD - len(manifest))]
    end = 0
    for t, at in zip(tensors, offsets, strict=True):
        if at > end:
            parts.append(bytes(at - end))
        parts.append(flat := _raw(t))
        end = at + len(flat)
    parts.append(bytes(length - end))
    return bytearray().join(parts)  # one pass over memory: no buffer of zeros is made first


def _raw(t: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous and on the CPU."""
    flat = t.detach().cpu().contiguous()
    flat = flat if flat.dtype in _NUMPY else flat.view(torch.uint8) if flat.dim() else flat.view(1).view(torch.uint8)
    return memoryview(flat.numpy()).cast("B") if flat.numel() else memoryview(b"")


def decode(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The payload in `data`; tensors are views of it. Raises PayloadError for anything malformed."""
    view = memoryview(data)
    if view.readonly:  # tensors may be written to, so they must not look into memory that may not
        view = memoryview(bytearray(data))
    if len(view) < HEAD or bytes(view[:4]) != MAGIC:
        raise PayloadError(f"{len(view)} bytes that do not start with {MAGIC!r} are no payload")
    length = int.from_bytes(view[4:HEAD], "little")
    manifest = bytes(view[HEAD : HEAD + length])
    try:
        rows, values = (_parse if len(manifest) <= KEPT else _parse.__wrapped__)(manifest)
        start = _start(manifest)
        out: dict[str, Any] = {}
        for name, dtype, shape, at, count in rows:
            if start + at + count * dtype.itemsize > len(view):
                raise PayloadError(f"'{name}' reaches beyond the {len(view)} bytes received")
            out[name] = (torch.frombuffer(view, dtype=dtype, count=count, offset=start + at).view(shape) if count
                         else torch.empty(shape, dtype=dtype))
        return out | {k: _rich(v) for k, v in values}
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise PayloadError(f"malformed payload: {error}") from None


@functools.lru_cache(maxsize=64)
def _parse(manifest: bytes) -> tuple[list[tuple[str, torch.dtype, tuple[int, ...], int, int]], list[tuple[str, Any]]]:
    doc = json.loads(manifest)
    rows = []
    for name, dtype, shape, at in doc["t"]:
        if any(type(n) is not int or n < 0 for n in (at, *shape)):
            raise PayloadError(f"'{name}' has a size or place that is no whole number from 0")
        rows.append((str(name), DTYPES[dtype], tuple(shape), at, math.prod(shape)))
    return rows, [(str(k), v) for k, v in doc["v"]]


def _rich(v: Any) -> Any:
    if isinstance(v, Mapping):
        return base64.b64decode(v["b64"])
    return [_rich(x) for x in v] if isinstance(v, list) else v
