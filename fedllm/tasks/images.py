"""Pictures as rows hold them (a path, a file's bytes, a `datasets` image), checked when rows are shaped."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """The picture as PIL has it, in RGB."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("rows with images need the optional extra: pip install 'fedlm[images]'") from None
    name = repr(picture) if isinstance(picture, str) else f"of {len(picture)} bytes"
    try:
        with Image.open(picture if isinstance(picture, str) else io.BytesIO(picture)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise DataError(f"{where}: the image {name} cannot be read: {why}") from None
