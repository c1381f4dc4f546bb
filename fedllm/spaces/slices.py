"""Slices: some names, rows and columns of the global trainables, for clients that can hold no more than that.

`view.take(theta)` cuts them out, `view.put(theta, sub)` writes them back, and `Covered` averages what clients with
different slices send: each entry over those who had it. `blocks` cuts a transformer into equal parts across its width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import CompositionError, ModelError, PayloadError
from fedllm.core.payload import Payload, Tree, part
from fedllm.core.reduce import Sum, check_same, wide
from fedllm.spaces.params import Params

AXES = ("rows", "columns")


@dataclass(frozen=True)
class Slice:
    """Of the tensors in `names` (None: all) the rows (axis 0) and columns (axis 1) listed; whole where none are."""

    names: tuple[str, ...] | None = None
    rows: Mapping[str, Sequence[int] | Tensor] = field(default_factory=dict)
    columns: Mapping[str, Sequence[int] | Tensor] = field(default_factory=dict)

    def take(self, theta: Mapping[str, Tensor]) -> Tree:
        """The slice of these trainables, as tensors of its own."""
        return {n: t[self.at(n, t.shape)].clone() for n, t in self.mine(theta).items()}

    def put(self, theta: Mapping[str, Tensor], sub: Mapping[str, Tensor]) -> Tree:
        """`theta` with `sub`, the values of this slice, in its place; every other entry as it was."""
        mine, out = self.mine(theta), dict(theta)
        if odd := sorted(mine.keys() ^ sub.keys()):
            raise PayloadError(f"the slice and what is put into it differ in names, for example {odd[0]!r}")
        for n, t in sub.items():
            place, out[n] = self.at(n, theta[n].shape), theta[n].clone()
            if out[n][place].shape != t.shape:
                raise PayloadError(f"'{n}': the slice has shape {tuple(out[n][place].shape)}, what is put into it "
                                   f"{tuple(t.shape)}")
            out[n][place] = t.to(out[n].dtype)
        return out

    def places(self, theta: Mapping[str, Tensor]) -> dict[str, Any]:
        """Where the slice lies, for a reply: `rows/<name>`, `columns/<name>`, and `shape/<name>` of every trainable."""
        said = {f"{axis}/{n}": torch.as_tensor(at, dtype=torch.int32) for axis in AXES
                for n, at in getattr(self, axis).items() if n in self.mine(theta)}
        return said | {f"shape/{n}": list(t.shape) for n, t in theta.items()}

    def at(self, name: str, shape: Sequence[int]) -> Any:
        """The index of the slice in a tensor of this shape; PayloadError for what lies outside of it."""
        picks = [torch.arange(size) for size in shape[:2]]
        for axis, key in enumerate(AXES):
            if name not in getattr(self, key):
                continue
            wanted = torch.as_tensor(getattr(self, key)[name], dtype=torch.int64)
            size = shape[axis] if axis < len(shape) else 0
            if wanted.dim() != 1 or not len(wanted) or int(wanted.min()) < 0 or int(wanted.max()) >= size:
                raise PayloadError(f"the slice's {key} of '{name}' are not all among its {size}")
            if len(wanted.unique()) < len(wanted):
                raise PayloadError(f"the slice's {key} of '{name}' name one twice")
            picks[axis] = wanted
        if not any(name in getattr(self, key) for key in AXES):
            return ...
        return picks[0] if len(picks) == 1 else (picks[0][:, None], picks[1])

    def mine(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that it takes from; PayloadError for a name that is not there."""
        for n in (*(self.names or ()), *self.rows, *self.columns):
            if n not in theta or (self.names is not None and n not in self.names):
                raise PayloadError(f"the slice names '{n}', which is not among the trainables" + (
                    "" if n not in theta else " that it takes"))
        return {n: t for n, t in theta.items() if self.names is None or n in self.names}


@dataclass(frozen=True)
class Covered(Sum):
    """The mean of every entry over the replies that hold it, weighted by `n`; what nobody holds does not change.

    Replies hold `delta/...` cut to a slice, `at/...` as `Slice.places` says it, and `n`; other numbers are averaged.
    The result has `delta/...` in full size, 0 where nobody was, and `cover/...`, the weight behind each entry. Lifted
    on a client a reply is twice the size of all trainables: its part of the sum, and of the weights.
    """

    divides = True
    ragged = True

    def lift(self, reply: Payload) -> Payload:
        return self.add({}, reply)

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        w, delta, at = float(reply["n"]), part(reply, "delta"), part(reply, "at")
        shapes, view = part(at, "shape"), Slice(tuple(delta), part(at, "rows"), part(at, "columns"))
        rest = {k: wide(v) * w for k, v in reply.items() if k != "n" and not k.startswith(("delta/", "at/"))} | {"n": w}
        if not acc:
            dtype = next((wide(t).dtype for t in delta.values()), torch.float32)
            acc = {f"{kind}/{n}": torch.zeros(list(s), dtype=dtype) for kind in ("sum", "cover")
                   for n, s in shapes.items()} | {k: v * 0 for k, v in rest.items()}
        check_same({k: v for k, v in acc.items() if not k.startswith(("sum/", "cover/"))}, rest)
        places = _fitting(part(acc, "sum"), shapes, view, delta)  # refused before anything is added
        for n, t in delta.items():
            total, cover, place = acc[f"sum/{n}"], acc[f"cover/{n}"], places[n]
            total[place] = torch.add(total[place], wide(t), alpha=w)
            cover[place] += w
        for k, v in rest.items():
            acc[k] = acc[k] + v
        return acc

    def done(self, total: Payload) -> Payload:
        n = total["n"]
        if n <= 0:
            raise PayloadError(f"the replies' weights 'n' add up to {n}; a mean needs a sum above 0")
        out = {k: v / n for k, v in total.items() if k != "n" and not k.startswith(("sum/", "cover/"))} | {"n": n}
        for name, cover in part(total, "cover").items():
            held = cover > 1e-6 * n  # encrypted sums are 0 up to their noise
            mean = total[f"sum/{name}"] / torch.where(held, cover, 1.0)
            out[f"delta/{name}"] = torch.where(held, mean, 0.0)
            out[f"cover/{name}"] = torch.where(held, cover, 0.0)
        return out


