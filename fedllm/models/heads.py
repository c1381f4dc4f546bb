"""From hidden states to logits just as the model does it: caps, scales and layers of the head's own included.

A language model of transformers is a body (its last hidden states) and what its own `forward` makes of them. That last
part is run here by itself: the model's `forward`, with the body's answer put into its place.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.core.errors import ModelError
from fedllm.spaces.space import PEFT

STRENGTHS = (1.0, 30.0, 1000.0)
"""Hidden states are tried at these sizes: a cap that small ones do not reach shows with the large ones."""


BODIES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def body_of(net: Any) -> Any:
    """The part of a language model whose last hidden states its head reads: the outermost that its forward calls.

    ModelError for a network that transformers cannot run on a few words.
    """
    if net not in BODIES:
        ran: list[str] = []
        hooks = [m.register_forward_hook(lambda m, args, out, n=n: ran.append(n) if _ends_in_states(out) else None)
                 for n, m in net.named_modules() if n and isinstance(m, PreTrainedModel)]
        try:
            _ask(net, net)
        finally:
            for hook in hooks:
                hook.remove()
        BODIES[net] = ran[-1] if ran else ""
    return net.get_submodule(BODIES[net])


def _ends_in_states(out: Any) -> bool:
    return isinstance(out, dict) and isinstance(out.get("last_hidden_state"), Tensor)


def _ask(net: Any, part: Any) -> Any:
    ids = torch.arange(2, 6, device=net.device)[None] % net.get_input_embeddings().weight.shape[0]
    try:
        with torch.no_grad():
            return part(input_ids=ids, use_cache=False)
    except Exception as error:
        raise ModelError(f"{type(net).__name__}: transformers itself cannot run it in {net.dtype} here: "
                         f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


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
        way = f"{BODIES[net]}."
        self.paths = tuple(f"{n}." for n, _ in net.named_children() if not way.startswith(f"{n}."))
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
        own = [n.rpartition("/")[2].removeprefix(PEFT) for n in names]  # a stream's name stands before its trainables'
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
        out = _ask(self.net, self.body)
        if not _ends_in_states(out):
            raise ModelError(f"{type(self.net).__name__} is no language model as transformers builds them: its "
                             f"{type(self.body).__name__} gives no last hidden states")
        self.width = out["last_hidden_state"].shape[-1]
        return type(out)

    def _is_plain(self, out: Any) -> bool:
        """Whether the logits are just the output embedding's linear map (no soft cap, no scale, no other layer)."""
        self.plain = False
        if type(out) is not nn.Linear or out.in_features != self.width:
            return False
        h = torch.randn(1, 4, self.width, generator=torch.Generator().manual_seed(0))
        h = h.to(out.weight.device).to(out.weight.dtype)
        with torch.no_grad():
            for strength in STRENGTHS:
                want = F.linear(h * strength, out.weight, out.bias)
                near = 1e-3 * float(want.abs().max()) * (20 if want.dtype == torch.bfloat16 else 1)
                if not torch.allclose(self(h * strength).to(want.dtype), want, rtol=0, atol=near):
                    return False
        return True
