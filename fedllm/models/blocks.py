"""Quicker forms of parts of Llama-like blocks: the RMS norm, the gated MLP, and short causal attention on a CPU.

A form is put in place only where the network's answers stay what they were; anything it does not cover (a mask, a
cache, a long sequence, another device) goes through the module's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fedllm.models.heads import body_of
from fedllm.spaces.twice import wanted

SHORT = 256
"""Up to this length plain attention beats the CPU's flash kernel, whose backward is slow."""

PART = 512
"""Tokens that a gated MLP takes at once."""


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
                **kwargs: Any) -> tuple[Tensor, None]:
        x, turns = hidden_states, position_embeddings
        if cache is not None and turns is not None and _readable(m, x, turns, attention_mask):
            return m.o_proj(_read(m, x, turns, attention_mask, cache)), None
        odd = attention_mask is not None or cache is not None or turns is None or x.device.type != "cpu" or wanted()
        if odd or x.shape[1] > SHORT or turns[0].shape[-1] != m.head_dim:
            return slow(hidden_states, position_embeddings=turns, attention_mask=attention_mask, cache=cache, **kwargs)
        cos, sin = (t.to(x.dtype).unsqueeze(1) for t in turns)  # [1, 1, T, h]
        return m.o_proj(CausalAttention.apply(m.q_proj(x), m.k_proj(x), m.v_proj(x), cos, sin, m.scaling)), None

    return forward


def _quick_mlp(m: Any, slow: Callable) -> Callable:
    gate, up, down = m.gate_proj, m.up_proj, m.down_proj

    def forward(x: Tensor) -> Tensor:
        if wanted():
            return slow(x)
        if not all(_bare(linear) for linear in (gate, up, down)):  # adapters, or weights that are trained
            return down(SwiGlu.apply(gate(x), up(x)))
        return GatedMlp.apply(x, gate.weight, up.weight, down.weight)

    return forward


def _bare(linear: Any) -> bool:
    """Whether a linear map is what it was built as: frozen, without a bias, and nothing put in its forward's place."""
    return "forward" not in linear.__dict__ and linear.bias is None and not (
        linear.weight.requires_grad or linear._forward_hooks or linear._forward_pre_hooks)


class SwiGlu(torch.autograd.Function):
    """silu(g) u; keeps g and u alone."""

    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d * u, g), F.silu(g).mul_(d)


