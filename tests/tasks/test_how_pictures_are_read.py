"""Pictures as cameras and scanners leave them: upright, in 8 bits, or refused; and whatever a decoder raises."""

import io
import os
import random

import numpy as np
import pytest
from PIL import Image

from fedllm.core.errors import DataError
from fedllm.tasks.images import opened, picture_of

GRAY = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


def bytes_of(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def test_a_picture_is_turned_as_its_camera_was_held():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turn it clockwise
    turned = opened(bytes_of(image, "PNG", exif=exif), "row 1")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)
    broken = bytes_of(image, "PNG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert opened(broken, "row 1").size == (4, 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_gray_are_not_cut_off_at_255(kind):
    got = np.asarray(opened(bytes_of(Image.fromarray(GRAY), kind), "row 1"))
    assert got.shape == (64, 64, 3) and np.array_equal(got[..., 1], GRAY >> 8) and 120 < got.mean() < 135


@pytest.mark.parametrize("numbers", [GRAY.astype(np.int32), (GRAY / 65535).astype(np.float32)])
def test_numbers_without_a_white_of_their_own_are_refused(numbers):
    with pytest.raises(DataError, match=r"row 1: the image of .* nothing says which of its numbers is white"):
        opened(bytes_of(Image.fromarray(numbers), "TIFF"), "row 1")


def test_what_would_be_waited_for_or_run_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png' cannot be read: it is no file"):
        picture_of("pipe.png", "row 1", tmp_path)
    with pytest.raises(DataError, match="EPS is a program"):
        opened(bytes_of(Image.new("RGB", (4, 4)), "EPS"), "row 1")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "DDS", "ICO", "AVIF"])
def test_a_broken_file_is_a_picture_or_refused(kind):
    """Decoders raise RuntimeError, NotImplementedError and what not; none of it is a traceback."""
    rng, base = random.Random(0), Image.fromarray(np.stack([GRAY >> 8] * 3, -1).astype(np.uint8)[:24, :24])
    try:
        whole = bytes_of(base, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(min(len(data), 200))] = rng.choice([0, 1, 127, 128, 255])
        try:
            assert opened(bytes(data), "row 1").mode == "RGB"
        except DataError as error:
            refused += str(error).startswith("row 1: the image of")
    assert refused
