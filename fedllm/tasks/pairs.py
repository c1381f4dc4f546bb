"""Pictures and words: rows of one, the other or both, with a label; a word has the same number everywhere."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import DataError
from fedllm.tasks.classification import Classification
from fedllm.tasks.images import opened, picture_of
from fedllm.tasks.labels import index_of, raw_label
from fedllm.tasks.row import Encoded, Row, numbers_of, text_of
from fedllm.tasks.task import How, Shape

PIXELS, WORDS = "pixels", "words"
VOCABULARY = 1024
"""Numbers that words are hashed to; 0 is none's."""


class Pairs(Classification):
    """A label of a picture, of a text, or of a text about a picture (a question's answer), by a network that is
    built (`model.name: pairs`). Rows of one client all have a picture, all a text, or all both."""

    net, columns, bare = "pairs", ("image", "text", "label"), True

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """`image` is a picture, or numbers [3, H, W] or [H, W]."""
        image, said = row.get("image"), row.get("text")
        if image is None and said is None:
            raise DataError(f"{where} has neither an image nor a text; a row must have one of them, or both")
        made: dict[str, Any] = {"label": index_of(raw_label(row, where), how.labels, where)}
        if image is not None:
            made["image"] = _numbers(row, where) if isinstance(image, list) else picture_of(image, where, how.folder)
        if said is not None:
            made["text"] = text_of(row, "text", where)
            if not hashed(made["text"]):
                raise DataError(f"{where}: the text {made['text'][:40]!r} holds no word", kind="empty")
        return made

    def came(self, row: Row, labels: tuple[str, ...]) -> bool:
        """A picture as numbers alone: a path would be one of this machine."""
        if "image" in row:
            try:
                if not isinstance(row["image"], list) or _numbers(row, "row") != row["image"]:
                    return False
            except DataError:
                return False
        return ("image" in row or "text" in row) and super().came({"text": "", **row}, labels)

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        out = []
        for i, row in enumerate(rows, start=1):
            parts: dict[str, np.ndarray] = {}
            if "image" in row:
                image = row["image"]
                parts[PIXELS] = (np.array(image, np.float32) if isinstance(image, list) else
                                 np.asarray(how.images(opened(image, f"row {i}")), np.float32))
            if "text" in row:
                parts[WORDS] = np.array(hashed(row["text"])[: how.max_length], np.int64)
            tokens = len(parts.get(WORDS, ())) + 16 * (PIXELS in parts)
            out.append(Encoded(np.zeros(tokens, np.int32), int(row["label"]), 1, parts,
                               {WORDS: -1.0} if WORDS in parts else {}))
        return out


def hashed(text: str) -> list[int]:
    """A number for each word, by its letters alone: no vocabulary has to be agreed on."""
    return [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in re.findall(r"\w+", text.casefold())]


def _numbers(row: Row, where: str) -> list[Any]:
    x = numbers_of(row, "image", where)
    x = np.repeat(x[None], 3, 0) if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[0] != 3:
        raise DataError(f"{where}: 'image' has the shape {list(x.shape)}; numbers must be [3, H, W], or [H, W] of grey")
    return x.tolist()