class GatedMlp(torch.autograd.Function):
    """(silu(x G^T) * x U^T) D^T with frozen G, U [o, i] and D [i, o]; keeps the two products, and no third."""
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = F.linear(x, gate), F.linear(x, up)
        ctx.save_for_backward(g, u, gate, up, down)
        y = torch.empty_like(x)
        for out, a, b in zip(_parts(y), _parts(g), _parts(u), strict=True):
            torch.mm(F.silu(a).mul_(b), down.T, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        g, u, gate, up, down = ctx.saved_tensors
        dx = torch.empty_like(d, memory_format=torch.contiguous_format)
        for out, a, b, e in zip(_parts(dx), _parts(g), _parts(u), _parts(d), strict=True):
            e = e @ down
            right = F.silu(a).mul_(e)
            torch.mm(torch.ops.aten.silu_backward(e.mul_(b), a), gate, out=out)
            out.addmm_(right, up)
        return dx, None, None, None


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """[..., d] as pieces [m, d] of it, few enough rows that what is made of them stays in the cache."""
    return x.reshape(-1, x.shape[-1]).split(PART)


class RmsNorm(torch.autograd.Function):
    """w * x / rms(x) with a frozen gain w; keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, None, None]:
        # dx = r (w d) - x r^3 mean(x w d)
        x, weight, scale = ctx.saved_tensors
        g, wide = (d * weight).to(scale.dtype), x.to(scale.dtype)
        along = (g * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return g.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class CausalAttention(torch.autograd.Function):
    """Rotate queries and keys, and attend to what came before: q [N, T, H*h], k and v [N, T, G*h] -> [N, T, H*h].

    The rotation writes straight into the layout that the products want, and grouped heads share their keys in place.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        h, t = cos.shape[-1], q.shape[1]
        groups = k.shape[-1] // h
        q, k, v = _heads(q, h), _heads(k, h), _heads(v, h)
        shape = (q.shape[0] * groups, -1, h)
        q, k = (_rotate(x, cos, sin, torch.empty(x.shape, dtype=x.dtype)).view(shape) for x in (q, k))
        v = v.reshape(shape)
        ahead = _ahead(t, q.shape[1] // t, q.dtype)
        p = torch.softmax(torch.baddbmm(ahead, q, k.mT, alpha=scale), -1)  # [N*G, H/G*T, T]
        ctx.save_for_backward(q, k, v, p, cos, sin)
        ctx.scale, ctx.rows = scale, t
        return _flat(torch.bmm(p, v), t, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, cos, sin = ctx.saved_tensors
        t, h = ctx.rows, cos.shape[-1]
        groups = v.shape[0] // d.shape[0]
        d = _heads(d, h).reshape(q.shape)
        dv = _flat(torch.bmm(p.mT, d), t, groups) if ctx.needs_input_grad[2] else None
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, dv, None, None, None
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(d, v.mT), p, -1, p.dtype)
        cos, sin = cos * ctx.scale, -sin.roll(h // 2, -1) * ctx.scale  # the rotation backwards
        back = [None, None]
        for i, (left, right) in enumerate(((ds, k), (ds.mT, q))):
            if ctx.needs_input_grad[i]:
                g = torch.bmm(left, right).view(v.shape[0] // groups, -1, t, h)
                out = torch.empty(g.shape[0], t, g.shape[1] * h, dtype=g.dtype)
                _rotate(g, cos, sin, _heads(out, h))
                back[i] = out
        return back[0], back[1], dv, None, None, None


def _readable(m: Any, x: Tensor, turns: Any, mask: Tensor | None) -> bool:
    plain = (mask is not None and mask.dtype == torch.bool and mask.dim() == 4) or (mask is None and x.shape[1] == 1)
    return plain and x.device.type == "cpu" and x.shape[1] <= SHORT and turns[0].shape[-1] == m.head_dim and not (
        torch.is_grad_enabled())


def _read(m: Any, x: Tensor, turns: Any, mask: Tensor | None, cache: Any) -> Tensor:
    """Attention of new tokens x [N, T, d] to all that the cache holds; grouped heads share their keys in place."""
    h, t = m.head_dim, x.shape[1]
    cos, sin = (c.to(x.dtype).unsqueeze(1) for c in turns)
    q, k, v = _heads(m.q_proj(x), h), _heads(m.k_proj(x), h), _heads(m.v_proj(x), h)
    q, k = (_rotate(y, cos, sin, torch.empty(y.shape, dtype=y.dtype)) for y in (q, k))
    k, v = (y.flatten(0, 1) for y in cache.update(k, v, m.layer_idx))  # [N*G, t_all, h]
    z = torch.bmm(q.view(len(k), -1, h), k.mT).mul_(m.scaling).view(len(x), -1, t, k.shape[1])
    if mask is not None:  # padding's own rows see nothing, and are nothing to anybody
        z.masked_fill_(~mask[..., : k.shape[1]], torch.finfo(z.dtype).min)
    return _flat(torch.bmm(torch.softmax(z, -1).view(len(k), -1, k.shape[1]), v), t, len(k) // len(x))


def _heads(x: Tensor, h: int) -> Tensor:
    """[N, T, H*h] -> [N, H, T, h], a view."""
    return x.view(*x.shape[:2], -1, h).transpose(1, 2)


def _flat(x: Tensor, t: int, groups: int) -> Tensor:
    """[N*G, H/G*T, h] -> [N, T, H*h]."""
    n = x.shape[0] // groups
    return x.view(n, -1, t, x.shape[-1]).transpose(1, 2).reshape(n, t, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """out = x cos + (-x2, x1) sin, on [N, H, T, h] in any layout."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@functools.lru_cache(maxsize=64)
def _ahead(t: int, heads: int, dtype: torch.dtype) -> Tensor:
    """0 where a position may look and -inf ahead of it: [heads*T, T]."""
    return torch.full((t, t), float("-inf"), dtype=dtype).triu(1).repeat(heads, 1)


FORMS = ((_norms, _quick_norm, _ask_norm), (_mlps, _quick_mlp, _ask_mlp),
         (_attentions, _quick_attention, _ask_attention))
"""Which modules, their quick form, and how one is asked."""
