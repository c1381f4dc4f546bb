"""A language model cut into segments of whole blocks: each runs by itself, and what crosses a cut are hidden states.

`front, middle, back = segments(model, [0, 12])`: the front holds the embeddings (and the blocks before the first cut),
the back the last norm and the head (and the blocks from the last cut on). With tied embeddings one weight lies in both.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.payload import Tree
from fedllm.models.batch import IGNORE
from fedllm.models.emulator import blocks_of
from fedllm.models.heads import Head
from fedllm.models.kernels import fast
from fedllm.models.model import Model
from fedllm.spaces.layers import block_of
from fedllm.spaces.space import PEFT, linear_size, output_heads

MADE: weakref.WeakKeyDictionary[Model, dict[tuple[int, ...], list[Segment]]] = weakref.WeakKeyDictionary()
HEADS: weakref.WeakKeyDictionary[Model, Head] = weakref.WeakKeyDictionary()
"""What masked language models make of their last states."""


@dataclass(frozen=True)
class Segment:
    """Blocks `start` to `stop` of `of`; the first has the embeddings too, the last the norm and the head."""

    start: int
    stop: int
    of: int
    first: bool
    last: bool

    def part(self, model: Model, theta: Mapping[str, Tensor]) -> Tree:
        """The trainables of `theta` that lie in this segment."""
        net: Any = model.net
        word, head, blocks = net.get_input_embeddings().weight, net.get_output_embeddings(), blocks_of(net)
        tied = head is not None and head.weight is word
        words = {n for n, p in net.named_parameters(remove_duplicate=False) if p is word}
        order = {path: i for i, (path, _) in enumerate(net.named_modules())}
        stack = next(order[path] for path, m in net.named_modules() if m is blocks)

        def holds(name: str) -> bool:
            if (block := block_of(name)) is not None:
                return self.start <= block < self.stop
            owner = name.removeprefix(PEFT)
            if owner in words:
                return self.first or (self.last and tied)
            while owner and owner not in order:
                owner = owner.rpartition(".")[0]
            return self.first if order[owner] < stack else self.last

        return {n: t for n, t in theta.items() if holds(n)}

    def operations(self, model: Model, tokens: int, targets: int) -> float:
        """Floating-point operations of a forward through its linear maps: 2 a weight and token (head: target)."""
        inside, heads = 0, 0
        for path, module in model.net.named_modules():
            if size := linear_size(module):
                block = block_of(path + ".x")
                inside += size[0] * size[1] * (block is not None and self.start <= block < self.stop)
                heads += size[0] * size[1] * (self.last and path in output_heads(model.net))
        return 2.0 * (inside * tokens + heads * targets)

    def through(self, model: Model, x: Tensor, mask: Tensor) -> Tensor:
        """`run` with this segment."""
        return run(model, self, x, mask)

    @property
    def share(self) -> float:
        """Of the model's blocks; the ends count as half a block each."""
        return (self.stop - self.start + 0.5 * self.first + 0.5 * self.last) / (self.of + 1)


def segments(model: Model, cuts: Sequence[int]) -> list[Segment]:
    """One segment more than there are cuts; a cut at b lies before block b, at the number of blocks before the norm.

    They are made and checked once for the same model and cuts. RecipeError for cuts that are out of range or do not
    increase, ModelError for a model that cannot be cut.
    """
    net, made = model.net, MADE.setdefault(model, {})
    if tuple(cuts) in made:
        return made[tuple(cuts)]
    if model.task not in ("generation", "masked_words") or not isinstance(net, PreTrainedModel) or model.space.virtual:
        raise ModelError(f"segments: {type(net).__name__} with the space '{model.space.stem}' cannot be cut; "
                         "it takes a language model (task generation or masked_words), and a space whose trainables "
                         "lie in its modules")
    depth, marks = len(blocks_of(net)), list(cuts)
    fits = all(isinstance(c, int) and 0 <= c <= depth for c in marks)
    if not marks or not fits or any(b <= a for a, b in itertools.pairwise(marks)):
        raise RecipeError(f"cuts = {marks}: allowed are increasing whole numbers from 0 to {depth}, the model's blocks")
    ends = [0, *marks, depth]
    found = [Segment(a, b, depth, i == 0, i == len(marks)) for i, (a, b) in enumerate(itertools.pairwise(ends))]
    _check(model, found)
    if model.head is None and model not in HEADS:
        HEADS[model] = Head(net)
    made[tuple(cuts)] = found
    return found


