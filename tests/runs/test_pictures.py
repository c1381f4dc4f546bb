"""Pictures in record and report: of public and of made rows, never of private ones unless the recipe says so."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

import fedllm
from fedllm.core.errors import RecipeError
from fedllm.runs.build import build
from fedllm.runs.pictures import SIDE, drawn, pictured
from fedllm.runs.recipe import load_recipe

SHADES = {"public": 40, "test": 120, "client": 220}
"""Whose a picture is shows in how bright it is."""
SCANS = {"name": "pairs", "width": 8, "depth": 1, "picture": 16}


def files(folder):
    """Clients' rows, a test and public rows, each picture of one shade."""
    for name, rows in (("client", 24), ("test", 3), ("public", 3)):
        lines = []
        for i in range(rows):
            file = folder / f"{name}{i}.png"
            Image.new("RGB", (20, 12), (SHADES[name], i, 0)).save(file)
            lines.append(json.dumps({"image": file.name, "label": "ab"[i % 2], "site": str(i % 2)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def recipe(folder, **data):
    return {"name": "seen", "model": {"name": "pairs", "width": 8, "depth": 1, "picture": 8}, "space": "full",
            "rounds": 1, "local": {"steps": 1, "batch_size": 2}, "evaluate": {"samples": 3},
            "data": {"source": str(folder / "client.jsonl"), "test": str(folder / "test.jsonl"), "task": "pairs",
                     "labels": ["a", "b"], "client_test": 0.25, "partition": {"kind": "by_key", "key": "site"}, **data}}


def shades(entries):
    """Whose pictures these are, by their shade."""
    of = {shade: name for name, shade in SHADES.items()}
    return {of[Image.open(io.BytesIO(base64.b64decode(s["picture"]))).getpixel((0, 0))[0]] for s in entries}


def everything(folder):
    """All bytes of a run's folder, but those of its inputs."""
    return b"".join(f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file())


def test_private_rows_never_appear_without_the_key(tmp_path):
    """The kind: of every way in which rows can lie, no private picture is in the folder unless `private` is said."""
    files(tmp_path)
    public = {"public": str(tmp_path / "public.jsonl")}
    cases = [({}, "open", set()), (public, "open", {"public"}), (public, "none", set()), ({}, "none", set()),
             (public, "private", {"test"}), ({}, "private", {"test"}), ({"test": 0.0}, "private", {"client"}),
             ({"test": 0.0}, "open", set()), ({"test": 0.0, **public}, "open", {"public"})]
    private = {drawn(str(f), "row 1").encode() for f in tmp_path.glob("*.png") if "public" not in f.name}
    for i, (data, says, whose) in enumerate(cases):
        told = recipe(tmp_path, **data)
        told["evaluate"]["pictures"] = says
        run = fedllm.run(told, root=tmp_path / f"r{i}")
        assert shades(json.loads((run.folder / "samples.json").read_text())) == whose, (data, says)
        page, statement = ((run.folder / name).read_text() for name in ("report.html", "privacy_statement.md"))
        assert ("<img src='data:image/png" in page) == bool(whose)
        assert ("PRIVATE: a" in page) == ("pictures of private rows" in statement) == (says == "private")
        kept = everything(run.folder)
        assert any(text in kept for text in private) == (says == "private")


def test_what_a_source_makes_is_shown_and_told(tmp_path):
    data = {"source": "sim:scans", "simulated": {"organs": 2, "rows": 12}, "task": "pairs", "test": 0.2,
            "partition": {"kind": "by_key", "key": "organ"}}
    run = fedllm.run({**recipe(tmp_path), "model": SCANS, "data": data}, root=tmp_path)
    shown = json.loads((run.folder / "samples.json").read_text())
    assert len(shown) == 3 and all(s["whose"] == "made by the source" and s["prompt"] for s in shown)
    parts = build(load_recipe(run.folder / "recipe.yaml"))
    labels = parts.world.federation.labels
    assert all({s["before"], s["after"], s["expected"]} <= set(labels) for s in shown)
    assert [p.row["text"] for p in pictured(parts)] == [s["prompt"] for s in shown]
    page = (run.folder / "report.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == 3 and "the served model says" in page


def test_a_method_whose_clients_have_models_of_their_own_shows_pictures_alone(tmp_path):
    data = {"source": "sim:scans", "simulated": {"organs": 2, "rows": 12}, "task": "pairs", "test": 0.0,
            "partition": {"kind": "by_key", "key": "organ"}}
    run = fedllm.run({**recipe(tmp_path), "model": SCANS, "data": data, "method": "prompt_medvqa"}, root=tmp_path)
    shown = json.loads((run.folder / "samples.json").read_text())
    assert len(shown) == 2 and {s["after"] for s in shown} == {""}
    assert "the run kept no served model&#x27;s answers" in (run.folder / "report.html").read_text()


def test_numbers_and_files_become_small_pictures():
    def read(text):
        return Image.open(io.BytesIO(base64.b64decode(text)))

    x = np.zeros((3, 4, 6))
    x[:, 1, 2] = 2.0
    x[0, 0, 0] = -2.0
    got = np.asarray(read(drawn(x.tolist(), "row 1")))
    assert got.shape == (4, 6, 3) and (got[1, 2] == 255).all() and got[0, 0].tolist() == [0, 128, 128]
    assert (np.asarray(read(drawn(np.ones((3, 2, 2)).tolist(), "row 1"))) == 0).all()  # one shade alone
    file = io.BytesIO()
    Image.new("L", (900, 300), 7).save(file, "PNG")
    assert read(drawn(file.getvalue(), "row 1")).size == (SIDE, SIDE // 3)


def test_another_word_is_refused(tmp_path):
    told = recipe(tmp_path)
    told["evaluate"]["pictures"] = "all"
    with pytest.raises(RecipeError, match=r"evaluate\.pictures.*'open', 'private' or 'none'"):
        fedllm.run(told, root=tmp_path)
