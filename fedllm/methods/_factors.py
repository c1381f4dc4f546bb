"""Averaging LoRA pairs as products: the reducer of every method that calls the mean of B_k A_k the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.client import ClientInfo
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.layer import name_of
from fedllm.core.payload import Payload, Tree, part
from fedllm.core.reduce import Mean, Sum, wide
from fedllm.core.rng import torch_stream
from fedllm.methods._linalg import Svd, dense_svd, factored_svd
from fedllm.spaces.lora import LoRA, factors, names_of


def need_lora(method: Any, model: Any, plain: bool = True) -> LoRA:
    """The model's space, which must be LoRA; with `plain` one whose change of a weight is s B A and no more."""
    if not isinstance(model.space, LoRA):
        raise CompositionError(f"method '{name_of(method)}' and space '{model.space.stem}' do not fit "
                               "together: it works on LoRA's factors; use the space 'lora'")
    if plain and not model.space.plain:
        knob = "dora = true" if model.space.dora else "init = 'pissa'"
        raise CompositionError(f"space.{knob} and method '{name_of(method)}' do not fit together: it counts on a "
                               "change of s B A and no more; leave it out, or use fedavg or fedit")
    return model.space


def ranks_within(clients: Sequence[ClientInfo], most: int) -> dict[str, int]:
    """Each client's rank; CompositionError for one above `most`, the rank of which clients hold the first rows."""
    ranks = {c.id: c.profile.rank or most for c in clients}
    if bad := [c for c, r in ranks.items() if r > most]:
        raise CompositionError(f"client '{bad[0]}' has rank {ranks[bad[0]]}, above space.rank = {most}, of which "
                               "clients hold the first rows; lower clients.ranks or the profile's, or raise space.rank")
    return ranks


@dataclass(frozen=True)
class Products(Sum):
    """sum_k p_k s_k B_k A_k for each LoRA pair in the replies' `theta`, with the mean of everything else in them.

    Replies hold `theta/...`, `n` and `scale` (s_k); ranks may differ. A server that sees the replies keeps factors
    and stacks them: `B/<path>` [o, sum r_k] and `A/<path>` [sum r_k, i], whose product is the sum, exactly. Lifted on
    a client (as secure aggregation does) they come multiplied out: `product/<path>` [o, i].
    """

    ragged: ClassVar[bool] = True

    means: bool = False
    """Also average the factors themselves (all ranks must be equal)."""

    def lift(self, reply: Payload) -> Payload:
        w, s = float(reply["n"]), float(reply["scale"])
        pairs = factors(part(reply, "theta"))
        products = {f"product/{path}": w * s * wide(b) @ wide(a) for path, (b, a) in pairs.items()}
        return {**Mean().lift(self._rest(reply)), **products}

    def add(self, acc: dict[str, Any], reply: Payload) -> dict[str, Any]:
        w, s = float(reply["n"]), float(reply["scale"])
        pairs = factors(part(reply, "theta"))
        acc = acc or {"rest": {}, "pairs": {path: ([], []) for path in pairs}}
        if acc["pairs"].keys() != pairs.keys():
            raise PayloadError(f"a reply's LoRA modules differ, for example {sorted(acc['pairs'].keys() ^ pairs)[:3]}")
        for path, (b, a) in pairs.items():
            other = [t[0].shape for t in acc["pairs"][path] if t]
            if b.shape[1] != a.shape[0] or (other and (b.shape[0], a.shape[1]) != (other[0][0], other[1][1])):
                raise PayloadError(f"the factors of '{path}' have shapes {tuple(b.shape)} and {tuple(a.shape)}, which "
                                   "do not go with the other replies'")
        acc["rest"] = Mean().add(acc["rest"], self._rest(reply))
        for path, (b, a) in pairs.items():
            acc["pairs"][path][0].append(wide(b))
            acc["pairs"][path][1].append(wide(a) * (w * s))  # one of the two carries the weight
        return acc

    def done(self, total: Payload) -> Payload:
        if "pairs" not in total:  # a sum of lifted replies
            return Mean().done(total)
        value = dict(Mean().done(total["rest"]))
        for path, (b, a) in total["pairs"].items():
            value |= {f"B/{path}": torch.cat(b, 1), f"A/{path}": torch.cat(a, 0) / value["n"]}
        return value

    def _rest(self, reply: Payload) -> dict[str, Any]:
        pairs = factors(part(reply, "theta"))
        skip = set() if self.means else {f"theta/{name}" for path in pairs for name in names_of(path)}
        return {k: v for k, v in reply.items() if k not in skip and k != "scale"}


class Padded(Sum):
    """Weighted mean of LoRA slices of any rank, padded with zeros to the reply's `rank_max`."""

    ragged: ClassVar[bool] = True

    def lift(self, reply: Payload) -> Payload:
        return Mean().lift(pad(reply))

    def add(self, acc, reply: Payload):
        return Mean().add(acc, pad(reply))

    def done(self, total: Payload) -> Payload:
        return Mean().done(total)


def pad(reply: Payload) -> dict:
    """A [r, i] grows rows, B [o, r] columns, `cover` [r] entries; the rest stays."""
    r, out = reply["rank_max"], {}
    for name, x in reply.items():
        if name.endswith("lora_A.weight") or name == "cover":
            x = torch.cat([x, x.new_zeros(r - len(x), *x.shape[1:])])
        elif name.endswith("lora_B.weight"):
            x = torch.cat([x, x.new_zeros(len(x), r - x.shape[1])], 1)
        out[name] = x
    return {n: x for n, x in out.items() if n != "rank_max"}


def stacks(value: Payload) -> dict[str, Tensor]:
    """The sums of products of a `Products` value, as they came: `B/...` and `A/...`, or `product/...`."""
    return {k: v for k, v in value.items() if k.startswith(("B/", "A/", "product/"))}


def svds(value: Payload) -> dict[str, Svd]:
    """The singular values and vectors of each sum of products, by module path."""
    b, a = part(value, "B"), part(value, "A")
    return ({path: factored_svd(b[path], a[path]) for path in b}
            | {path: dense_svd(m) for path, m in part(value, "product").items()})


def split_heads(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA tree holds beside its factors: modules trained whole, such as the classifier."""
    inner = {name for path in factors(theta) for name in names_of(path)}
    return {n: t for n, t in theta.items() if n not in inner}


def rank_of(theta: Mapping[str, Tensor]) -> int:
    """The rank of a LoRA tree."""
    return next(iter(factors(theta).values()))[1].shape[0]


def fresh(client: Any, rank: int, owner: str) -> Tree:
    """A new LoRA from the client's own stream, so that no two clients or rounds search the same subspace."""
    seed = int(client.rng(owner).integers(2**62))
    return client.model.space.start(client.model.net, torch_stream(seed), rank)


def first_ranks(theta: Mapping[str, Tensor], r: int) -> Tree:
    """A[:r], B[:, :r], and whatever is no factor."""
    cut = {"lora_A.weight": (slice(r),), "lora_B.weight": (slice(None), slice(r))}
    return {n: x[next((at for end, at in cut.items() if n.endswith(end)), ())] for n, x in theta.items()}
