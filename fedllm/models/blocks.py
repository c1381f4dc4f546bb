"""Quicker forms of parts of Llama-like blocks: the RMS norm, the gated MLP, and short causal attention on a CPU.

A form is put in place only where the network's answers stay what they were; anything it does not cover (a mask, a
cache, a long sequence, another device) goes through the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.models.attention import SHORT, CausalAttention, Laid, Span, read, readable
from fedllm.models.heads import body_of
from fedllm.models.norm_and_mlp import GatedMlp, RmsNorm, SwiGlu
from fedllm.spaces.frozen import bare, linear
from fedllm.spaces.twice import wanted


def quicken(net: nn.Module) -> None:
    """Put the quick forms where they fit, and take a form out again if it changes what `net` says."""
    if not isinstance(net, PreTrainedModel):
        return
    for sites, form, ask in FORMS:
        modules = list(sites(net))
        one_of_each = {type(m): m for m in modules}.values()
        if not modules or not all(_alike(m, form(m, m.forward), ask) for m in one_of_each):
            continue
        before = _answer(net)
        for module in modules:
            module.__dict__["forward"] = form(module, module.forward)
        # by the norm: of deep networks a few states are thousands of times the others, and rounding goes by the large
        if not (_answer(net) - before).norm() <= (1e-3 if before.dtype != torch.bfloat16 else 5e-2) * before.norm():
            for module in modules:
                del module.__dict__["forward"]


def attentions(net: nn.Module) -> int:
    """How many attentions of the network are in our form."""
    return sum("forward" in m.__dict__ for m in _attentions(net))


STRENGTHS = (1.0, 30.0, 1000.0)
"""Inputs are tried at these sizes: what clips or caps large values alone does not show with small ones."""


def _alike(m: nn.Module, quick: Callable, ask: Callable[[Any, Callable, float], Tensor]) -> bool:
    """Whether the quick form gives what the module's own gives, for weak inputs and strong ones."""
    with torch.no_grad():
        for strength in STRENGTHS:
            try:
                want, got = ask(m, m.forward, strength), ask(m, quick, strength)
            except (TypeError, ValueError, RuntimeError):  # it takes other arguments
                return False
            near = (1e-4 if want.dtype != torch.bfloat16 else 5e-2) * float(want.abs().max())
            if want.shape != got.shape or not torch.allclose(got, want, rtol=0, atol=near):
                return False
    return True


def _noise(m: nn.Module, *size: int) -> Tensor:
    like = next(m.parameters())
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(like.device).to(like.dtype)


def _ask_norm(m: Any, forward: Callable, strength: float) -> Tensor:
    return forward(_noise(m, 1, 3, m.weight.shape[0]) * strength)


def _ask_attention(m: Any, forward: Callable, strength: float) -> Tensor:
    x = _noise(m, 1, 5, m.q_proj.in_features)
    turn = _noise(m, 1, 5, m.head_dim // 2).repeat(1, 1, 2)
    # one strong token among weak ones, so that large values are seen and no softmax is only 0 and 1
    x = torch.cat([x[:, :1] * strength, x[:, 1:]], 1)
    return forward(hidden_states=x, position_embeddings=(turn.cos(), turn.sin()), attention_mask=None)[0]


def _ask_mlp(m: Any, forward: Callable, strength: float) -> Tensor:
    return forward(_noise(m, 1, 3, m.gate_proj.in_features) * strength)


def _answer(net: nn.Module) -> Tensor:
    ids = torch.arange(2, 26).view(2, 12) % net.config.vocab_size
    with torch.no_grad():
        return body_of(net)(input_ids=ids.to(next(net.parameters()).device), use_cache=False).last_hidden_state


def _norms(net: nn.Module) -> Iterator[nn.Module]:
    for m in net.modules():
        if "RMSNorm" in type(m).__name__ and "variance_epsilon" in m.__dict__:
            yield m


def _mlps(net: nn.Module) -> Iterator[nn.Module]:
    parts = {"gate_proj", "up_proj", "down_proj"}
    for m in net.modules():
        linear = {n: c for n, c in m.named_children() if n in parts and type(c) is nn.Linear}
        if len(linear) == 3 and {n for n, _ in m.named_children()} <= {*parts, "act_fn"}:
            yield m


def _attentions(net: nn.Module) -> Iterator[nn.Module]:
    parts = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for m in net.modules():
        if {n for n, _ in m.named_children()} == parts and m.__dict__.get("is_causal") and "scaling" in m.__dict__:
            yield m


def _quick_norm(m: Any, slow: Callable) -> Callable:
    def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
        return slow(x, *more, **named) if more or named or wanted() else RmsNorm.apply(x, m.weight, m.variance_epsilon)

    return forward


def _quick_attention(m: Any, slow: Callable) -> Callable:
    def forward(hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, cache: Any = None,
                laid: Laid | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        x, turns = hidden_states, position_embeddings
        if cache is not None and turns is not None and readable(m, x, turns, attention_mask):
            return m.o_proj(read(m, x, turns, attention_mask, cache)), None
        odd = (attention_mask is not None and laid is None) or cache is not None or turns is None or (
            x.device.type != "cpu" or wanted())
        spans = laid.spans if laid else ((0, *x.shape[:2]),)
        longest = max(spans, key=lambda span: span[2])
        if odd or longest[2] > SHORT or turns[0].shape[-1] != m.head_dim or (laid is None and len(turns[0]) > 1):
            if laid is not None:
                raise RuntimeError("rows that lie end to end have no plain attention")
            return slow(hidden_states, position_embeddings=turns, attention_mask=attention_mask, cache=cache, **kwargs)
        cos, sin = (_of_row(t.to(x.dtype), longest) for t in turns)  # [1, T, h]
        q, k, v = (linear(p, x) for p in (m.q_proj, m.k_proj, m.v_proj))
        return linear(m.o_proj, CausalAttention.apply(q, k, v, cos, sin, m.scaling, spans)), None

    return forward


def _of_row(turn: Tensor, span: Span) -> Tensor:
    """Of cosines or sines [N, T, h] of all tokens those of a row [1, t, h]."""
    first, _, t = span
    return turn.reshape(1, -1, turn.shape[-1])[:, first : first + t]


def _quick_mlp(m: Any, slow: Callable) -> Callable:
    gate, up, down = m.gate_proj, m.up_proj, m.down_proj

    def forward(x: Tensor) -> Tensor:
        if wanted():
            return slow(x)
        if not all(bare(linear) for linear in (gate, up, down)):  # adapters, or weights that are trained
            return down(SwiGlu.apply(gate(x), up(x)))
        return GatedMlp.apply(x, gate.weight, up.weight, down.weight)

    return forward


FORMS = ((_norms, _quick_norm, _ask_norm), (_mlps, _quick_mlp, _ask_mlp),
         (_attentions, _quick_attention, _ask_attention))
"""Which modules, their quick form, and how one is asked."""
