"""An image-text model (CLIP, SigLIP) as a classifier: pictures against the names of the classes in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedllm.core.errors import DataError, ModelError
from fedllm.models.names import AMONG, Names
from fedllm.spaces.space import Stack

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
                 cached: bool = True, names: Names | None = None) -> None:
        """`names` are the classes' bare names, for spaces that learn what stands before them."""
        super().__init__()
        self.clip, self.config, self.cached, self.labels, self._names = clip, clip.config, cached, tuple(labels), names
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
        self._bare: Tensor | None = None

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

    @property
    def names(self) -> Names:
        """The classes' bare names; ModelError where the network was made without."""
        if self._names is None:
            raise ModelError("this image-text model was made without its classes' names as tokens, and its space "
                             "learns what stands before them; load_model reads them")
        return self._names

    @property
    def text_room(self) -> int:
        """Tokens that the text tower reads."""
        return int(self.config.text_config.max_position_embeddings)

    def images(self, pixels: Tensor, prompt: Tensor | None = None, behind: bool = False) -> Tensor:
        """[N, 3, H, W] -> features [N, d]; with the tokens `prompt` [N, m, w] after the one in front, or behind all."""
        tower, front = self.clip.vision_model.embeddings, int("class_embedding" in dict(
            self.clip.vision_model.embeddings.named_parameters(recurse=False)))

        def put(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def prompted(*args: Any, **how: Any) -> Tensor:
                x = forward(*args, **how)  # [N, 1 + patches, w], places added
                at = x.shape[1] if behind else front
                return x if prompt is None else torch.cat([x[:, :at], prompt.to(x.dtype), x[:, at:]], 1)
            return prompted

        with instead(tower, put):
            return tensor_of(self.clip.get_image_features(pixel_values=pixels.to(self.dtype)))

    def weighed(self, pixels: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, d] with the tokens `prompt` [N, D, w] behind the patches, and how much the token in front looks
        at each of them in the last block: softmax over the D of q k / sqrt(d_h), the mean over heads [N, D]."""
        attention, at = self.clip.vision_model.encoder.layers[-1].self_attn, list[Tensor]()

        def put(forward: Callable[..., Any]) -> Callable[..., Any]:
            def heard(hidden_states: Tensor, *args: Any, **how: Any) -> Any:
                at.append(hidden_states)
                return forward(hidden_states, *args, **how)
            return heard

        with instead(attention, put):
            features = self.images(pixels, prompt, behind=True)
        h, d = at[0], prompt.shape[1]
        q, k = (f(x).unflatten(-1, (attention.num_heads, -1)) for f, x in (
            (attention.q_proj, h[:, :1]), (attention.k_proj, h[:, -d:])))  # [N, 1 or D, heads, d_h]
        return features, ((q * k).sum(-1) / q.shape[-1] ** 0.5).softmax(1).mean(-1)

    def seen(self, batch: Any) -> Tensor:
        """Image features [N, d] of a batch: those that its rows hold, or made of their pixels."""
        if "features" not in batch.parts:
            return self.images(batch.parts["pixels"])
        i = batch.parts["features"].to(self.dtype)
        if i.dim() != 2 or i.shape[1] != self.width:
            raise DataError(f"a row's features have the shape {list(i.shape[1:])}; this model's have [{self.width}]")
        return i

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

    def spoken(self, context: Tensor, place: str = "end", only: Tensor | None = None) -> Tensor:
        """Unit features [S, C, d] of the classes' names with learned tokens about them: `context` [S, C, m, w].

        `place`: the name stands at the "end", in the "middle" or at the "front" of them. m = 0: the bare names. Of the
        sentences that `only` [S, C] leaves out the features are zero.
        """
        s, c, m, w = context.shape
        every = (t.to(context.device) for t in self.names.sentences(m, place, self.text_room, self.labels))
        some = torch.ones(s, c, dtype=torch.bool, device=context.device) if only is None else only
        ids, mask, at = (t[None].expand(s, -1, -1)[some] for t in every)  # [R, T]
        tokens = context[some]  # [R, m, w]

        def put(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def learned(x: Tensor) -> Tensor:
                words = forward(x)
                own = tokens.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, w))
                return torch.where(at[..., None] >= 0, own.to(words.dtype), words)
            return learned if m else forward

        with instead(self.get_input_embeddings(), put):
            z = self._text(ids, mask)
        return z.view(s, c, -1) if only is None else z.new_zeros(s, c, z.shape[-1]).index_put((some,), z)

    def bare(self) -> Tensor:
        """Unit features [C, d] of the classes' bare names, made once."""
        if self._bare is None or self._bare.device != self.prompts.device:
            width = self.get_input_embeddings().weight.shape[1]
            with torch.no_grad():
                self._bare = self.spoken(torch.zeros(1, len(self.names.names), 0, width, device=self.prompts.device))[0]
        return self._bare

    def logits(self, stack: Stack, batch: Any) -> Tensor:
        """exp(s) cos(a * I, T) of each row and class [N, C]."""
        i = self.seen(batch)
        return self.matched(stack, i * self.attend(i), self.texts(stack), batch)

    def matched(self, stack: Stack, i: Tensor, t: Tensor, batch: Any) -> Tensor:
        """exp(s) cos(I, T) [N, C] of image features [N, d] and unit text features [K or 1, C, d], or [N, C, d]."""
        f = F.normalize(i, dim=-1)
        z = torch.einsum("nd,ncd->nc", f, t) if len(t) == len(f) else torch.bmm(stack.lanes(f), t.expand(
            stack.k, -1, -1).mT).flatten(0, 1)
        return told_among(self.clip.logit_scale.exp() * z, batch)

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(tensor_of(self.clip.get_text_features(input_ids=ids, attention_mask=mask)), dim=-1)

    def save_pretrained(self, folder: str) -> None:
        """The two towers as transformers saves them, and the attention beside."""
        self.clip.save_pretrained(folder)
        save_file(self.attend.state_dict(prefix="attend."), Path(folder) / "attend.safetensors")


def told_among(z: Tensor, batch: Any) -> Tensor:
    """Logits [N, C] in which a class that its row is not told among cannot win; a row that names none has all."""
    if AMONG not in batch.parts:
        return z
    some = batch.parts[AMONG].to(z.device) > 0
    return z.masked_fill(~(some | ~some.any(1, keepdim=True)), -1e4)


@contextlib.contextmanager
def instead(module: nn.Module, make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, `make(forward)` in the place of this module's forward."""
    own, kept = "forward" in module.__dict__, module.forward
    module.__dict__["forward"] = make(kept)
    try:
        yield
    finally:
        if own:
            module.__dict__["forward"] = kept
        else:
            del module.__dict__["forward"]


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
