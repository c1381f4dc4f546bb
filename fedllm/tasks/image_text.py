"""Image-text: a picture, and the label whose name in words is nearest to it (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import CompositionError
from fedllm.tasks.classification import Classification
from fedllm.tasks.images import opened, picture_of
from fedllm.tasks.labels import index_of, raw_label
from fedllm.tasks.row import Encoded, Row, numbers_of, text_of, value_of
from fedllm.tasks.task import How, Shape

PIXELS, FEATURES, WORDS = "pixels", "features", "words"


class ImageText(Classification):
    """A class of a picture, by an image-text model's two encoders; a row may hold image `features` in its place, and a
    `text` of its own beside it, which only methods of both modalities read."""

    net, columns = "dual", ("image", "label")

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        label = index_of(raw_label(row, where), how.labels, where)
        if FEATURES in row:
            return {FEATURES: numbers_of(row, FEATURES, where), "label": label}
        said = {"text": text_of(row, "text", where)} if row.get("text") is not None else {}
        return {"image": picture_of(value_of(row, "image", where), where, how.folder), "label": label, **said}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """`pixels` [3, H, W] as the image processor makes them, or the row's `features` [d]; its text as `words`."""
        return [Encoded(np.zeros(1, np.int32), int(row["label"]), 1, {**self._part(row, i, how), **_words(row, how)},
                        {WORDS: -1.0} if "text" in row else {}) for i, row in enumerate(rows, start=1)]

    def _part(self, row: Row, i: int, how: How) -> dict[str, np.ndarray]:
        if FEATURES in row:
            return {FEATURES: np.asarray(row[FEATURES], np.float32)}
        if how.images is None:
            raise CompositionError("rows with images need a model that reads them (CLIP, SigLIP), and this one has no "
                                   "image processor; a folder with a preprocessor_config.json works")
        image = opened(row["image"], f"row {i}")
        return {PIXELS: np.asarray(how.images(image, return_tensors="np")["pixel_values"][0], np.float32)}


def _words(row: Row, how: How) -> dict[str, np.ndarray]:
    """The tokens of the row's own text [T], where it has one."""
    if "text" not in row:
        return {}
    ids = how.tokens([row["text"]], truncation=True, max_length=how.max_length)["input_ids"][0]
    return {WORDS: np.array(ids, np.int64)}
