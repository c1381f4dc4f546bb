"""A batch of texts, continued token by token: which logits follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fedllm.core.errors import ModelError
from fedllm.models.batch import Batch
from fedllm.models.heads import body_of
from fedllm.models.hidden import as_cache
from fedllm.models.model import Model


class Roomy(DynamicLayer):
    """Keys and values of a layer in one buffer that has room for all that will be said: no word copies the text."""

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()
        self.is_initialized, self.device, self.dtype = True, layer.keys.device, layer.keys.dtype
        self._hold(layer.keys, layer.values, length)

    def _hold(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.both = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (keys, values)]
        at = keys.shape[2]
        self.keys, self.values = (whole[:, :, :at].copy_(x) for whole, x in zip(self.both, (keys, values), strict=True))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at, most = self.keys.shape[2], self.both[0].shape[2]
        end = at + key_states.shape[2]
        if end > most:
            self._hold(self.keys, self.values, 2 * end)
        for whole, new in zip(self.both, (key_states, value_states), strict=True):
            whole[:, :, at:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.both)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold(self.keys[indices], self.values[indices], self.both[0].shape[2])


def roomy(cache: Any, length: int) -> bool:
    """Give a cache's layers room for texts of `length` tokens; False where it is of another kind than we know."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = Roomy(layer, length)
        layer.keys = layer.values = None  # one layer at a time is there twice
    return True


class Continuation:
    """Rows [N, T] padded on the left, under the trainables that `model.using` has set.

    `logits` after the rows so far; `add` one token to each. Virtual tokens stand right before the text and not before
    the padding: whatever goes by distance (windows, ALiBi, recurrent layers) sees what it sees without padding.
    """

    def __init__(self, model: Model, batch: Batch, more: int = 0) -> None:
        """`more` is how many tokens will follow at most, where that is known."""
        if model.silent:
            raise ModelError(model.silent)
        self.model, self.body, n = model, body_of(model.net), batch.ids.shape[0]
        self.cached = model.ways.cached
        model.stack.rows, model.stack.past = n, {} if self.cached else None
        self.prompt = model.space.before(model.net, model.stack, n)
        self.ids, self.text = batch.ids, batch.mask
        ahead = self.prompt.length if self.prompt else 0
        self.kept = ahead if self.prompt and self.prompt.cache is not None else 0  # positions that lie in the cache
        self.cache = as_cache(self.prompt) if self.kept else None
        self.padded = not bool(batch.mask.all())
        self.mask = torch.cat([batch.mask.new_ones(n, ahead), batch.mask], 1)
        if self.prompt and self.prompt.embeds is not None:
            self.mask = self.mask.gather(1, self._order(ahead))
        self.done, self.more = 0, more  # of the mask's positions, how many the cache holds
        self.drops = False
        """Whether rows may be taken out (`keep`)."""

    def logits(self) -> Tensor:
        """[N, V] in fp32 or better, after the last token."""
        stack, new = self.model.stack, self.done > 0
        stack.mask = None if new else self.text  # what follows is text in every row
        feed: dict[str, Any] = {"attention_mask": self.mask.long()}
        if self.padded:
            place = self.mask.long().cumsum(1).clamp(min=1) - 1  # a token's position does not count the padding
            feed["position_ids"] = place[:, -1:] if new else place[:, self.kept :]
        if new:
            feed["input_ids"] = self.ids[:, -1:]
        elif self.prompt and self.prompt.embeds is not None:
            feed["inputs_embeds"] = self._embedded(self.prompt.embeds)
        else:
            feed["input_ids"] = self.ids
        if self.cached:
            feed |= {"cache": self.cache, "use_cache": True}
        elif self.kept:
            feed |= {"cache": as_cache(self.prompt), "use_cache": True}
        else:
            feed["use_cache"] = False
        out = self.body(**feed)
        if self.cached:
            if out.cache is None:
                raise ModelError(f"{type(self.body).__name__} keeps nothing of what it has read")
            self.cache = out.cache
            if not self.done:
                self.drops = roomy(self.cache, self.mask.shape[1] + self.more) and not stack.past
            self.done = self.mask.shape[1]
        z = self.model.logits_of(out.last_hidden_state[:, -1:])[:, 0]
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def add(self, token: Tensor) -> None:
        """[N]: what comes next in each row."""
        one = self.mask.new_ones(len(token), 1)
        self.ids, self.text = torch.cat([self.ids, token[:, None]], 1), torch.cat([self.text, one], 1)
        self.mask = torch.cat([self.mask, one], 1)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, as many of each lane."""
        self.ids, self.text, self.mask = self.ids[rows], self.text[rows], self.mask[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.ids.device))
        self.model.stack.rows = len(rows)

    def _order(self, ahead: int) -> Tensor:
        """[N, P + T]: where each place's content lies in (prompt, padding, text), for (padding, prompt, text)."""
        pads = (~self.text).sum(1, keepdim=True)
        at = torch.arange(ahead + self.text.shape[1], device=pads.device).expand(len(pads), -1)
        return torch.where(at < pads, at + ahead, torch.where(at < pads + ahead, at - pads, at))

    def _embedded(self, embeds: Tensor) -> Tensor:
        text = self.model.net.get_input_embeddings()(self.ids)
        both = torch.cat([embeds.to(text.dtype), text], 1)
        order = self._order(embeds.shape[1])
        return both.gather(1, order[..., None].expand(-1, -1, both.shape[2]))
