"""What a GGUF file's head says of the file, looked at before a reader believes it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.reader import GgufHeader

from fedllm.core.errors import ModelError

MOST = 1 << 22
"""Entries of all lists together: a large vocabulary has some million, and a reader holds each as an object."""
WIDTH = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
"""A value's kind -> its bytes; 8 is a text, 9 a list."""
VERSIONS = (2, 3)


def begins(told: str, file: Path) -> None:
    """ModelError for a file that does not begin as a GGUF file of this machine's order of bytes, or whose lists would
    not fit into memory."""
    if not file.stat().st_size:
        raise ModelError(f"{told} is empty (0 bytes)")
    with file.open("rb") as start:
        head = start.read(24)
    if head[:4] != b"GGUF":
        raise ModelError(f"{told} is no GGUF file: it does not begin with GGUF")
    if len(head) < 24:
        raise ModelError(f"{told} is cut short: its head has {len(head)} of at least 24 bytes")
    version = struct.unpack_from("<I", head, 4)[0]
    if struct.unpack_from(">I", head, 4)[0] in VERSIONS:
        raise ModelError(f"{told} is written for big-endian machines; allowed are little-endian files: convert it "
                         "(gguf-convert-endian FILE little), or give the model's own folder")
    if version not in VERSIONS:
        raise ModelError(f"{told} is GGUF version {version}; allowed are {', '.join(map(str, VERSIONS))}")
    with contextlib.suppress(struct.error):  # it ends before its head does, which the reader says
        _lists(told, np.memmap(file, mode="r", dtype=np.uint8))


def _lists(told: str, data: Any) -> None:
    keys, at, held = struct.unpack_from("<Q", data, 16)[0], 24, 0
    for _ in range(keys):
        size = struct.unpack_from("<Q", data, at)[0]
        key, at = bytes(data[at + 8 : at + 8 + min(size, 80)]).decode(errors="replace"), at + 8 + size
        kind, at, many = struct.unpack_from("<I", data, at)[0], at + 4, 1
        if kind == 9:
            (kind, many), at = struct.unpack_from("<IQ", data, at), at + 12
            if (held := held + many) > MOST:
                raise ModelError(f"{told} has a list of {many:,} entries ({key}); allowed are {MOST:,} in all lists "
                                 "together")
        if kind in WIDTH:
            at += many * WIDTH[kind]
        elif kind == 8:
            for _ in range(many):
                at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            return  # the reader says which kind it does not know


def laid_out(told: str, head: GgufHeader, facts: Mapping[str, Any]) -> None:
    """ModelError where the tensors do not lie one behind the other, as their types and shapes say, or are of other
    blocks than the file says that it has."""
    step, ends = facts.get("general.alignment", 32), 0
    for tensor in head.tensors:
        if tensor.offset != ends:
            raise ModelError(f"{told} is damaged: its tensor {tensor.name!r} begins at {tensor.offset}, and by the "
                             f"types and shapes of those before it at {ends}")
        ends = -(-(tensor.offset + tensor.nbytes) // step) * step
    key = f"{head.architecture}.block_count"
    found = {t.name.split(".")[1] for t in head.tensors if t.name.startswith("blk.")}
    if facts.get(key) != len(found):
        raise ModelError(f"{told} says {key} = {facts.get(key)}, and has tensors of {len(found)} blocks")


def has_room(told: str, head: GgufHeader, config: Any) -> None:
    """ModelError for keys that mean a network far larger than the file: what it lacks would be made up in memory."""
    with torch.device("meta"):
        net: Any = AutoModelForCausalLM.from_config(config)
    means, held = sum(p.numel() for p in net.parameters()), sum(prod(t.shape) for t in head.tensors)
    if means > 2 * held:
        raise ModelError(f"{told}: its keys mean a network of {means:,} weights, and its tensors hold {held:,}")
