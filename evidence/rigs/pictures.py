"""Pictures in four looks, and a small CLIP that has seen one: clients with disjoint classes, tested on a look apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from evidence.rigs.topics import cache_dir, keep
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.dual import DualEncoder
from fedllm.models.model import Model
from fedllm.spaces import make_space

SIZE, CLASSES, NOISE = 16, 12, 0.7
LOOKS = {"photo": ((1.0, 1.0, 1.0), 0.0), "warm": ((1.4, 0.8, 0.5), 0.1), "cold": ((0.5, 0.8, 1.4), 0.1),
         "faded": ((0.6, 0.6, 0.6), 0.2)}
"""What a domain multiplies colors by, and adds."""
NAMES = tuple(f"thing-{i}" for i in range(CLASSES))
END = CLASSES + 5


def pictures(rng: np.random.Generator, kinds: np.ndarray, labels: np.ndarray, domain: str) -> np.ndarray:
    """[N, 3, 16, 16] float32: the class's picture, moved, in the look of a domain, with noise."""
    x = np.stack([np.roll(kinds[y], rng.integers(0, 4, 2), (1, 2)) for y in labels])
    gain, shift = LOOKS[domain]
    return (x * np.array(gain)[:, None, None] + shift + rng.normal(0, NOISE, x.shape)).astype(np.float32)


def prompts() -> torch.Tensor:
    """`a photo of a <name>` as token ids [C, 7]; the end is the highest."""
    return torch.tensor([[0, 1, 2, 3, 1, 5 + c, END] for c in range(CLASSES)])


def small_clip(seed: int) -> CLIPModel:
    """Two blocks of width 48 in each tower."""
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "attention_dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(
            text_config={**tower, "vocab_size": END + 1, "max_position_embeddings": 8, "eos_token_id": END,
                         "bos_token_id": 0, "pad_token_id": 4},
            vision_config={**tower, "image_size": SIZE, "patch_size": 4}, projection_dim=32))


@functools.lru_cache(maxsize=8)
def world_of(seed: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The classes' pictures, and a CLIP trained on noisy photos of them: once, then read from the cache."""
    rng = numpy_stream(seed, "pictures")
    kinds = F.interpolate(torch.from_numpy(rng.normal(0, 1, (CLASSES, 3, 5, 5))), SIZE, mode="bicubic").numpy()
    path = cache_dir() / f"pictures-{seed}-v2.safetensors"
    if path.is_file():
        return kinds, load_file(path)
    clip = small_clip(seed)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(200):
        y = rng.integers(0, CLASSES, 48)
        gain = rng.uniform(0.5, 1.3, (48, 3, 1, 1)).astype(np.float32)  # it knows more than one light
        x = torch.from_numpy(gain * pictures(rng, kinds, y, "photo"))
        f = F.normalize(clip.get_image_features(pixel_values=x).pooler_output, dim=-1)
        t = F.normalize(clip.get_text_features(input_ids=prompts()).pooler_output, dim=-1)
        loss = F.cross_entropy(clip.logit_scale.exp() * f @ t.T, torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kinds, keep(path, {
        n: p.detach().contiguous() for n, p in clip.state_dict().items() if "position_ids" not in n})


def picture_world(seed: int, space: str, cached: bool = True, steps: int = 5) -> World:
    """Four clients of 3 classes and 48 pictures each, warm or cold; the test is faded, a look that no client has."""
    kinds, weights = world_of(seed)
    rng = numpy_stream(seed, "picture clients")
    clip = small_clip(seed)
    clip.load_state_dict(weights, strict=False)

    def rows(labels: np.ndarray, domain: str) -> list[Encoded]:
        return [Encoded(np.zeros(1, np.int32), int(y), 1, {"pixels": x})
                for x, y in zip(pictures(rng, kinds, labels, domain), labels, strict=True)]

    shards = {f"client-{k}": Shard(rows(3 * k + rng.integers(0, 3, 48), ("warm", "cold")[k % 2]))  # type: ignore[arg-type]
              for k in range(4)}
    test = rows(rng.integers(0, CLASSES, 240), "faded")
    model = Model(DualEncoder(clip, prompts(), cached=cached), None, "image_text", make_space(space), labels=NAMES,
                  seed=seed)
    spec = LocalSpec(optimizer="adamw", lr=3e-3, steps=steps, batch_size=16)
    return World(model, Federation(shards, test, "image_text", NAMES), spec, seed)  # type: ignore[arg-type]


def tested(trial: Trial) -> Mapping[str, float]:
    """The served model on the look that nobody has."""
    return next(iter(trial.scores("global").values()))


def seen_pictures(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 10) -> Metrics:
    """`loss` and `accuracy` on the unseen look; `over_zero_shot`: the loss above that of the frozen model;
    `upload_of_full`: bytes up in a round, of those of FedAvg on all weights."""
    torch.set_num_threads(1)
    trial = Trial(method, picture_world(seed, "feature_attention"), dict(knobs or {}))
    start, end = dict(tested(trial)), tested(trial.rounds(rounds))
    up = trial.engine.record.totals()["up"] / rounds
    full = Trial("fedavg", picture_world(seed, "full", steps=1), {}).rounds(1).engine.record.totals()["up"]
    return {"loss": end["loss"], "accuracy": end["accuracy"], "zero_shot": start["accuracy"],
            "over_zero_shot": end["loss"] - start["loss"], "upload_of_full": up / full}


RIGS = {"pictures": seen_pictures}
