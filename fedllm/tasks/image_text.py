"""Image-text: a picture, and the label whose name in words is nearest to it (CLIP, SigLIP), among all or some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import CompositionError, DataError
from fedllm.tasks.classification import Classification
from fedllm.tasks.images import opened, picture_of
from fedllm.tasks.labels import index_of, raw_label
from fedllm.tasks.row import Encoded, Row, numbers_of, text_of, value_of
from fedllm.tasks.task import How, Shape

PIXELS, FEATURES, WORDS, AMONG = "pixels", "features", "words", "among"


class ImageText(Classification):
    """A class of a picture, by an image-text model's two encoders; a row may hold image `features` in its place, and a
    `text` of its own beside it, which only methods of both modalities read, and the labels it is told `among`."""

    net, columns = "dual", ("image", "label")

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        label = index_of(raw_label(row, where), how.labels, where)
        some = _among(row, label, where, how)
        if FEATURES in row:
            return {FEATURES: numbers_of(row, FEATURES, where), "label": label, **some}
        said = {"text": text_of(row, "text", where)} if row.get("text") is not None else {}
        return {"image": picture_of(value_of(row, "image", where), where, how.folder), "label": label, **said,
                **some}

    def came(self, row: Row, labels: tuple[str, ...]) -> bool:
        """Features alone: a picture would be a file of this machine."""
        try:
            good = "image" not in row and numbers_of(row, FEATURES, "row").ndim == 1
        except DataError:
            return False
        return good and super().came({"text": "", **row}, labels)

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """`pixels` [3, H, W] as the image processor makes them, or the row's `features` [d]; its text as `words`."""
        return [Encoded(np.zeros(1, np.int32), int(row["label"]), 1, {**self._part(row, i, how), **_words(row, how)},
                        {WORDS: -1.0} if "text" in row else {}) for i, row in enumerate(rows, start=1)]

    def _part(self, row: Row, i: int, how: How) -> dict[str, np.ndarray]:
        some = {AMONG: np.asarray(row[AMONG], np.float32)} if AMONG in row else {}
        if FEATURES in row:
            return {FEATURES: np.asarray(row[FEATURES], np.float32), **some}
        if how.images is None:
            raise CompositionError("rows with images need a model that reads them (CLIP, SigLIP), and this one has no "
                                   "image processor; a folder with a preprocessor_config.json works")
        image = opened(row["image"], f"row {i}")
        return {PIXELS: np.asarray(how.images(image, return_tensors="np")["pixel_values"][0], np.float32), **some}


def _among(row: Row, label: int, where: str, how: Shape) -> dict[str, Any]:
    """Which of the labels the row is told among, 1 or 0 each; nothing where it does not say."""
    if (said := row.get(AMONG)) is None:
        return {}
    if not isinstance(said, list | tuple | np.ndarray) or len(said) < 2:
        raise DataError(f"{where}: 'among' is {said!r:.80}; it must be a list of two labels or more", kind="value")
    some = {index_of(name, how.labels, where, AMONG) for name in said}
    if label not in some:
        raise DataError(f"{where}: the label {how.labels[label]!r:.80} is none of those that 'among' lists",
                        kind="value")
    return {AMONG: [float(i in some) for i in range(len(how.labels))]}


def _words(row: Row, how: How) -> dict[str, np.ndarray]:
    """The tokens of the row's own text [T], where it has one."""
    if "text" not in row:
        return {}
    ids = how.tokens([row["text"]], truncation=True, max_length=how.max_length)["input_ids"][0]
    return {WORDS: np.array(ids, np.int64)}
