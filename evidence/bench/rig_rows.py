"""What methods are tried on in real federations: the rows of three sites, and how a recipe reads them for each task.

A row of text has the columns of every task but pictures, so that one federation serves all of these; pictures lie
in files of their own beside the small CLIP of the picture rigs, a folder as any Hugging Face model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil

from evidence.rigs.insights import SOUNDS, asked
from evidence.rigs.shapes import SIZE, drawn, tokenizer, trained_clip
from evidence.rigs.skills import KINDS, tasks
from evidence.rigs.toolbook import TOOLS, calls
from fedllm.core.card import Trial
from fedllm.federation.nvflare.loopback import SITES, write_rows
from fedllm.methods.agents.fot import RULES
from fedllm.methods.registry import method_class

LABELS = ("red circle", "blue square", "green star")
ITEMS = ("one/red ink", "one/old oak", "one/green tea", "two/red oak", "two/old ink", "two/tall tea")
NET = {"width": 8, "depth": 1}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "generation": {},
    "classification": {"data": {"task": "classification", "labels": ["even", "odd"],
                                "fields": {"text": "prompt", "label": "label"}}},
    "preference": {"data": {"task": "preference", "fields": {"chosen": "response", "rejected": "worse"}}},
    "tokens": {"data": {"task": "tokens", "labels": ["O", "even"], "fields": {"tokens": "words", "tags": "tags"}}},
    "pairs": {"data": {"task": "pairs", "labels": ["even", "odd"],
                       "fields": {"image": "glyph", "text": "prompt", "label": "label"}},
              "model": {"name": "pairs", **NET, "prompts": 2, "picture": 8}},
    "forecast": {"data": {"task": "forecast", "windows": {"of": ["heat", "wind"], "time": "step", "past": 3,
                                                          "horizon": 2}},
                 "model": {"name": "series", **NET}},
    "next_item": {"data": {"task": "next_item", "labels": list(ITEMS),
                           "sequences": {"user": "user", "item": "item", "time": "step"}},
                  "model": {"name": "shop", **NET, "codes": [2, 4], "prompts": 3}},
    "image_text": {"data": {"task": "image_text", "labels": list(LABELS),
                            "fields": {"image": "image", "label": "name"}}}}
"""Keys of a recipe, by what the method's trial says of its rows."""


def write_words(path: Path, k: int, n: int) -> None:
    """`n` rows of client `k`: the rig's own, with what the other tasks read beside."""
    write_rows(path, k, n)
    rng, rule = np.random.default_rng([7, k]), next(iter(RULES))
    rows = []
    for i, line in enumerate(path.read_text().splitlines()):
        [call], [question], [task] = (calls(rng, list(TOOLS)[(k + i % 2) % len(TOOLS)], 1),
                                      asked(rng, SOUNDS[(k + i % 2) % len(SOUNDS)], rule, 1),
                                      tasks(rng, KINDS[(k + i % 2) % len(KINDS)], k % 2, 1))
        glyph = rng.normal(0, 1, (8, 8)).round(3)
        rows.append({
            **json.loads(line), "id": f"x{i}", "lang": ("en", "sw", "yo")[(i + k) % 3],
            "glyph": glyph.tolist(), "strokes": glyph.reshape(-1).tolist(), "skill": ("sort", "send")[i % 2],
            "trace": f"{('sort', 'send')[i % 2]} the word {call['prompt']}", "step": i,
            "heat": round(float(np.sin(i + k)), 3), "wind": round(float(rng.normal()), 3), "user": f"u{i % 2}",
            "item": ITEMS[int(rng.integers(len(ITEMS)))],
            **{f"{name}_{part}": row[part] for name, row in (("call", call), ("rule", question), ("task", task))
               for part in ("prompt", "response")}})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


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


def by_rig(names: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The methods that are tried on words, on pictures and in environments, each with what their rig is made of."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(method_class(name).trial), []).append(name)
    for kind, some in kinds.items():
        with RIGS[kind]() as made:
            yield some, made


def _kind(trial: Trial) -> str:
    return "scenes" if trial.acts else "pictures" if trial.task == "image_text" else "words"


@contextmanager
def _pictures() -> Iterator[dict[str, Any]]:
    with TemporaryDirectory(prefix="fedllm-clip-") as folder:
        yield {"model": clip_folder(Path(folder).resolve()), "rows": write_pictures}


@contextmanager
def _words() -> Iterator[dict[str, Any]]:
    yield {"rows": write_words}


@contextmanager
def _scenes() -> Iterator[dict[str, Any]]:
    """Sites that are called as a simulation calls the clients of an environment."""
    yield {"rows": write_words, "sites": [f"client-{k}" for k in range(len(SITES))]}


RIGS = {"words": _words, "pictures": _pictures, "scenes": _scenes}


@contextmanager
def acting(rig: Any, spec: Mapping[str, Any]) -> Iterator[None]:
    """Each site's settings name the environment that the recipe's client of its name has; rows stay as they are."""
    with ExitStack() as stack:
        if str(spec["data"]["source"]).startswith("env:"):
            told = {k: v for k, v in spec["data"]["environment"].items() if k not in ("clients", "held_out")}
            for k, site in enumerate(rig.sites):
                stack.enter_context(rig.settings(site, data=spec["data"]["source"],
                                                 environment={**told, "layout": k}))
        yield
