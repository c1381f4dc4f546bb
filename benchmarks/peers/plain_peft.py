"""The loop that one would write by hand: PEFT, its state functions, a plain torch loop, and no Trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


class PlainPeft:
    """FedAvg over clients whose rows are token arrays of equal length; `plans` lists each client's batches."""

    def __init__(self, net: Any, peft_config: Any, rows: Mapping[str, Sequence[np.ndarray]],
                 plans: Mapping[str, Sequence[np.ndarray]], *, lr: float, optimizer: str = "adamw") -> None:
        self.model, self.plans, self.lr, self.optimizer = get_peft_model(net, peft_config), plans, lr, optimizer
        for name, p in self.model.named_parameters():  # adapters stay fp32 over a bf16 base
            p.data = p.data.float() if "lora_" in name else p.data
        self.rows = {c: torch.from_numpy(np.stack(r).astype(np.int64)).to(net.device) for c, r in rows.items()}
        self.state = copy.deepcopy(get_peft_model_state_dict(self.model))

    def round(self) -> int:
        """One round over all clients; returns the tokens trained on."""
        states, tokens = {}, 0
        for client, rows in self.rows.items():
            set_peft_model_state_dict(self.model, self.state)
            tokens += self._train(rows, self.plans[client])
            states[client] = copy.deepcopy(get_peft_model_state_dict(self.model))
        total = sum(len(rows) for rows in self.rows.values())
        self.state = {key: sum(states[c][key] * (len(self.rows[c]) / total) for c in states) for key in self.state}
        return tokens

    def _train(self, rows: torch.Tensor, plan: Sequence[np.ndarray]) -> int:
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        params = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = kind(params, lr=self.lr, weight_decay=0.0)
        self.model.train()
        tokens = 0
        for at in plan:
            ids = rows[at]
            optimizer.zero_grad()
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            tokens += ids.numel()
        return tokens
