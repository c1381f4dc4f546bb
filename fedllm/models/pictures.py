"""Rows with pictures as steps take them: features of a frozen tower, or as many tokens as the tower makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedllm.data.encode import Encoded
from fedllm.models.dual import CHUNK


def with_features(model: Any, rows: Sequence[Encoded]) -> list[Encoded]:
    """Pictures of a tower that nobody trains become `features` here, once; others count their tower's tokens."""
    out = list(rows)
    seen = [i for i, row in enumerate(rows) if "pixels" in row.parts]
    if not model.seen_once:
        for i in seen:
            out[i] = replace(rows[i], ids=np.zeros(model.net.vision_tokens + model.space.beside_patches, np.int32))
        return out
    for i in range(0, len(seen), CHUNK):
        at = seen[i : i + CHUNK]
        pixels = torch.from_numpy(np.stack([rows[j].parts["pixels"] for j in at])).to(model.device)
        with torch.no_grad(), model.using([{}]):
            made = model.net.images(pixels).cpu().numpy()
        for j, features in zip(at, made, strict=True):
            rest = {n: p for n, p in rows[j].parts.items() if n != "pixels"}
            out[j] = replace(rows[j], parts={**rest, "features": features})
    return out
