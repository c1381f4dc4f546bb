"""The two towers of an image-text model (CLIP), each cut after some blocks: what crosses the cut are hidden states.

`front, rest = towers(model, 1)["image"]`: the front makes states of pixels or token ids, the rest makes one feature a
row of them. The model's own class prompts and its projections take no part.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.payload import Tree
from fedllm.models.dual import DualEncoder
from fedllm.models.kernels import fast
from fedllm.models.model import Model
from fedllm.models.segments import only
from fedllm.spaces.layers import block_of
from fedllm.spaces.space import linear_size

PATHS = {"image": "clip.vision_model", "text": "clip.text_model"}
"""Where each modality's tower lies in the network."""
NORMS = {"image": "post_layernorm", "text": "final_layer_norm"}
MADE: weakref.WeakKeyDictionary[Model, dict[int, dict[str, tuple[Tower, Tower]]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Tower:
    """Blocks `start` to `stop` of `of` in one tower; the first half has the embeddings too, the other the last norm."""

    modality: str
    start: int
    stop: int
    of: int
    last = False
    """It says no words: its gradient comes from outside."""

    @property
    def first(self) -> bool:
        """Whether it reads pixels or ids."""
        return self.start == 0

    def part(self, model: Model, theta: Mapping[str, Tensor]) -> Tree:
        """The trainables of `theta` that lie in it."""
        return {n: t for n, t in theta.items() if self.holds(model.space.place(n))}

    def holds(self, name: str) -> bool:
        """Whether the module or weight of this path lies in it."""
        if not name.startswith(PATHS[self.modality] + "."):
            return False
        block = block_of(name)
        return (NORMS[self.modality] in name) != self.first if block is None else self.start <= block < self.stop

    def operations(self, model: Model, tokens: int, targets: int) -> float:
        """Floating-point operations of a forward through its linear maps: 2 a weight and token."""
        sizes = [linear_size(m) for path, m in model.net.named_modules() if self.holds(path + ".x")]
        return 2.0 * tokens * sum(a * b for a, b in filter(None, sizes))

    @property
    def share(self) -> float:
        """Of the model's blocks, two towers of as many."""
        return (self.stop - self.start) / (2 * self.of)

    def through(self, model: Model, x: Tensor, mask: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], ids [N, T] or states [N, T, d] to states [N, T, d], or at the end to features [N, 1, d].

        To be called within `model.using(...)`. A text's feature is the state of its last token, a picture's that of the
        token in front.
        """
        model.stack.rows, model.stack.mask = len(x), mask
        tower: Any = model.net.get_submodule(PATHS[self.modality])
        blocks, norm = tower.encoder.layers, getattr(tower, NORMS[self.modality])
        ends, kept = self.stop == self.of, blocks[self.start : self.stop]
        with only(tower.encoder, "layers", kept, None if self.first else kept[0], x, () if ends else (norm,)), fast(
                x.device, mask.shape[1], model.fast_kernels):
            if self.modality == "image":
                side = tower.config.image_size
                pixels = x if self.first else x.new_zeros(len(x), tower.config.num_channels, side, side)
                out = tower(pixel_values=pixels.to(model.net.dtype))
                return out.pooler_output[:, None] if ends else out.last_hidden_state
            ids = x if self.first else mask.new_zeros(mask.shape, dtype=torch.long)
            h = tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            return h[torch.arange(len(h), device=h.device), mask.sum(1) - 1][:, None] if ends else h


def towers(model: Model, cut: int) -> dict[str, tuple[Tower, Tower]]:
    """(front, rest) of each modality, cut before block `cut`; made and checked once.

    ModelError for a model that is no CLIP or says something else when it is cut, RecipeError for a cut that leaves one
    side without a block.
    """
    made = MADE.setdefault(model, {})
    if cut in made:
        return made[cut]
    if not isinstance(model.net, DualEncoder) or not isinstance(model.net.clip, CLIPModel):
        raise ModelError(f"{type(model.net).__name__} is not cut into towers; an image-text model of the family CLIP "
                         "is (data.task = 'image_text')")
    depths = {m: len(_blocks(model, m)) for m in PATHS}
    if not 1 <= cut < min(depths.values()):
        raise RecipeError(f"method.cut = {cut}: allowed are 1 to {min(depths.values()) - 1}; the towers have "
                          f"{depths['image']} and {depths['text']} blocks")
    found = {m: (Tower(m, 0, cut, d), Tower(m, cut, d, d)) for m, d in depths.items()}
    for modality, halves in found.items():
        _check(model, modality, halves)
    made[cut] = found
    return found


def _blocks(model: Model, modality: str) -> nn.ModuleList:
    tower: Any = model.net.get_submodule(PATHS[modality])
    return tower.encoder.layers


def _check(model: Model, modality: str, halves: tuple[Tower, Tower]) -> None:
    """ModelError where both halves, one after the other, do not say what the whole tower says."""
    net: Any = model.net
    tower = net.get_submodule(PATHS[modality])
    with torch.no_grad(), model.using([{}]):
        if modality == "image":
            side = tower.config.image_size
            x = torch.linspace(-1, 1, 3 * side * side, device=model.device, dtype=net.dtype).view(1, 3, side, side)
            mask = x.new_ones(1, net.vision_tokens, dtype=torch.bool)
            model.stack.rows = 1
            whole = tower(pixel_values=x).pooler_output
        else:
            x, mask = net.prompts[:1], net.prompt_mask[:1].bool()
            model.stack.rows = 1
            whole = tower(input_ids=x, attention_mask=mask.long()).last_hidden_state[:, int(mask.sum()) - 1]
        h = halves[1].through(model, halves[0].through(model, x, mask), mask)[:, 0]
    if not torch.allclose(h, whole, rtol=1e-3, atol=1e-4 if whole.dtype != torch.bfloat16 else 5e-2):
        raise ModelError(f"the {modality} tower does not say the same when it is cut (it differs by "
                         f"{float((h - whole).abs().max()):.2g}), so it cannot be")