def run(model: Model, segment: Segment, x: Tensor, mask: Tensor) -> Tensor:
    """Token ids [N, T] (the first segment) or hidden states [N, T, d] to hidden states [N, T, d]; padding on the right.

    To be called within `model.using(...)`; the last segment's states have passed the norm, but not the head.
    """
    model.stack.rows, model.stack.mask = len(x), mask
    if not segment.first and segment.start == segment.of and not _norms(model.net):
        return x
    ids = x if segment.first else mask.new_zeros(mask.shape, dtype=torch.long)
    with _alone(model, segment, None if segment.first else x), fast(x.device, x.shape[1], model.fast_kernels):
        causal = model.stack.causal and bool((mask[:, :-1] >= mask[:, 1:]).all())
        feed = {} if causal else {"attention_mask": mask.long()}
        return model.net.base_model(input_ids=ids, use_cache=False, **feed).last_hidden_state


def losses(model: Model, h: Tensor, labels: Tensor, k: int) -> Tensor:
    """Mean loss of each of k lanes [k] over the targets (next tokens, or masked) of the last states h [N, T, d]."""
    if model.rules.net == "causal":
        h, labels, head = h[:, :-1], labels[:, 1:], model.logits_of
    else:
        head = HEADS[model]
    rows, cols = (labels != IGNORE).nonzero(as_tuple=True)
    z = head(h)[rows, cols]  # a stacked head wants all lanes' rows together
    ce = F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), labels[rows, cols], reduction="none")
    lane = rows // (len(labels) // k)
    return ce.new_zeros(k).index_add(0, lane, ce) / torch.bincount(lane, minlength=k).clamp(min=1)


def _norms(net: Any) -> list[nn.Module]:
    """What the states pass after the last block."""
    blocks = blocks_of(net)
    for parent in net.modules():
        children = list(parent.named_children())
        if any(m is blocks for _, m in children):
            at = next(i for i, (_, m) in enumerate(children) if m is blocks)
            return [m for _, m in children[at + 1 :] if "Norm" in type(m).__name__]
    return []


@contextlib.contextmanager
def _alone(model: Model, segment: Segment, x: Tensor | None) -> Iterator[None]:
    """The network with the blocks of one segment, `x` in the place of what would come before, and no norm but the last.

    The network's own forward still makes masks and positions, so that it is cut the same whatever its family.
    """
    blocks, norms = blocks_of(model.net), _norms(model.net)
    parent, name = next((p, n) for p in model.net.modules() for n, m in p.named_children() if m is blocks)
    kept = blocks[segment.start : segment.stop]
    with only(parent, name, kept, (*kept, *norms)[0] if x is not None else None, x, () if segment.last else norms):
        yield


@contextlib.contextmanager
def only(parent: nn.Module, name: str, kept: nn.ModuleList, entry: nn.Module | None, x: Tensor | None,
         idle: Sequence[nn.Module]) -> Iterator[None]:
    """`parent` with only these of its blocks (`name`), `x` in the place of what `entry` is given, and `idle` norms that
    change nothing."""
    hooks, blocks = [], getattr(parent, name)
    if entry is not None and x is not None:
        hooks.append(entry.register_forward_pre_hook(lambda _, args, kwargs: _instead(x, args, kwargs),
                                                     with_kwargs=True))
    hooks += [norm.register_forward_hook(lambda _, args, out: args[0]) for norm in idle]
    setattr(parent, name, kept)
    try:
        yield
    finally:
        setattr(parent, name, blocks)
        for hook in hooks:
            hook.remove()


def _instead(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other hidden states."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": x}


def _check(model: Model, found: Sequence[Segment]) -> None:
    """ModelError where the segments, one after the other, do not say what the whole model says."""
    ids = (torch.arange(2, 14, device=model.device) % model.net.config.vocab_size).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), model.using([{}]):
        whole = model.net.base_model(input_ids=ids, use_cache=False).last_hidden_state
        x = ids
        for segment in found:
            x = run(model, segment, x, mask)
    if not torch.allclose(x, whole, rtol=1e-3, atol=1e-4 if whole.dtype != torch.bfloat16 else 5e-2):
        raise ModelError(f"segments: {type(model.net).__name__} does not say the same when it is cut (it differs by "
                         f"{float((x - whole).abs().max()):.2g}), so it cannot be")
