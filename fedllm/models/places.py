"""How many tokens a network has places for, as its config says it."""

from __future__ import annotations

from typing import Any

UNBOUND = 1 << 20
PADDED = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer", "mpnet", "data2vec-text", "esm")
"""Families that number a row's places from the padding token's on."""


def positions_of(net: Any) -> int:
    """Places, virtual tokens' among them; UNBOUND where the config sets no bound."""
    config = getattr(net, "config", None)  # a policy has none
    said: dict[str, Any] = config.to_dict() if config else {}
    said |= said.get("text_config") or {}
    keys = ("max_position_embeddings", "n_positions", "max_seq_len")
    bound = [said[k] for k in keys if isinstance(said.get(k), int)]
    if said.get("model_type") in PADDED:  # their first places are the padding's
        bound = [b - 1 - (said.get("pad_token_id") or 1) for b in bound]
    return min((b for b in bound if b > 1), default=UNBOUND)
