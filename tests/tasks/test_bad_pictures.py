"""Images that are none, wherever rows come from: refused by file and row before any work, and nothing is written."""

import json

import pytest
from PIL import Image

import fedllm
from fedllm.core.errors import DataError


def rows(folder, name, bad=None):
    """Six rows of pictures, of which the fourth is what `bad` makes of its file's name."""
    lines = []
    for i in range(6):
        file = folder / f"{name}{i}.png"
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(file)
        lines.append({"image": file.name, "label": "ab"[i % 2]})
    if bad is not None:
        lines[3]["image"] = bad(folder / f"{name}3.png")
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / f"{name}.jsonl")


def text(file):
    file.write_text("this is no picture")
    return file.name


def cut(file):
    file.write_bytes(file.read_bytes()[:50])
    return file.name


def vector(file):
    file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return file.name


def empty(file):
    file.write_bytes(b"")
    return file.name


BAD = {"text": (text, r"the image '.*3\.png' cannot be read: cannot identify"), "cut": (cut, r"3\.png' cannot be read"),
       "vector": (vector, r"3\.png' cannot be read: cannot identify"),
       "empty": (empty, r"3\.png' cannot be read"),
       "gone": (lambda file: "gone.png", r"gone\.png' cannot be read: there is no such file"),
       "folder": (lambda file: ".", r"cannot be read: .*[Dd]irectory"),
       "number": (lambda file: 7, r"'image' is a int; allowed are a path"),
       "nothing": (lambda file: {"bytes": None, "path": None}, r"'image' is a dict; allowed are a path"),
       "flat": (lambda file: [1.0, 2.0], r"'image' has the shape \[2\]; numbers must be \[3, H, W\]"),
       "ragged": (lambda file: [[1.0], [2.0, 3.0]], r"'image' must hold numbers"),
       "four colors": (lambda file: [[[0.0]]] * 4, r"'image' has the shape \[4, 1, 1\]; numbers must be \[3, H, W\]")}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("part", ["source", "test", "public"])
def test_an_image_that_is_none_is_refused_before_any_work(tmp_path, kind, part):
    make, says = BAD[kind]
    files = {name: rows(tmp_path, name, make if name == part else None) for name in ("source", "test", "public")}
    with pytest.raises(DataError, match=rf"{part}\.jsonl, row 4 \(line 4\): .*{says}"):
        fedllm.run({"name": "bad", "model": {"name": "pairs", "width": 8, "depth": 1}, "space": "full", "rounds": 1,
                    "data": {**files, "task": "pairs", "labels": ["a", "b"],
                             "partition": {"kind": "iid", "clients": 2}}}, root=tmp_path)
    assert not (tmp_path / "bad").exists()
