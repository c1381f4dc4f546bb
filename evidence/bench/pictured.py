"""Pictures at three sites, and the small CLIP of the picture rigs as a folder: what methods for pictures are tried on.

The files are read by each site itself, as a user's own are; the model is loaded as any Hugging Face folder is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil

from evidence.rigs.shapes import SIZE, drawn, tokenizer, trained_clip

LABELS = ("red circle", "blue square", "green star")
TASK = {"task": "image_text", "labels": list(LABELS), "fields": {"image": "image", "label": "name"}}
"""How the rows are read."""


def write_pictures(path: Path, k: int, n: int) -> None:
    """`n` pictures of client `k` as PNG files, and a list of them."""
    names = [LABELS[i % len(LABELS)] for i in range(n)]
    colors, shapes = zip(*(name.split() for name in names), strict=True)
    pixels = drawn(np.random.default_rng(k), colors, shapes, ("photo", "sketch", "noisy")[k % 3])  # [n, 3, 32, 32]
    home = path.parent.parent if path.parent.name == "data" else path.parent  # what lies in data/ is read as rows
    folder = home / "pictures" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (x, name) in enumerate(zip(pixels, names, strict=True)):
        file = folder / f"{i}.png"
        Image.fromarray(((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)).save(file)
        rows.append({"image": str(file), "name": name, "text": f"this is a {name.split()[1]}"})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def clip_folder(folder: Path) -> str:
    """The small CLIP with its tokenizer and processor, as `save_pretrained` leaves them."""
    trained_clip().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3,
                          image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)
