"""Decepticons: a malicious server forges a transformer's weights, and reads tokens and places from one gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from fedllm.core.ask import Ask
from fedllm.core.card import Card, Claim
from fedllm.core.errors import ModelError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Tree, pack, part
from fedllm.core.rng import torch_stream


@dataclass(frozen=True)
class Decepticons(Knobs):
    """Fowl et al. 2023 on GPT-2 networks: `forge` makes the weights, `read` turns the gradient back into text.

    Every first MLP layer measures one projection <m, x> against a ladder of thresholds, one rung a neuron. Gradients of
    neighboring rungs differ by the tokens between the two: where that is one token, it is a multiple of the token's
    normalized embedding. The first attention copies a few dimensions of each row's first token to all of the row (its
    tag), so that tokens of several rows can be told apart. Of a change after one step of SGD the gradient is the change
    / -lr.
    """

    card: ClassVar[Card] = Card(
        title="Decepticons: corrupted transformers breach privacy",
        paper="Fowl et al., Decepticons: Corrupted Transformers Breach Privacy in Federated Learning for Language "
              "Models, ICLR 2023, arXiv 2201.12675 [18]",
        topic="attacks",
        sends="down: forged weights of the whole network; up: nothing but the honest gradient",
        needs="a GPT-2 network trained in full, and one step of SGD",
        claim=Claim("recovers at least 80 % of (place, token) pairs of 32 tokens from an unprotected run",
                    rig="decepticons", metric="pairs", holds=">=", threshold=0.8, seeds=5),
        evidence="Thresholds and tags follow the paper; the beacon that every row's first token carries for the first "
                 "attention, and the spreading of the loss to prompt tokens by the last one, are our own. Under secagg "
                 "8 or 9 of 256 pairs are read from the sum, 3.1 to 4.3 % of a client's on average (0.1 to 0.6 % by "
                 "chance); whose they are stays hidden.",
        also={
            "batch": Claim("recovers at least 80 % of the pairs of 4 rows of 16 tokens", rig="decepticons",
                           metric="pairs", holds=">=", threshold=0.8, seeds=5, options={"rows": 4, "length": 16}),
            "honest": Claim("at most 5 % from weights that are not forged", rig="decepticons", metric="pairs",
                            holds="<=", threshold=0.05, seeds=5, options={"forged": False}),
            "secagg": Claim("at most 2 % of a client's pairs from the sum of 8 clients under secagg, by an attacker "
                            "who fits the ring", rig="decepticons", metric="pairs", holds="<=", threshold=0.02, seeds=5,
                            options={"layers": ("secagg",), "clients": 8, "activation": "relu",
                                     "knobs": {"gain": 10.0, "eps": 10.0, "scale": 1.0}}),
            "vetting": Claim("at most 2 % from clients that vet what they are sent", rig="decepticons",
                             metric="pairs", holds="<=", threshold=0.02, seeds=5, options={"layers": ("vetting",)}),
            "dp": Claim("at most 2 % under dp_sgd at epsilon 8", rig="decepticons", metric="pairs", holds="<=",
                        threshold=0.02, seeds=5, options={"layers": ("dp_sgd",)})})

    tag: int = knob(6, "dimensions that tell a row's tokens from another row's", ge=1)
    scale: float = knob(1e4, "of the measurement: large for GELU, whose slope must be a step", gt=0)
    eps: float = knob(0.01, "what the MLPs add to the last dimension, in units of an embedding's entries", gt=0)
    gain: float = knob(1e5, "of the last norm: lifts the gradient over rounding and fixed point", gt=0)
    spread: bool = knob(False, "the last attention spreads the loss to tokens that are not learned (prompts)")
    sure: float = knob(0.9, "correlation from which a bin is read as one token", gt=0, lt=1)
    seed: int = knob(0, "of the projection")

    def forge(self, net: nn.Module) -> Tree:
        """Weights by their names in `net`; the network stays as it is. ModelError where the attack has no hold."""
        body, w = body_of(net), {n: p.detach().clone() for n, p in net.named_parameters()}
        v, h = self.tag, body.config.hidden_size
        if h // body.config.num_attention_heads < v + 1 or h < 4 * v:
            raise ModelError(f"att_decepticons needs {v + 1} dimensions in the first head and {4 * v} in all; the "
                             f"model has {h // body.config.num_attention_heads} and {h}; lower its knob 'tag'")
        wte, wpe = w["transformer.wte.weight"], w["transformer.wpe.weight"]
        usual = float(wte.std())
        wte[:, : v + 1], wpe[:, : v + 1] = 0, 0
        wpe[0, v] = 3 * usual  # the beacon: the first token of a row alone has it
        for name, p in w.items():
            if ".ln_" in name:
                p.fill_(float(name.endswith("weight")) * (self.scale if ".ln_2" in name else 1.0))
        w["transformer.ln_f.weight"][:-1], w["transformer.ln_f.weight"][-1] = 0, self.gain
        for layer in range(len(body.h)):
            self._blind(w, layer)
        self._tag(w, h, usual)
        if self.spread and len(body.h) > 1:
            value = w[f"transformer.h.{len(body.h) - 1}.attn.c_attn.weight"]
            value[-1, -1] = 1.0  # queries are 0: every token hears the mean of those before it, in the last dimension
            w[f"transformer.h.{len(body.h) - 1}.attn.c_proj.weight"][-1, -1] = 1.0
        self._ladder(w, body, usual)
        return w

    def _blind(self, w: Tree, layer: int) -> None:
        """No attention and no MLP output."""
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj"):
            w[f"transformer.h.{layer}.{name}.weight"].zero_()
            w[f"transformer.h.{layer}.{name}.bias"].zero_()

    def _tag(self, w: Tree, h: int, usual: float) -> None:
        """First attention: all look at the beacon, and take the dimensions behind it into their first ones."""
        v, qkv = self.tag, w["transformer.h.0.attn.c_attn.weight"]  # [h, 3h]
        w["transformer.h.0.attn.c_attn.bias"][v] = 1e8  # the query, the same for all
        qkv[:, h : 2 * h] = torch.eye(h)
        for i in range(v):
            qkv[v + 1 + i, 2 * h + i] = 1.0
            w["transformer.h.0.attn.c_proj.weight"][i, i] = 2 * usual

    def _ladder(self, w: Tree, body: Any, usual: float) -> None:
        h = body.config.hidden_size
        m = torch.randn(h, generator=torch_stream(self.seed, "decepticons"))
        m[self.tag], m[-1] = 0, 0  # not the beacon, not the dimension that the loss comes from
        seen = usual_inputs(w, self.tag, torch_stream(self.seed, "decepticons texts"), 20_000) @ m
        inner, blocks = w["transformer.h.0.mlp.c_fc.weight"].shape[1], self.blocks(body)
        at = torch.quantile(seen, torch.arange(inner * blocks) / (inner * blocks))  # as many tokens between any two
        at[0] = seen.mean() - 10 * seen.std()  # reached by all
        adds = (seen[:, None] - at).clamp(min=0).sum(1).mean() * self.scale
        for layer in range(blocks):
            w[f"transformer.h.{layer}.mlp.c_fc.weight"].copy_(m[:, None].expand(h, inner))
            w[f"transformer.h.{layer}.mlp.c_fc.bias"].copy_(-self.scale * at[layer * inner : (layer + 1) * inner])
            w[f"transformer.h.{layer}.mlp.c_proj.weight"][:, -1] = self.eps * usual / adds

    def blocks(self, body: Any) -> int:
        """How many blocks measure: not the one that spreads."""
        return len(body.h) - 1 if self.spread and len(body.h) > 1 else len(body.h)

    def read(self, net: nn.Module, forged: Mapping[str, Tensor], gradient: Mapping[str, Tensor],
             rows: int = 1) -> list[dict[int, int]]:
        """Each row's tokens by place, from the gradient of the forged network's loss over so many rows."""
        names = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(self.blocks(body_of(net)))]
        g = torch.cat([gradient[n].double().T for n in names])  # [rungs, h]
        x = g - F.pad(g[1:], (0, 0, 0, 1))
        size = x.norm(dim=1)
        x = x[size > 1e-5 * size.max()]  # a token that fell alone between two rungs, times some number
        token, place, sure, tags = self._decode(forged, x)
        good = sure > self.sure
        return _by_rows(token[good], place[good], sure[good], tags[good], rows)

    def _decode(self, forged: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token, place, |correlation| and tag of each difference [n, h]: it is a (e + p) + b."""
        inside = slice(self.tag + 1, -1)
        e = forged["transformer.wte.weight"].double()[:, inside]
        p = forged["transformer.wpe.weight"].double()[:, inside]
        e, p, y = (t - t.mean(1, keepdim=True) for t in (e, p, x[:, inside]))
        norms = (e.pow(2).sum(1)[:, None] + p.pow(2).sum(1) + 2 * e @ p.T).clamp(min=1e-20).sqrt()  # [V, P]
        picks = []
        for one in y:
            score = (((e @ one)[:, None] + p @ one) / norms / one.norm().clamp(min=1e-20)).abs()
            best = int(score.argmax())
            picks.append((best // len(p), best % len(p), float(score.flatten()[best])))
        token, place = (torch.tensor([q[i] for q in picks], dtype=torch.long) for i in (0, 1))
        whole = forged["transformer.wte.weight"].double()[token][:, inside] + forged["transformer.wpe.weight"].double(
        )[place][:, inside]
        centered = whole - whole.mean(1, keepdim=True)
        a = (y * centered).sum(1, keepdim=True) / centered.pow(2).sum(1, keepdim=True).clamp(min=1e-20)
        shift = x[:, inside].mean(1, keepdim=True) - a * whole.mean(1, keepdim=True)
        return token, place, torch.tensor([q[2] for q in picks]), (x[:, : self.tag] - shift) / a


def _by_rows(token: Tensor, place: Tensor, sure: Tensor, tags: Tensor, rows: int) -> list[dict[int, int]]:
    """Tokens of one tag are one row's, or several rows' that begin alike: two of one place are of two of them."""
    near = 0.05 * float(tags.norm(dim=1).median()) if len(tags) else 0.0
    heads: list[Tensor] = []
    groups: list[list[dict[int, int]]] = []
    for i in sure.argsort(descending=True).tolist():
        at = next((j for j, head in enumerate(heads) if float((tags[i] - head).norm()) <= near), None)
        if at is None:
            at = len(heads)
            heads.append(tags[i])
            groups.append([])
        p, t = int(place[i]), int(token[i])
        if any(row.get(p) == t for row in groups[at]):
            continue
        free = next((row for row in groups[at] if p not in row), None)
        if free is None:
            groups[at].append(free := {})
        free[p] = t
    return sorted((row for group in groups for row in group), key=len, reverse=True)[:rows]


def usual_inputs(w: Mapping[str, Tensor], tag: int, rng: torch.Generator, count: int = 4096) -> Tensor:
    """What the first MLP layers see of random tokens at random places [count, h], tag and beacon included."""
    wte, wpe = w["transformer.wte.weight"], w["transformer.wpe.weight"]
    first, own = (torch.randint(len(wte), (count,), generator=rng) for _ in range(2))
    place = torch.randint(len(wpe), (count,), generator=rng)
    x = wte[own] + wpe[place]
    said = F.layer_norm(wte[first] + wpe[0], (wte.shape[1],))[:, tag + 1 : 2 * tag + 1]
    x = torch.cat([x[:, :tag] + said * w["transformer.h.0.attn.c_proj.weight"][0, 0], x[:, tag:]], 1)
    return F.layer_norm(x, (wte.shape[1],))


def body_of(net: nn.Module) -> Any:
    """The transformer of a GPT-2 network."""
    if not isinstance(net, GPT2LMHeadModel):
        raise ModelError(f"att_decepticons forges GPT-2 networks, and this is {type(net).__name__}")
    return net.transformer


class Forging(Layer):
    """The malicious server's side, next to the wire: every client gets these weights in the place of the model."""

    algebra = Algebra("attack")

    def __init__(self, weights: Tree) -> None:
        self.weights = weights

    def server(self, ask: Ask, state: Any) -> Any:
        def forged(msg: Any) -> Any:
            honest = part(msg, "theta")
            return {**msg, **pack(theta={n: self.weights.get(n, t) for n, t in honest.items()})}

        return (yield replace(ask, msgs={c: forged(m) for c, m in ask.msgs.items()}))


def pairs(found: Sequence[Mapping[int, int]], real: Sequence[Sequence[int]]) -> float:
    """Share of the real (place, token) pairs that were found, whichever row they were put in."""
    from collections import Counter

    mine = Counter((p, t) for row in found for p, t in row.items())
    theirs = Counter((p, int(t)) for row in real for p, t in enumerate(row))
    return sum((mine & theirs).values()) / max(1, sum(theirs.values()))
