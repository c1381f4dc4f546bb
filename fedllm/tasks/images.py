"""Pictures as rows hold them (a path, a file's bytes, a `datasets` image), checked when rows are shaped."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.core.errors import DataError


def picture_of(value: Any, where: str, folder: Path | None) -> str | bytes:
    """Where the picture is, or the bytes that it is; a DataError names the row and the file where it cannot be read.

    A relative path begins at `folder`. All of the picture is decoded once, so that nothing breaks in mid-run.
    """
    found = value
    if isinstance(value, Mapping):  # as `datasets` and its Parquet files have it
        found = value.get("bytes") or value.get("path")
    if isinstance(found, str):
        path = Path(found).expanduser()
        found = str(path if path.is_absolute() or folder is None else folder / path)
    if not isinstance(found, str | bytes):
        raise DataError(f"{where}: 'image' is a {type(value).__name__}; allowed are a path, a file's bytes, and an "
                        "image of a `datasets` dataset")
    opened(found, where)
    return found


def opened(picture: str | bytes, where: str) -> Any:
    """The picture as PIL has it: upright, as its camera says, and in RGB of 8 bits."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("rows with images need the optional extra: pip install 'fedlm[images]'") from None
    name = repr(picture) if isinstance(picture, str) else f"of {len(picture)} bytes"
    try:
        if isinstance(picture, str) and stat.S_IFMT(os.stat(picture).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError("it is no file")  # a pipe would be waited for
        with Image.open(picture if isinstance(picture, str) else io.BytesIO(picture)) as image:
            if image.format == "EPS":
                raise OSError("EPS is a program, and what rows hold is not run")
            return _of_eight_bits(_upright(image)).convert("RGB")
    except Exception as error:  # decoders raise whatever they come upon in a file of a stranger's
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise DataError(f"{where}: the image {name} cannot be read: {why.splitlines()[0]}") from None


def _upright(image: Any) -> Any:
    """Turned as its camera was held (Exif), as transformers and `datasets` turn it."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # what is said beside the pixels is broken, and they may not be
        return image


def _of_eight_bits(image: Any) -> Any:
    """Gray of 16 bits by its high byte, where PIL cuts off at 255 and leaves white; OSError for other numbers."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"nothing says which of its numbers is white (mode {image.mode!r}); save it with 8 or 16 bits")
    return image
