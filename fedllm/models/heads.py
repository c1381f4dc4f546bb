"""From hidden states to logits just as the model does it: caps, scales and layers of the head's own included.

A language model of transformers is a body (its last hidden states) and what its own `forward` makes of them. That last
part is run here by itself: the model's `forward`, with the body's answer put into its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.spaces.space import PEFT

STRENGTHS = (1.0, 30.0, 1000.0)
"""Hidden states are tried at these sizes: a cap that small ones do not reach shows with the large ones."""


def body_of(net: Any) -> nn.Module:
    """The part of a language model (or encoder) that ends in hidden states."""
    body = net.base_model
    if body is net:  # the prefix that the class names is not there
        parts = [m for n, m in net.named_children() if n in ("model", "transformer")]
        body = parts[0] if parts else net
    return body


class Head:
    """The logits of a language model, by its own code."""

    def __init__(self, net: Any) -> None:
        """Raises ModelError for a network whose body gives no last hidden states."""
        self.net, self.body = net, body_of(net)
        self.like = self._probe()
        inside = {id(p) for p in self.body.parameters()}
        out = net.get_output_embeddings()
        own = {id(p) for p in net.parameters()} - inside | {id(p) for p in (out.parameters() if out else ())}
        self.names = {n for n, p in net.named_parameters(remove_duplicate=False) if id(p) in own}
        self.paths = tuple(f"{n}." for n, m in net.named_children() if m is not self.body)
        self.plain = self._is_plain(out)

    def __call__(self, h: Tensor) -> Tensor:
        """[..., T, d] -> [..., T, V], as stored."""
        wide = h if h.dim() == 3 else h[None]
        if self.plain:
            z = self.net.get_output_embeddings()(wide)
        else:
            self._answers(self.like(last_hidden_state=wide))
            try:
                ids = torch.zeros(wide.shape[:2], dtype=torch.long, device=h.device)
                z = self.net(input_ids=ids, use_cache=False).logits
            finally:
                self._answers(None)
        return z if h.dim() == 3 else z[0]

    def trained(self, names: Any) -> bool:
        """Whether any of these trainables lies in the head (tied weights lie there too)."""
        own = [n.removeprefix(PEFT) for n in names]
        return any(n in self.names or n.startswith(self.paths) for n in own) if self.paths else bool(
            self.names.intersection(own))

    def _answers(self, answer: Any) -> None:
        """Let the body say this whatever it is asked; None: what it has to say."""
        if answer is None:
            self.body.__dict__.pop("forward")
            if self._before is not None:
                self.body.__dict__["forward"] = self._before
        else:
            self._before = self.body.__dict__.get("forward")
            self.body.__dict__["forward"] = lambda *args, **kwargs: answer

    def _probe(self) -> Any:
        ids = torch.arange(2, 6, device=next(self.net.parameters()).device)[None] % self.net.config.vocab_size
        with torch.no_grad():
            out = self.body(input_ids=ids, use_cache=False)
        if not isinstance(out, dict) or not isinstance(out.get("last_hidden_state"), Tensor):
            raise ModelError(f"{type(self.net).__name__} is no language model as transformers builds them: its "
                             f"{type(self.body).__name__} gives no last hidden states")
        self.width = out["last_hidden_state"].shape[-1]
        return type(out)

    def _is_plain(self, out: Any) -> bool:
        """Whether the logits are just the output embedding's linear map (no soft cap, no scale, no other layer)."""
        self.plain = False
        if type(out) is not nn.Linear or out.in_features != self.width:
            return False
        h = torch.randn(1, 4, self.width, generator=torch.Generator().manual_seed(0)).to(out.weight)
        with torch.no_grad():
            for strength in STRENGTHS:
                want = F.linear(h * strength, out.weight, out.bias)
                near = 1e-3 * float(want.abs().max()) * (20 if want.dtype == torch.bfloat16 else 1)
                if not torch.allclose(self(h * strength).to(want.dtype), want, rtol=0, atol=near):
                    return False
        return True
