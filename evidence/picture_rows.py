"""Pictures of colored shapes as files, and the small CLIP as a folder of transformers: `python -m evidence.picture_rows
FOLDER`. The recipe family `vision_language` reads them.

Each setting is a Parquet file of rows (image, label, client, and where it says so `among`) and one of its common test.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.rigs.shapes import PAIRS, SEEN, SIZE, drawn, tokenizer, trained_clip
from fedllm.core.rng import numpy_stream

Rows = list[dict[str, Any]]


def some(rng: np.random.Generator, client: str, classes: Sequence[str], look: str, each: int, **more: Any) -> Rows:
    """So many pictures of each of these classes in one look."""
    from PIL import Image

    said = [c for c in classes for _ in range(each)]
    colors, shapes = zip(*(c.split() for c in said), strict=True)
    rows = []
    for label, x in zip(said, drawn(rng, colors, shapes, look), strict=True):
        out = io.BytesIO()
        Image.fromarray(((x.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)).save(out, "png")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": label, "client": client, **more})
    return rows


def looks(rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Domain shift: five clients with a look each, sixteen classes; the test is faded, which nobody has."""
    classes = PAIRS[::3]
    return [r for look in SEEN for r in some(rng, look, classes, look, 6)], some(rng, "test", classes, "faded", 9)


def disjoint(rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Disjoint classes: eight clients of six faded classes each; the test is all 48."""
    order = [PAIRS[i] for i in rng.permutation(len(PAIRS))]
    rows = [r for k in range(8) for r in some(rng, f"client-{k}", order[6 * k : 6 * k + 6], "faded", 4)]
    return rows, some(rng, "test", PAIRS, "faded", 4)


def few(rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Few shots: five clients with a look each, about one picture of each shape in one color; tested in all looks."""
    classes = PAIRS[8:16]
    return ([r for look in SEEN for r in some(rng, look, classes, look, 2)],
            [r for look in SEEN for r in some(rng, "test", classes, look, 6)])


def new(rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Base and new classes: four clients tell faded pictures among 24 classes; the test is the other 24, among them."""
    order = [PAIRS[i] for i in rng.permutation(len(PAIRS))]
    base, rest = order[:24], order[24:]
    rows = [r for k in range(4) for r in some(rng, f"client-{k}", base, "faded", 3, among=base)]
    return rows, some(rng, "test", rest, "faded", 6, among=rest)


SETTINGS: Mapping[str, Callable[[np.random.Generator], tuple[Rows, Rows]]] = {
    f.__name__: f for f in (looks, disjoint, few, new)}


def write(folder: Path) -> dict[str, tuple[int, int]]:
    """The model's folder and all files; setting -> (rows, test rows)."""
    import pyarrow as pa
    from pyarrow import parquet
    from transformers import CLIPImageProcessorPil

    trained_clip().save_pretrained(folder / "clip")
    tokenizer().save_pretrained(folder / "clip")
    side = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side, image_mean=[0.5] * 3,
                          image_std=[0.5] * 3).save_pretrained(folder / "clip")
    counts = {}
    for name, make in SETTINGS.items():
        rows, test = make(numpy_stream(0, "picture rows", name))
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        parquet.write_table(pa.Table.from_pylist(test), folder / f"{name}_test.parquet")
        counts[name] = len(rows), len(test)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="vision_rows in the folder that the family is run from, or another")
    for name, (rows, test) in write(parser.parse_args().folder).items():
        print(f"{name}.parquet: {rows} rows, {test} in its test")  # noqa: T201
