"""A batch of texts, continued token by token: which logits follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.models.batch import Batch
from fedllm.models.heads import body_of
from fedllm.models.model import Model, as_cache


class Continuation:
    """Rows [N, T] padded on the left, under the trainables that `model.using` has set.

    `logits` after the rows so far; `add` one token to each. Virtual tokens stand right before the text and not before
    the padding: whatever goes by distance (windows, ALiBi, recurrent layers) sees what it sees without padding.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
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
        self.done = 0  # of the mask's positions, how many the cache holds

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
            self.cache, self.done = out.cache, self.mask.shape[1]
        z = self.model.logits_of(out.last_hidden_state[:, -1:])[:, 0]
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def add(self, token: Tensor) -> None:
        """[N]: what comes next in each row."""
        one = self.mask.new_ones(len(token), 1)
        self.ids, self.text = torch.cat([self.ids, token[:, None]], 1), torch.cat([self.text, one], 1)
        self.mask = torch.cat([self.mask, one], 1)

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
