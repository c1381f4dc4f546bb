"""Selective homomorphic encryption: only the entries that tell most about the rows are encrypted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.card import Card, Claim
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.form import Form, need
from fedllm.core.knobs import knob
from fedllm.core.layer import Algebra
from fedllm.core.payload import Payload, Tree, part
from fedllm.core.reduce import wide
from fedllm.core.rng import torch_stream
from fedllm.core.sums import is_control, must_lift, without
from fedllm.privacy._ckks import CipherSum
from fedllm.privacy.he_ckks import HECKKS, HONEST, OWN, SEALED
from fedllm.wire.codec import DTYPES, NAMES

MIXED = Form({**SEALED.parts, "plain": "tensor"})
"""Of a reply that is encrypted in part."""


@dataclass(frozen=True)
class FedMLHE(HECKKS):
    """FedML-HE (Jin et al. 2023, arXiv 2303.10837) on the keys and sums of `he_ckks`.

    Before the first round every client encrypts the mean size of its rows' gradients, entry by entry (for a
    cross-entropy this is the paper's sensitivity, the derivative of the gradient by the true label). A client opens the
    sum and tells everybody, the server too, which share p of the entries is largest: these are encrypted from then on,
    and the rest is sent as it is. Tensors of a reply that are no trainables are encrypted whole. The map itself is read
    from rows and known to all, and what is not encrypted is seen: `fedllm.audits` shows what that gives away.
    """

    card = Card(
        title="FedML-HE: homomorphic encryption of the entries that tell most",
        paper="Jin et al., FedML-HE: An Efficient Homomorphic-Encryption-Based Privacy-Preserving Federated Learning "
              "System, 2023, arXiv 2303.10837", topic="privacy",
        sends="up: about 30 bytes for each encrypted entry, 4 for others; down: one bit an entry for the map",
        needs="a method that is a Sum and tells clients its trainables; TenSEAL; clients that trust each other",
        claim=Claim("with p = 0.1 an inversion of the visible part finds fewer of a row's tokens when the sensitive "
                    "entries are encrypted than when random ones are", rig="inversion", metric="less_than_random",
                    holds=">", threshold=0.0, seeds=5, wins=4, options={"knobs": {"encrypt_ratio": 0.1}}))
    algebra = Algebra("he", needs="sum", reveals="each", reads=True, instead="he_ckks or secagg, which hide all of it")

    encrypt_ratio: float = knob(0.1, "p, share of the trainables that is encrypted", ge=0, le=1)
    mask: Literal["sensitivity", "random"] = knob("sensitivity", "which ones; random is there to be compared with",
                                                  options=("sensitivity", "random"))
    rows: int = knob(16, "training rows of a client that its sensitivity is measured on, at the most", ge=1)

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        lift, here, live = must_lift(ask, self), (yield from self._keyed(ask)), self.__dict__["_live"]
        if "map" not in state:
            state["map"] = yield from self._agree({c: ask.msgs[c] for c in here}, live["public"])
            here = [c for c in here if c in live["holders"]]
        told = {OWN + "lift": lift, OWN + "count": len(ask.msgs), OWN + "unit": self.unit,
                OWN + "bits": state["map"]["bits"], OWN + "of": state["map"]["of"]}
        out = yield from self._asked(replace(
            ask, msgs={c: {**ask.msgs[c], **told} for c in here}, reduce=MixedSum(live["public"]), form=MIXED,
            hidden={type(self).__name__: frozenset({"cipher"})}))
        self._enough(out.answered)
        sealed = {k: out.value[k] for k in ("cipher", "sizes", "names")} | {"tensors": []}
        reply = yield from self._first(self.open, out.answered, sealed)
        total: dict[str, Any] = self._numbers(reply)
        masks, hidden, plain = unpack(state["map"]), reply["sum"] * self.unit, out.value["plain"]
        for key, dtype, *shape in out.value["tensors"]:
            m = mask_of(masks, key, tuple(shape))
            t = torch.empty(tuple(shape), dtype=torch.float64)
            n = int(m.sum())
            t[m], hidden = hidden[:n], hidden[n:]
            t[~m], plain = plain[: m.numel() - n].double(), plain[m.numel() - n :]
            total[key] = t.to(DTYPES[dtype])
        return replace(out, value=ask.reducer.done(total))

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "lift" not in msg:
            return call(msg)
        self._context(client.id)
        masks = unpack({"bits": msg[OWN + "bits"], "of": msg[OWN + "of"]})
        reply = call(without(msg, OWN))
        lifted = fn.__dict__["reduce"].lift(reply) if msg[OWN + "lift"] else reply
        tensors = {k: wide(v) for k, v in lifted.items() if isinstance(v, Tensor)}
        numbers = {k: float(v) for k, v in lifted.items() if not isinstance(v, Tensor)}
        where = {k: mask_of(masks, k, tuple(t.shape)) for k, t in tensors.items()}
        hidden = torch.cat([*(t[where[k]].double() for k, t in tensors.items()),
                            torch.tensor(list(numbers.values()), dtype=torch.float64)]).numpy()
        plain = torch.cat([torch.zeros(0), *(t[~where[k]] for k, t in tensors.items())])
        names = [[k, NAMES[t.dtype], *t.shape] for k, t in tensors.items()]
        return {**self._encrypted(client.id, hidden, msg), "plain": plain, "tensors": names,
                "names": list(numbers)}

    def _agree(self, msgs: Mapping[str, Payload], public: bytes) -> Any:
        """The map: sensitivities up, encrypted; their sum to one client; its choice to all."""
        first = part(next(iter(msgs.values())), "theta")
        if not first:
            raise CompositionError("layer 'fedml_he' and a method that tells clients no trainables ('theta') do not "
                                   "fit together, since sensitivity is theirs; he_ckks encrypts whatever is sent")
        of = [[n, *first[n].shape] for n in sorted(first)]
        if self.mask == "random":
            score = torch.rand(sum(t.numel() for t in first.values()), generator=torch_stream("fedml_he", *of))
            return {"of": of, "bits": top(score, self.encrypt_ratio)}
        asked = {c: {k: v for k, v in m.items() if k.startswith(("theta/", "base/"))} | {OWN + "count": len(msgs)}
                 for c, m in msgs.items()}
        out = yield from self._asked(Ask(self.sense, asked, reduce=CipherSum(public)))
        self._enough(out.answered)
        size = sum(t.numel() for t in first.values())
        reply = yield from self._first(self.choose, out.answered, {**out.value, OWN + "bytes": -(-size // 8)})
        return {"of": of, "bits": reply["bits"]}

    @on_client(gives="cipher: whole, sizes: numbers, tensors: layout, names: names")
    def sense(self, msg: Payload, client: Any) -> Payload:
        """My sensitivities, encrypted, in the order of the names."""
        count = min(self.rows, client.n)
        s = client.sensitivity(part(msg, "theta"), range(count), base=part(msg, "base") or None)
        flat = torch.cat([s[n].reshape(-1).double() for n in sorted(s)]).numpy()
        return {**self._encrypted(client.id, flat, msg), "tensors": [], "names": []}

    def chosen(self, msg: Payload, reply: Payload) -> None:
        need(reply["bits"].dtype == torch.uint8 and reply["bits"].shape == (msg[OWN + "bytes"],),
             "'bits' is no bitmap of the trainables")

    @on_client(gives="bits: whole", fits=chosen)
    def choose(self, msg: Payload, client: Any) -> Payload:
        """The share p that is largest in the sum; only this leaves, and not the sum."""
        return {"bits": top(torch.from_numpy(self._decrypted(client.id, msg)), self.encrypt_ratio)}

    def statement(self, state: Any) -> dict[str, Any]:
        return {"layer": "fedml_he", "encrypted_share": self.encrypt_ratio,
                "hides": f"the {100 * self.encrypt_ratio:g} % of each update that is encrypted, and nothing else, from "
                         f"{HONEST}",
                "not_covered": "the rest of every update; which entries are sensitive; who answered", "void": []}


@dataclass(frozen=True)
class MixedSum(CipherSum):
    """Adds the ciphertexts, and the plain rest beside them."""

    def plus(self, acc: dict[str, Any], lifted: Payload) -> dict[str, Any]:
        plain = lifted.get("plain")
        if not isinstance(plain, Tensor) or plain.dim() != 1 or not plain.is_floating_point():
            raise PayloadError("the plain part of an encrypted reply must be one vector")
        if acc and plain.shape != acc["plain"].shape:
            raise PayloadError(f"the plain part of a reply has {len(plain)} entries, the others' {len(acc['plain'])}")
        before = acc.get("plain")
        return {**super().plus(acc, lifted), "plain": plain.clone() if before is None else before.add_(plain)}

    def done(self, total: Payload) -> Payload:
        return {**super().done(total), "plain": total["plain"]}


def top(score: Tensor, share: float) -> Tensor:
    """The `share` of the entries with the largest scores (ties: the first), as a packed bitmap."""
    chosen = np.zeros(len(score), bool)
    chosen[score.argsort(descending=True, stable=True)[: round(share * len(score))].numpy()] = True
    return torch.from_numpy(np.packbits(chosen))


def unpack(packed: Mapping[str, Any]) -> Tree:
    """The map as one boolean tensor for each trainable."""
    shapes = {name: tuple(int(n) for n in shape) for name, *shape in packed["of"]}
    sizes = [int(np.prod(s)) for s in shapes.values()]
    bits = torch.from_numpy(np.unpackbits(packed["bits"].numpy(), count=sum(sizes)).astype(bool))
    return {n: b.view(s) for (n, s), b in zip(shapes.items(), bits.split(sizes), strict=True)}


def mask_of(masks: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """What of a reply's tensor is encrypted: as its trainable is (`delta/<name>`), or all of what is none."""
    m = masks.get(key.partition("/")[2])
    return m if m is not None and tuple(m.shape) == shape else torch.ones(shape, dtype=torch.bool)
