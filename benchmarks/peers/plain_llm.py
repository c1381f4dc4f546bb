"""A real language model as one would handle it by hand: a PEFT loop over padded batches, and transformers.generate."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


class PlainLoop:
    """FedAvg, client after client; rows are (tokens, labels), shuffled and padded to the longest of their batch."""

    def __init__(self, net: Any, peft_config: Any, rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
                 batch: int, pad: int, *, lr: float) -> None:
        self.model, self.rows, self.batch, self.pad, self.lr = get_peft_model(net, peft_config), rows, batch, pad, lr
        self.state = copy.deepcopy(get_peft_model_state_dict(self.model))
        self.rng = np.random.default_rng(0)

    def round(self) -> int:
        """One round over all clients; returns the tokens trained on, padding not among them."""
        states = {}
        for client in self.rows:
            set_peft_model_state_dict(self.model, self.state)
            self._train(self.rows[client])
            states[client] = copy.deepcopy(get_peft_model_state_dict(self.model))
        total = sum(len(rows) for rows in self.rows.values())
        self.state = {key: sum(states[c][key] * (len(self.rows[c]) / total) for c in states) for key in self.state}
        return sum(len(ids) for rows in self.rows.values() for ids, _ in rows)

    def _train(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.lr,
                                      weight_decay=0.0)
        self.model.train()
        order = self.rng.permutation(len(rows))
        for at in range(0, len(order), self.batch):
            some = [rows[i] for i in order[at : at + self.batch]]
            longest = max(len(ids) for ids, _ in some)
            ids, labels = (torch.full((len(some), longest), fill) for fill in (self.pad, -100))
            mask = torch.zeros_like(ids)
            for i, (row, target) in enumerate(some):
                ids[i, : len(row)], labels[i, : len(row)] = torch.from_numpy(row), torch.from_numpy(target)
                mask[i, : len(row)] = 1
            optimizer.zero_grad()
            self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            optimizer.step()


def generate(net: Any, prompts: Sequence[np.ndarray], new: int, pad: int, size: int = 16) -> list[list[int]]:
    """Greedy answers by transformers, `size` prompts at a time, padded on the left."""
    out = []
    for at in range(0, len(prompts), size):
        some = prompts[at : at + size]
        longest = max(map(len, some))
        ids, mask = (torch.full((len(some), longest), fill) for fill in (pad, 0))
        for i, row in enumerate(some):
            ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.from_numpy(row.astype(np.int64)), 1
        with torch.no_grad():
            said = net.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                pad_token_id=pad)
        out += said[:, longest:].tolist()
    return out
