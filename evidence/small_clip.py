"""Train the small CLIP of the picture rigs from nothing: `python -m evidence.small_clip` (two minutes on one core).

Contrastive, with the captions that several pictures of a batch share as equal targets; five looks, and all pairs of
color and shape but eight. The weights are kept in fp16 beside `evidence/rigs/shapes.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from evidence.rigs.shapes import (
    COLORS,
    LOOKS,
    PAIRS,
    SEEN,
    SHAPES,
    TEMPLATES,
    UNSEEN,
    WEIGHTS,
    drawn,
    small_clip,
    tokenizer,
)
from fedllm.core.rng import numpy_stream


def pictures(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """[N, 3, 32, 32], and (pair, look) of each."""
    known = [p for p in PAIRS if p not in UNSEEN]
    x, said = [], []
    for look in SEEN:
        pairs = [str(p) for p in rng.choice(known, n // len(SEEN))]
        colors, shapes = zip(*(p.split() for p in pairs), strict=True)
        x.append(drawn(rng, colors, shapes, look))
        said += [(p, look) for p in pairs]
    return np.concatenate(x), said


def captions(rng: np.random.Generator, said: list[tuple[str, str]]) -> list[str]:
    """A caption of each, by one of the templates; `a photo of a` stands for every look."""
    return [TEMPLATES[i].format(pair, look=look) for i, (pair, look) in zip(
        rng.integers(len(TEMPLATES), size=len(said)), said, strict=True)]


def features(clip: CLIPModel, x: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit features of pictures and texts."""
    ids = tokenizer()(texts, padding=True, return_tensors="pt")
    t = clip.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
    return F.normalize(clip.get_image_features(pixel_values=x).pooler_output, dim=-1), F.normalize(t, dim=-1)


def train(steps: int, batch: int = 96, seed: int = 0) -> CLIPModel:
    """AdamW with a cosine; a fresh caption each time that a picture is seen."""
    rng = numpy_stream(seed, "small clip")
    torch.manual_seed(seed)
    clip, (x, said) = small_clip(), pictures(rng, 12000)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    pixels = torch.from_numpy(x)
    for _ in range(steps):
        at = rng.integers(len(x), size=batch)
        texts = captions(rng, [said[i] for i in at])
        f, t = features(clip, pixels[at], texts)
        z = clip.logit_scale.exp() * f @ t.T
        same = torch.tensor([[a == b for b in texts] for a in texts], dtype=z.dtype)
        want = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(z, want) + F.cross_entropy(z.T, want)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=4.0)
    return clip.eval()


@torch.no_grad()
def zero_shot(clip: CLIPModel, look: str, pairs: tuple[str, ...], shots: int = 12) -> float:
    """Of pictures of these pairs the share that is told right among them by `a photo of a`."""
    said = [p for p in pairs for _ in range(shots)]
    colors, shapes = zip(*(p.split() for p in said), strict=True)
    x = torch.from_numpy(drawn(numpy_stream(1, "zero shot", look), colors, shapes, look))
    f, t = features(clip, x, [f"a photo of a {p}" for p in pairs])
    return float(((f @ t.T).argmax(1) == torch.arange(len(pairs)).repeat_interleave(shots)).float().mean())


def main() -> None:
    """Train, say how well it tells what, and keep the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    clip = train(asked.steps)
    save_file({n: p.detach().half().contiguous() for n, p in clip.state_dict().items() if "position_ids" not in n},
              asked.out)
    told = [f"{look} {zero_shot(clip, look, PAIRS):.0%} ({zero_shot(clip, look, UNSEEN):.0%})" for look in LOOKS]
    Console().print(f"{asked.out}: {time.process_time() - began:.0f} CPU s; of {len(COLORS) * len(SHAPES)} pairs (and "
                    f"of the {len(UNSEEN)} never seen): {', '.join(told)}")


if __name__ == "__main__":
    main()