def _fitting(total: Mapping[str, Tensor], shapes: Mapping[str, Any], view: Slice,
             delta: Mapping[str, Tensor]) -> dict[str, Any]:
    """Where in `total` each tensor of a reply belongs; PayloadError for a reply that does not fit."""
    if odd := sorted(total.keys() ^ shapes.keys()) or sorted(n for n, t in total.items() if
                                                             tuple(t.shape) != tuple(shapes[n])):
        raise PayloadError(f"a reply is cut from other trainables than those before it, for example in '{odd[0]}'")
    if odd := sorted(delta.keys() - total.keys()):
        raise PayloadError(f"a reply says no shape for '{odd[0]}'")
    places = {n: view.at(n, shapes[n]) for n in view.mine(delta)}
    for n, place in places.items():
        if total[n][place].shape != delta[n].shape:
            raise PayloadError(f"a reply's '{n}' has shape {tuple(delta[n].shape)}, its slice "
                               f"{tuple(total[n][place].shape)}")
    return places


INNER = {"heads": r"(?:q_proj|k_proj|v_proj|query|key|value)", "width":
         r"(?:gate_proj|up_proj|fc1|fc_in|dense_h_to_4h|intermediate\.dense)"}
"""Linear maps into the attention heads and into the feed-forward's neurons: blocks are of their rows."""
OUTER = r"(?:o_proj|out_proj|down_proj|fc2|fc_out|dense_4h_to_h|output\.dense)"
"""Those out of them: blocks are of their columns."""


def cuts_of(model: Any, count: int, method: str) -> dict[str, dict[str, Any]]:
    """The `blocks` of a model's own weights by number, as a state holds them: arguments of `Slice`.

    CompositionError for a space whose trainables are no weights of the network.
    """
    if not isinstance(model.space, Params):
        raise CompositionError(f"method '{method}' and space '{model.space.stem}' do not fit together: it cuts the "
                               "network's own weights into blocks; use the space 'full' or 'layers'")
    return {str(g): {"rows": dict(v.rows), "columns": dict(v.columns)}
            for g, v in enumerate(blocks(model.net, model.initial(), count))}


def blocks(net: nn.Module, theta: Mapping[str, Tensor], count: int) -> list[Slice]:
    """`count` slices of a transformer's own weights that share no attention head and no feed-forward neuron.

    A network with the weights of one slice, and zeros for the others', computes what a network of that width would.
    Embeddings, norms and all else of the residual width are whole in each. ModelError where `count` does not divide
    heads or neurons, or nothing of the kind is found (fused projections are not taken apart).
    """
    rows, columns, modules = {}, {}, dict(net.named_modules())
    config = net.config.to_dict()
    heads = config.get("num_attention_heads") or 0
    groups = config.get("num_key_value_heads") or heads
    for name, t in theta.items():
        path, _, leaf = name.rpartition(".")
        if not isinstance(modules.get(path), nn.Linear):
            continue
        into = next((k for k, p in INNER.items() if re.search(rf"\.{p}$", "." + path)), None)
        if into:
            size = t.shape[0] if into == "width" else min(heads, groups)
            rows[name] = _parts(name, t.shape[0], size, count)
        elif leaf == "weight" and re.search(rf"\.{OUTER}$", "." + path):
            inner = "attention" in path or "attn" in path or "o_proj" in path
            columns[name] = _parts(name, t.shape[1], min(heads, groups) if inner else t.shape[1], count)
    if not rows or not columns:
        raise ModelError(f"{type(net).__name__} has no attention heads and feed-forward neurons that could be dealt "
                         "out among the trainables; use the space 'full' or 'layers' on a model with separate "
                         "projections")
    return [Slice(None, {n: p[g] for n, p in rows.items()}, {n: p[g] for n, p in columns.items()})
            for g in range(count)]


def _parts(name: str, size: int, units: int, count: int) -> tuple[Tensor, ...]:
    """`size` indices in `count` equal parts, which must not cut through one of the `units` (heads, neurons)."""
    if not units or units % count or size % count:
        raise ModelError(f"'{name}' has {units} heads or neurons, which are no {count} equal blocks")
    return torch.arange(size, dtype=torch.int32).chunk(count)


def joined(views: Sequence[Slice]) -> Slice:
    """Several slices of one network that share no row and no column, as one."""
    both = [{n: torch.cat([torch.as_tensor(getattr(v, axis)[n]) for v in views]) for n in getattr(views[0], axis)}
            for axis in AXES]
    return Slice(views[0].names, *both)
