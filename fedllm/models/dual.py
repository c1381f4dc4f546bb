"""An image-text model (CLIP, SigLIP) as a classifier: pictures against the names of the classes in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedllm.core.errors import DataError, ModelError
from fedllm.spaces.space import Stack

PROMPT = "a photo of a {}"
VISION, TEXT = ("clip.vision_model.", "clip.visual_projection."), ("clip.text_model.", "clip.text_projection.")
"""Modules of the two towers."""
CHUNK = 64
"""Pictures whose features are made at once."""


class Attend(nn.Module):
    """a = softmax(W2 tanh(W1 x + b1) + b2), the weight of each feature; W2 = 0 at first: all weigh the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def start(self, rng: torch.Generator) -> None:
        """W1 by torch's own law for linear maps, drawn from `rng`."""
        with torch.no_grad():
            for p in self.fc1.parameters():
                p.copy_((torch.rand(p.shape, generator=rng) * 2 - 1) / self.fc1.in_features**0.5)
            for p in self.fc2.parameters():
                p.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x))).softmax(-1)


class DualEncoder(nn.Module):
    """Two towers, class prompts [C, T], and an attention over image features that changes nothing until it is trained.

    Lanes [K] share what no trainable lies in: the text features are then made once, and pictures become features when
    they are read (`Model.read`). `cached=False` makes them anew in each step.
    """

    def __init__(self, clip: Any, prompts: Tensor, mask: Tensor | None = None, *, labels: Sequence[str] = (),
                 cached: bool = True) -> None:
        super().__init__()
        self.clip, self.config, self.cached = clip, clip.config, cached
        scale = clip.logit_scale.detach()  # a parameter of no module that has a stacked form: it stays as it is
        del clip.logit_scale
        clip.register_buffer("logit_scale", scale)
        self.register_buffer("prompts", prompts, persistent=False)
        self.register_buffer("prompt_mask", torch.ones_like(prompts) if mask is None else mask, persistent=False)
        self.clip.eval().requires_grad_(False)
        with torch.no_grad():
            classes = self._text(self.prompts, self.prompt_mask)
        _told_apart(classes, labels)
        self.width = classes.shape[-1]
        self.attend = Attend(self.width).to(self.dtype)
        self._classes: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.clip.parameters()).dtype

    @property
    def vision_tokens(self) -> int:
        """Patches of a picture, and the token in front."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.text_model.get_input_embeddings()

    def images(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> features [N, d]."""
        return tensor_of(self.clip.get_image_features(pixel_values=pixels.to(self.dtype)))

    def texts(self, stack: Stack) -> Tensor:
        """Unit features of the classes' prompts: [1, C, d] for all lanes, or [K, C, d] where their tower is trained."""
        if self.cached and not inside(TEXT, [*stack.tensors, *stack.base]):
            if self._classes is None or self._classes.device != self.prompts.device:
                with torch.no_grad():
                    self._classes = self._text(self.prompts, self.prompt_mask)
            return self._classes[None]
        rows, stack.rows = stack.rows, stack.k * len(self.prompts)
        try:
            z = self._text(self.prompts.repeat(stack.k, 1), self.prompt_mask.repeat(stack.k, 1))
        finally:
            stack.rows = rows
        return z.view(stack.k, len(self.prompts), -1)

    def logits(self, stack: Stack, batch: Any) -> Tensor:
        """exp(s) cos(a * I, T) of each row and class [N, C]."""
        if "features" in batch.parts:
            i = batch.parts["features"].to(self.dtype)
            if i.dim() != 2 or i.shape[1] != self.width:
                raise DataError(f"a row's features have the shape {list(i.shape[1:])}; this model's have "
                                f"[{self.width}]")
        else:
            i = self.images(batch.parts["pixels"])
        f = F.normalize(i * self.attend(i), dim=-1)  # [K*B, d]
        t = self.texts(stack)
        return self.clip.logit_scale.exp() * torch.bmm(stack.lanes(f), t.expand(stack.k, -1, -1).mT).flatten(0, 1)

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(tensor_of(self.clip.get_text_features(input_ids=ids, attention_mask=mask)), dim=-1)

    def save_pretrained(self, folder: str) -> None:
        """The two towers as transformers saves them, and the attention beside."""
        self.clip.save_pretrained(folder)
        save_file(self.attend.state_dict(prefix="attend."), Path(folder) / "attend.safetensors")


def class_prompts(tokenizer: Any, labels: Sequence[str], family: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask [C, T] of `a photo of a <label>`."""
    if not labels:
        raise ModelError("an image-text model needs the data's labels: their names are what pictures are matched with")
    full = family.startswith("siglip")  # which was trained on prompts of one length
    got = tokenizer([PROMPT.format(name) for name in labels], padding="max_length" if full else True, truncation=full,
                    return_tensors="pt", **({"max_length": 64} if full else {}))
    mask = torch.ones_like(got["input_ids"]) if full else got["attention_mask"]
    return got["input_ids"], mask


def _told_apart(classes: Tensor, labels: Sequence[str]) -> None:
    """A ModelError where two classes look the same to the text tower: no training of the rest could tell them apart."""
    same = (torch.cdist(classes.double(), classes.double()) < 1e-6).triu(1).nonzero()
    if len(same):
        a, b = (repr(labels[i]) if labels else int(i) for i in same[0].tolist())
        raise ModelError(f"the model gives the same text features to the classes {a} and {b}: their names are the same "
                         "to its tokenizer, or the tokenizer does not put the end-of-text token where the model looks")


def inside(tower: Sequence[str], names: Iterable[str]) -> bool:
    """Whether one of these trainables lies in the tower."""
    return any(module in name for name in names for module in tower)


def tensor_of(out: Any) -> Tensor:
    """The features in what a tower of transformers gives."""
    return out if isinstance(out, Tensor) else out.pooler_output
