"""Colored shapes in six looks, drawn by numpy, and a small CLIP that has seen five of them (`evidence/small_clip.py`).

The CLIP is real and frozen; what clients learn is not what it was trained on: a look that it never saw, pairs of color
and shape that it never saw, names that stand alone. A label is a color and a shape, or one of both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.dual import DualEncoder
from fedllm.models.model import Model
from fedllm.models.names import class_prompts, names_of
from fedllm.spaces import make_space

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "diamond")
COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1),
          "purple": (0.6, 0.15, 0.75), "orange": (1.0, 0.55, 0.05)}
LOOKS = ("photo", "sketch", "neon", "noisy", "pixel", "faded")
SEEN = LOOKS[:5]
"""The looks that the CLIP was trained on; `faded` it never saw."""
PAIRS = tuple(f"{c} {s}" for c in COLORS for s in SHAPES)
UNSEEN = tuple(f"{list(COLORS)[i % 6]} {s}" for i, s in enumerate(SHAPES))
"""Pairs that it never saw, in whatever look."""
TEMPLATES = ("a photo of a {}", "a {look} picture of a {}", "this is a {}", "one {} in a {look} image", "{}")
WORDS = ("a", "photo", "of", "picture", "this", "is", "one", "in", "image", ".", *LOOKS[1:], *COLORS, *SHAPES)
START, END = 1, len(WORDS) + 3
WEIGHTS = Path(__file__).with_name("shapes_clip.safetensors")


def drawn(rng: np.random.Generator, colors: Sequence[str], shapes: Sequence[str], look: str) -> np.ndarray:
    """[N, 3, 32, 32] in [-1, 1]: each shape in its color, of random place, size, tilt and background, in a look."""
    n = len(colors)
    x, y = _turned(rng, n)
    mask = np.stack([_inside(shape, x[i], y[i]) for i, shape in enumerate(shapes)])[:, None].astype(np.float32)
    paint = np.array([COLORS[c] for c in colors], np.float32)[:, :, None, None]
    paint = np.clip(paint + rng.normal(0, 0.06, paint.shape), 0, 1)
    ground = rng.uniform(0.1, 0.6, (n, 1, 1, 1)) + rng.normal(0, 0.04, (n, 3, 1, 1))
    if look == "sketch":
        inner = mask * np.roll(mask, 1, 2) * np.roll(mask, -1, 2) * np.roll(mask, 1, 3) * np.roll(mask, -1, 3)
        mask, ground = mask - inner, 0.95
    z = mask * paint + (1 - mask) * ground + rng.normal(0, 0.03, (n, 3, SIZE, SIZE))
    return ((OF_LOOK.get(look, lambda r, z: z)(rng, z) - 0.5) * 2).astype(np.float32)


def _turned(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [N, 32, 32] in which each shape fills about the unit circle."""
    grid = (np.arange(SIZE) - SIZE / 2 + 0.5)[None]
    at, size, tilt = rng.uniform(-5, 5, (2, n, 1, 1)), rng.uniform(7, 11, (n, 1, 1)), rng.normal(0, 0.2, (n, 1, 1))
    u, v = (grid[:, None] - at[0]) / size, (grid[:, :, None] - at[1]) / size
    return u * np.cos(tilt) + v * np.sin(tilt), v * np.cos(tilt) - u * np.sin(tilt)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r, a, b = np.hypot(x, y), np.abs(x), np.abs(y)
    return {"circle": r < 1, "square": np.maximum(a, b) < 0.85, "triangle": (y < 0.75) & (y > 1.9 * a - 1),
            "cross": (np.minimum(a, b) < 0.28) & (np.maximum(a, b) < 1), "ring": (r < 1) & (r > 0.6),
            "star": r < 0.42 + 0.6 * np.abs(np.cos(2.5 * np.arctan2(x, -y))) ** 2, "bar": (a < 1.1) & (b < 0.33),
            "diamond": a + b < 1}[shape]


OF_LOOK = {"neon": lambda rng, z: 1 - z, "noisy": lambda rng, z: z + rng.normal(0, 0.3, z.shape),
           "pixel": lambda rng, z: z.reshape(len(z), 3, 8, 4, 8, 4).mean((3, 5)).repeat(4, 2).repeat(4, 3),
           "faded": lambda rng, z: 0.62 + 0.22 * (z - 0.5) + rng.normal(0, 0.03, z.shape)}


def small_clip(seeing: int = 64) -> CLIPModel:
    """Towers of two and three blocks, 64 wide (the picture's: `seeing`): 190 thousand weights, not trained yet."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "attention_dropout": 0.0}
    return CLIPModel(CLIPConfig(
        text_config={**tower, "num_hidden_layers": 2, "vocab_size": END + 1, "max_position_embeddings": 16,
                     "bos_token_id": START, "eos_token_id": END, "pad_token_id": 0},
        vision_config={**tower, "hidden_size": seeing, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8},
        projection_dim=64))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens between a start and an end, which has the highest id."""
    words = {w: i for i, w in enumerate(("<pad>", "<start>", "<unknown>", *WORDS, "<end>"))}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
                                   unk_token="<unknown>")


def trained_clip() -> CLIPModel:
    """The small CLIP with the weights that lie beside this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = small_clip()
    clip.load_state_dict({n: t.float() for n, t in load_file(WEIGHTS).items()}, strict=False)
    return clip


@dataclass(frozen=True)
class Some:
    """So many pictures of each of these classes in one look; `among`: the classes they are told among (None: all)."""

    classes: tuple[str, ...]
    look: str
    shots: int
    among: tuple[str, ...] | None = None

    def rows(self, rng: np.random.Generator, labels: Sequence[str]) -> list[Encoded]:
        said = [c for c in self.classes for _ in range(self.shots)]
        colors = [next((w for w in c.split() if w in COLORS), "") or str(rng.choice(list(COLORS))) for c in said]
        shapes = [next((w for w in c.split() if w in SHAPES), "") or str(rng.choice(SHAPES)) for c in said]
        own = {} if self.among is None else {"among": np.array([x in self.among for x in labels], np.float32)}
        return [Encoded(np.zeros(1, np.int32), labels.index(c), 1, {"pixels": x, **own})
                for c, x in zip(said, drawn(rng, colors, shapes, self.look), strict=True)]


def shapes_world(seed: int, labels: Sequence[str], clients: Mapping[str, tuple[Some, Some | None]],
                 test: Sequence[Some], space: Mapping[str, Any], local: Mapping[str, Any] | None = None,
                 cached: bool = True, clip: CLIPModel | None = None) -> World:
    """Clients' training rows and their own test's, and a common test; of one seed the same rows for every method."""
    rng, spec = numpy_stream(seed, "shapes"), dict(space)
    shards = {c: Shard(train.rows(rng, labels), own.rows(rng, labels) if own else ())  # type: ignore[arg-type]
              for c, (train, own) in clients.items()}
    held = [row for some in test for row in some.rows(rng, labels)]
    words, clip = tokenizer(), clip or trained_clip()
    net = DualEncoder(clip, *class_prompts(words, labels, clip), labels=labels, cached=cached,
                      names=names_of(words, labels, clip))
    model = Model(net, None, "image_text", make_space(spec.pop("name"), **spec), labels=labels, seed=seed)
    plan = LocalSpec(**{"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "steps": 5, "batch_size": 12, **(local or {})})
    return World(model, Federation(shards, held, "image_text", tuple(labels)), plan, seed)  # type: ignore[arg-type]
