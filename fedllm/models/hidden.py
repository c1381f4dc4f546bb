"""From a batch to the last hidden states of its tokens: what is masked, what stands in front, what is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fedllm.core.errors import CompositionError, ModelError
from fedllm.models.attention import SHORT, Laid
from fedllm.models.batch import Batch
from fedllm.models.blocks import attentions
from fedllm.models.dual import DualEncoder
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.heads import body_of
from fedllm.spaces.twice import wanted

POSITIONS = "positions"
"""The part of packed rows that says where in its own row each token stands."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "attention_window_size",
           "attention_window")
"""How configs name the reach of a layer that sees no farther."""
WORTH = 8_000_000
"""Padded tokens are left out where there are more of them, times a layer's weights, than rows times this: attention
goes row by row then, which costs some 0.2 ms a row and layer, and a weight and token some 25 ps."""


def hidden(model: Any, batch: Batch, padded: bool = True) -> Tensor:
    """See `Model.hidden`."""
    net, stack = model.net, model.stack
    if isinstance(net, DualEncoder):
        raise ModelError("an image-text model has no hidden states of tokens; its class logits are what it gives")
    if not model.ways.uneven and not bool(batch.mask.all()):
        return by_length(batch, lambda part: hidden(model, part))
    stack.rows, stack.mask = batch.ids.shape[0], batch.mask
    encoder = model.rules.net != "causal"
    body = net.body if isinstance(net, HeadedEncoder) else body_of(net)
    prompt = model.space.before(net, stack, batch.ids.shape[0])
    feed: dict[str, Any] = {} if encoder else {"use_cache": False}
    if encoder or not model.ways.cut or (prompt is None and not _right_padded(batch)):
        feed["attention_mask"] = _grow(batch.mask, prompt).long()
    elif not padded and prompt is None and (found := _laid(model, batch)):
        return _end_to_end(model, batch, body, *found)
    if prompt is not None and prompt.cache is not None:
        feed |= {"cache": as_cache(prompt), "use_cache": True}
    if prompt is not None and prompt.embeds is not None:
        text = net.get_input_embeddings()(batch.ids)
        feed["inputs_embeds"] = torch.cat([prompt.embeds.to(text.dtype), text], 1)
    else:
        feed["input_ids"] = batch.ids
    if (places := batch.parts.get(POSITIONS)) is not None:  # rows end to end: transformers keeps them apart by it
        if prompt is not None or "attention_mask" in feed:
            raise CompositionError("packed rows go with neither virtual tokens nor a mask; leave local.packing out")
        feed["position_ids"] = places
    h = body(**feed).last_hidden_state
    return h[:, -batch.ids.shape[1] :]


def by_length(batch: Batch, ask: Callable[[Batch], Tensor]) -> Tensor:
    """`ask` [N, T, ...] for a network to which padding matters: one lane's right-padded rows; zeros on padding."""
    lengths, out = batch.mask.sum(1), None
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        part = Batch(1, *(x[rows, :length] if x.dim() == 2 else x[rows] for x in (
            batch.ids, batch.mask, batch.labels)))
        h = F.pad(ask(part), (0, 0, 0, batch.ids.shape[1] - length))
        out = h.new_zeros(*batch.ids.shape, h.shape[-1]) if out is None else out
        out = out.index_copy(0, rows, h)
    assert out is not None
    return out


def densely(net: nn.Module) -> int:
    """Weights of a layer, where rows of the network may lie end to end: it mixes tokens in our own attention alone."""
    if not isinstance(net, PreTrainedModel) or net.device.type != "cpu":
        return 0
    layers = net.config.get_text_config().to_dict().get("num_hidden_layers")
    if (quick := attentions(net)) == 0 or quick != layers or _reach(net) < SHORT:
        return 0
    body, words = body_of(net), net.get_input_embeddings().weight
    laid, first = Laid.of([[7, 5]])
    ids = torch.arange(2, 14)[None] % len(words)
    row = slice(first[0][0], first[0][0] + 7)
    try:
        with torch.no_grad():
            both = body(**_feed(ids, torch.cat([torch.arange(5), torch.arange(7)])[None], laid)).last_hidden_state
            got, want = both[:, row], body(input_ids=ids[:, row], use_cache=False).last_hidden_state
    except (TypeError, ValueError, RuntimeError):  # it does not hand on where rows lie
        return 0
    near = (got - want).norm() <= (1e-3 if want.dtype != torch.bfloat16 else 5e-2) * want.norm()
    return sum(p.numel() for p in body.parameters() if p is not words) // layers if near else 0


def _reach(net: Any) -> int:
    config: Mapping[str, Any] = net.config.get_text_config().to_dict()
    return min((v for n in WINDOWS if isinstance(v := config.get(n), int)), default=SHORT)


def _laid(model: Any, batch: Batch) -> tuple[Laid, Tensor] | None:
    """Where the batch's rows lie without padding, and each row's first token [N]; None where padding costs less, or
    something looks at whole batches."""
    if not (model.dense and model.ways.dense) or wanted() or model.stack.noise is not None or batch.parts:
        return None
    lengths = batch.mask.sum(1).tolist()
    if min(lengths) < 1 or max(lengths) > SHORT:
        return None
    laid, first = Laid.of([lengths[i : i + batch.rows] for i in range(0, len(lengths), batch.rows)])
    spared = len(lengths) * batch.ids.shape[1] - laid.lanes * laid.tokens
    if spared * model.dense < model.worth * len(laid.spans) or spared <= 0:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules()):
        return None
    return laid, torch.tensor([at for lane in first for at in lane])


def _end_to_end(model: Any, batch: Batch, body: Any, laid: Laid, first: Tensor) -> Tensor:
    """Hidden states [N, T, d] of rows that ran end to end; zeros on padding."""
    places = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)[batch.mask]
    at = first.repeat_interleave(batch.mask.sum(1)) + places
    ids = batch.ids.new_full((laid.lanes * laid.tokens,), model.pad)
    positions = torch.zeros_like(ids)
    ids[at], positions[at] = batch.ids[batch.mask], places
    model.stack.rows, model.stack.mask = laid.lanes, None
    try:
        shape = laid.lanes, laid.tokens
        h = body(**_feed(ids.view(shape), positions.view(shape), laid)).last_hidden_state.flatten(0, 1)
    finally:
        model.stack.rows, model.stack.mask = batch.ids.shape[0], batch.mask
    out = h.new_zeros(batch.ids.numel(), h.shape[-1])
    return out.index_copy(0, batch.mask.flatten().nonzero()[:, 0], h[at]).view(*batch.ids.shape, -1)


def _feed(ids: Tensor, positions: Tensor, laid: Laid) -> dict[str, Any]:
    """A mask of four dimensions is handed on as it is, and our attention goes by `laid` in its place."""
    nobody = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(len(ids), 1, ids.shape[1], ids.shape[1])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": nobody, "laid": laid, "use_cache": False}


def _right_padded(batch: Batch) -> bool:
    return bool((batch.mask[:, :-1] >= batch.mask[:, 1:]).all())


def _grow(mask: Tensor, prompt: Any) -> Tensor:
    if prompt is None:
        return mask
    return torch.cat([mask.new_ones(len(mask), prompt.length), mask], 1)


def as_cache(prompt: Any) -> DynamicCache:
    """The prompt's keys and values as a cache that transformers models take."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(prompt.cache):
        cache.update(k, v, layer)
    return cache
